"""A deterministic plan of faults: at point X, on worker Y, do Z.

Points are named places in the protocol, compiled in and inert unless a plan names them; the shells
carry a matched rule out (kill, stop, raise ...). Used to prove promises, active only when asked
for.
"""

import msgspec

from appliance.core.types import WorkerId


class FaultRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`action` at the `nth` hit of `point` (counted per process) and, if `repeat`, at each later
    one.

    `worker` restricts the rule to one worker, `epoch` to one incarnation, `token` to steps that
    compute a sequence whose prompt contains that token id. Actions: kill, segv, stop (SIGSTOP),
    exit, raise, oom (a device out-of-memory error), delay (`seconds`).
    """

    point: str
    action: str
    worker: WorkerId | None = None
    epoch: int | None = None
    token: int | None = None
    nth: int = 1
    repeat: bool = False
    seconds: float = 0.0


ACTIONS = frozenset({"kill", "segv", "stop", "exit", "raise", "oom", "delay"})
POINTS = frozenset(
    {
        "worker.start",
        "worker.weights",
        "worker.assign",
        "worker.before_step",
        "worker.after_step",
        "worker.before_send",
    }
)


class FaultPlanError(Exception):
    """The plan names a point or an action that does not exist."""


class FaultPlan:
    """The rules of one process and how often each point was hit."""

    def __init__(self, rules: tuple[FaultRule, ...], *, worker: WorkerId, epoch: int) -> None:
        for rule in rules:
            if rule.point not in POINTS:
                raise FaultPlanError(f"unknown fault point {rule.point!r}; known: {sorted(POINTS)}")
            if rule.action not in ACTIONS:
                raise FaultPlanError(
                    f"unknown fault action {rule.action!r}; known: {sorted(ACTIONS)}"
                )
        self._rules = tuple(
            rule for rule in rules if rule.worker in (None, worker) and rule.epoch in (None, epoch)
        )
        self._hits = [0] * len(self._rules)

    @property
    def active(self) -> bool:
        """False when no rule can ever match here: callers skip collecting tokens."""
        return bool(self._rules)

    def wants_tokens(self) -> bool:
        """Whether a rule looks at prompt tokens."""
        return any(rule.token is not None for rule in self._rules)

    def hit(self, point: str, *, tokens: frozenset[int] = frozenset()) -> FaultRule | None:
        """Count a hit of `point` and return the rule to carry out now, if any."""
        found: FaultRule | None = None
        for index, rule in enumerate(self._rules):
            if rule.point != point or (rule.token is not None and rule.token not in tokens):
                continue
            self._hits[index] += 1
            due = self._hits[index] == rule.nth or (rule.repeat and self._hits[index] > rule.nth)
            if due and found is None:
                found = rule
        return found
