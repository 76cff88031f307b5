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
    exit, raise, oom (a device out-of-memory error), delay (`seconds`), and at the points of
    `REFUSABLE` refuse (what is asked for there is refused, or reported as failed).
    """

    point: str
    action: str
    worker: WorkerId | None = None
    epoch: int | None = None
    token: int | None = None
    nth: int = 1
    repeat: bool = False
    seconds: float = 0.0


ACTIONS = frozenset({"kill", "segv", "stop", "exit", "raise", "oom", "delay", "refuse"})
REFUSABLE = frozenset(
    {
        "link.up",  # the node has introduced a peer
        "link.probe",  # its pool is to be measured
        "move.pull",  # the target has heard of a move
        "move.migrate",  # the source has heard of it
        "move.before_copy",  # blocks are to be copied
        "move.after_copy",  # they were, and are to be verified
        "fetch.before_copy",  # cached blocks of a peer are to be looked for
        "fetch.after_copy",  # they were copied, and are to be verified
        "role.set",  # a change of role is asked for
        "worker.park",
    }
)
POINTS = REFUSABLE | {
    "worker.start",
    "worker.weights",
    "worker.weights.copy",  # a part of a slab was copied into this worker's own
    "worker.assign",
    "worker.before_step",
    "worker.after_step",
    "worker.before_send",
    "worker.wake",
    "move.asked",  # room is reserved at the target, the source is to be told
    "move.offered",  # complete blocks are to be offered
    "move.before_prefilled",  # the source has stopped, the node is to be told
    "move.before_final",  # the node was told, the last offer is to be made
    "move.after_final",  # it was made
    "move.before_pulled",  # all has arrived, the node is to be told
    "move.after_pulled",  # it was told, the first step is to come
    "move.release",  # the source is to end its lease
    "move.resume",  # the source is to go on
    "role.changed",  # the role was taken, the node is to be told
}


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
            if rule.action == "refuse" and rule.point not in REFUSABLE:
                raise FaultPlanError(
                    f"nothing can be refused at {rule.point!r}; it can at {sorted(REFUSABLE)}"
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
