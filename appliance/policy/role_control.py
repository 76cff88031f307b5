"""Which worker should take which role: the automatic controller, a brick for the slot `roles`.

Every `interval` seconds it predicts the load of each phase in *workers kept busy*: what arrived
within `window` seconds, and what waits, times what the cost model has learnt (prefill seconds per
token, seconds of a decode step, length of an answer). The *pressure* of a division of the workers
into prefill, decode and mixed ones is the worst of

* the load of the fullest phase, mixed workers shared out as well as possible,
* the predicted time to the first token over the tightest target of a live request,
* the predicted time per token over the tightest target: on a mixed worker prompts lengthen the
  steps of the decodes beside them, on a decode worker they do not. Not the mean decides but what
  nine answers of ten stay below: few long steps spoil a short answer.

Above 1 somebody's budget is infeasible. All divisions are compared; those that need fewer workers
to change are preferred. The workers of one change flip as one transaction:

* **up** when the pressure is above `high`: the division that lowers it most, if by at least the
  share `gain`; if a phase that gets workers from the other one is the fuller one even while they
  count for neither (so that a flip never just turns the imbalance round); and if the pressure saved
  within `horizon` seconds is worth more than the transition, during which they serve neither.
* **down** when the pressure with mixed workers alone has been below `low` for `hold` seconds: all
  that may go back to mixed. Between `low` and `high` nothing changes.
* only what was found `confirm` times in a row is done; a worker keeps a role for at least `dwell`
  seconds, and any two changes are at least `cooldown` seconds apart. So a worker never flips more
  often than 1 / dwell, and the node 1 / cooldown times a second, whatever the load does.

The rules are after public ones: the price of the transition as in MindIE-Motor (the imbalance must
keep its sign), distinct thresholds as in BlitzScale, feasibility of budgets as in xLLM-Service,
mixed as a third state as in TokenScale. HyperFlexis names the goal and not the rule."""

import math
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Annotated

import msgspec

from appliance.core.lifecycle import WorkerState
from appliance.core.slots import RolePlan, RolesSlot
from appliance.core.types import Role, WorkerId
from appliance.core.view import NodeView, Targets, Traffic, WorkerView
from appliance.policy.settings import read_settings

TAIL = 1.28
"""Standard deviations above the mean below which nine of ten lie."""
EFFORT = 0.02
"""Pressure that each worker more of a change must save."""

Seconds = Annotated[float, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(gt=0, le=10)]


class RoleSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds, and shares of a worker's time (pressure)."""

    interval: Annotated[float, msgspec.Meta(gt=0)] = 0.5
    window: Annotated[float, msgspec.Meta(gt=0)] = 5.0
    high: Share = 0.9
    low: Share = 0.45
    gain: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.15
    confirm: Annotated[int, msgspec.Meta(ge=1)] = 2
    dwell: Seconds = 10.0
    cooldown: Seconds = 3.0
    hold: Seconds = 10.0
    horizon: Annotated[float, msgspec.Meta(gt=0)] = 10.0
    flip_seconds: Seconds = 0.05
    """What a change of role costs a worker beside the sequences that must move."""
    move_seconds: Seconds = 0.01
    """What each of those costs it."""
    mixed: bool = True
    """Mixed workers are allowed; without them at least one worker of each role stays."""


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What has to be served, predicted."""

    prefill: float
    """Workers that prompts keep busy."""
    decode: float
    """Workers whose batches answers fill."""
    prompt_seconds: float
    """Computing one prompt."""
    backlog_seconds: float
    """Computing the prompts that are here."""
    step_seconds: float
    """A step without prompts."""
    chunk_seconds: float
    """What a full chunk of a prompt adds to a step."""
    run: float
    """Steps in a row that a prompt lengthens."""
    answer_tokens: float
    targets: Targets


class Division(msgspec.Struct, frozen=True, kw_only=True):
    """How many workers have which role."""

    prefill: int
    decode: int
    mixed: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.prefill + self.decode + self.mixed

    def count(self, role: Role) -> int:
        """Those of one role."""
        return {
            Role.PREFILL: self.prefill,
            Role.DECODE: self.decode,
            Role.MIXED: self.mixed,
        }[role]

    def common(self, other: "Division") -> "Division":
        """Workers that need not change to get from one to the other."""
        return Division(
            prefill=min(self.prefill, other.prefill),
            decode=min(self.decode, other.decode),
            mixed=min(self.mixed, other.mixed),
        )

    def served(self) -> "Division":
        """As it works: a phase that no worker prefers is served by the others as if mixed."""
        if not self.mixed and not (self.prefill and self.decode):
            return Division(prefill=0, decode=0, mixed=self.total)
        return self


class Pressure(msgspec.Struct, frozen=True, kw_only=True):
    """What a division would have to bear; shares of 1."""

    worst: float
    prefill: float
    decode: float
    first_token: float
    per_token: float

    def words(self) -> str:
        """Which of them is the worst."""
        if self.worst == self.per_token and self.per_token > max(self.prefill, self.decode):
            return "time per token"
        if self.worst == self.first_token and self.first_token > max(self.prefill, self.decode):
            return "time to first token"
        return "prefill" if self.prefill >= self.decode else "decode"


def pressure(division: Division, load: Load) -> Pressure:
    """What this division of workers would have to bear."""
    shape = division.served()
    total = shape.total
    if not total:
        return Pressure(worst=0.0, prefill=0.0, decode=0.0, first_token=0.0, per_token=0.0)
    even = (load.prefill + load.decode) / total
    prefill = load.prefill / max(1, shape.prefill + shape.mixed)
    decode = load.decode / max(1, shape.decode + shape.mixed)
    level = max(even, prefill, decode)
    beside = max(0.0, load.prefill - level * shape.prefill) / shape.mixed if shape.mixed else 0.0
    tpot = max(load.step_seconds * max(decode, 1.0), _tail_gap(min(beside, 0.95), load))
    busy = min(max(prefill, even if shape.mixed else 0.0), 0.95)
    ttft = load.prompt_seconds / (1 - busy)
    ttft += load.backlog_seconds / max(1, shape.prefill + shape.mixed)
    first = ttft / load.targets.ttft if load.targets.ttft else 0.0
    each = tpot / load.targets.tpot if load.targets.tpot else 0.0
    return Pressure(
        worst=max(level, first, each),
        prefill=max(prefill, even if shape.mixed else 0.0),
        decode=max(decode, even if shape.mixed else 0.0),
        first_token=first,
        per_token=each,
    )


def _tail_gap(beside: float, load: Load) -> float:
    """Mean gap between the tokens of an answer that nine of ten stay below, on a worker that spends
    the share `beside` of its time on prompts.

    A step is lengthened by a chunk with probability q, and then so are about `run` in a row; the
    mean of the gaps of an answer varies accordingly (normal approximation)."""
    if beside <= 0.0 or load.chunk_seconds <= 0.0:
        return load.step_seconds
    q = min(1.0, beside * load.step_seconds / ((1 - beside) * load.chunk_seconds))
    spread = math.sqrt(q * (1 - q) * max(1.0, load.run) / max(1.0, load.answer_tokens - 1))
    return load.step_seconds + load.chunk_seconds * min(1.0, q + TAIL * spread)


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """Some workers take other roles."""

    roles: dict[WorkerId, Role]
    division: Division
    after: Pressure
    cost: float

    @property
    def rank(self) -> tuple[float, float]:
        """The best change has the least; a worker more must be worth it."""
        return (self.after.worst + EFFORT * len(self.roles), self.cost)


class RoleController:
    """The slot `roles`. What it remembers: what came lately, and what it wanted lately."""

    def __init__(self, settings: RoleSettings) -> None:
        self._settings = settings
        self._seen: deque[tuple[float, Traffic]] = deque()
        self._flipped_at = float("-inf")
        self._low_since: float | None = None
        self._wanted: Division | None = None
        self._times = 0

    def __call__(self, view: NodeView, now: float) -> RolePlan:
        """The change to make now, or none and why."""
        workers = [each for each in view.workers.values() if each.state is WorkerState.READY]
        self._remember(view, now)
        load = self._load(view, workers, now)
        division = _division(workers)
        present = pressure(division, load)
        trigger, change = self._weigh(workers, division, present=present, load=load, now=now)
        home = not self._settings.mixed or all(each.role is Role.MIXED for each in workers)
        idle = load.prefill == 0.0 and load.decode == 0.0
        prediction = {
            "prefill_load": load.prefill,
            "decode_load": load.decode,
            "pressure": present.worst,
        }
        if change is not None:
            prediction["pressure_after"] = change.after.worst
            self._flipped_at, self._wanted, self._times = now, None, 0
        return RolePlan(
            roles={} if change is None else change.roles,
            trigger=trigger,
            prediction=prediction,
            cost=0.0 if change is None else change.cost,
            again=now + self._settings.interval,
            alarm=not (idle and home),
        )

    # --- what there is to do ------------------------------------------------------------------

    def _remember(self, view: NodeView, now: float) -> None:
        self._seen.append((now, view.traffic))
        while len(self._seen) > 2 and self._seen[1][0] <= now - self._settings.window:
            self._seen.popleft()

    def _load(self, view: NodeView, workers: list[WorkerView], now: float) -> Load:
        began, before = self._seen[0]
        traffic, cost, window = view.traffic, view.cost, self._settings.window
        seconds = max(now - began, self._settings.interval)
        arrived = traffic.arrived - before.arrived
        tokens = traffic.prompt_tokens - before.prompt_tokens
        pending = view.waiting_tokens + sum(each.pending_tokens for each in workers)
        backlog = cost.prefill_seconds(pending)
        slots = max((each.max_num_seqs for each in workers), default=1)
        step = cost.decode_step_seconds
        here = sum(each.assigned for each in workers)
        prompt = tokens / max(1, arrived)
        chunk = max((each.max_batch_tokens for each in workers), default=1)
        coming = arrived / seconds * cost.answer_tokens * step
        return Load(
            prefill=cost.prefill_seconds(tokens) / seconds + backlog / window,
            decode=max(coming, here - _prompts(workers)) / slots,
            prompt_seconds=cost.prefill_seconds(1) * prompt,
            backlog_seconds=backlog,
            step_seconds=step,
            chunk_seconds=cost.prefill_seconds(1) * min(chunk, prompt),
            run=prompt / chunk,
            answer_tokens=cost.answer_tokens,
            targets=view.targets,
        )

    # --- what to do about it ------------------------------------------------------------------

    def _weigh(
        self,
        workers: list[WorkerView],
        division: Division,
        *,
        present: Pressure,
        load: Load,
        now: float,
    ) -> tuple[str, Change | None]:
        """Words, and the change to make now."""
        if len(workers) < 2:
            return "fewer than two workers are ready", None
        if load.prefill == 0.0 and load.decode == 0.0 and division.mixed == len(workers):
            return "idle", None
        best, words = self._best(workers, division, present=present, load=load, now=now)
        if best is None:
            self._wanted, self._times = None, 0
            return words, None
        same = self._wanted == best.division
        self._wanted, self._times = best.division, self._times + 1 if same else 1
        if self._times < self._settings.confirm:
            return f"{words}, to be confirmed", None
        if now - self._flipped_at < self._settings.cooldown:
            return f"{words}, but the last change was just now", None
        return words, best

    def _best(
        self,
        workers: list[WorkerView],
        division: Division,
        *,
        present: Pressure,
        load: Load,
        now: float,
    ) -> tuple[Change | None, str]:
        settings, total = self._settings, len(workers)
        if present.worst > settings.high:
            self._low_since = None
            bottleneck = f"{present.words()} is the bottleneck"
            wise = [
                change
                for wanted in self._divisions(total)
                if (change := self._change(workers, wanted, load=load, now=now)) is not None
                and self._pays(change, present)
            ]
            if wise:
                return min(wise, key=lambda each: each.rank), bottleneck
            return None, f"{bottleneck}, and no change of roles would pay"
        all_mixed = Division(prefill=0, decode=0, mixed=total)
        calm = pressure(all_mixed, load).worst < settings.low
        if not settings.mixed or division == all_mixed or not calm:
            self._low_since = None
            return None, "the roles suffice"
        if self._low_since is None:
            self._low_since = now
        if now - self._low_since < settings.hold:
            return None, "the load is low, for a short time"
        back = self._back(workers, load=load, now=now)
        if back is None:
            return None, "the load is low, but roles have just changed"
        return back, "the load is low: mixed workers do"

    def _divisions(self, total: int) -> Iterator[Division]:
        """All that are allowed."""
        for prefill in range(total + 1):
            for decode in range(total + 1 - prefill):
                mixed = total - prefill - decode
                if self._settings.mixed or (not mixed and prefill and decode):
                    yield Division(prefill=prefill, decode=decode, mixed=mixed)

    def _change(
        self, workers: list[WorkerView], wanted: Division, *, load: Load, now: float
    ) -> Change | None:
        """How to get there: who has the least to move changes first. None: it is as it is, some
        must keep their role a while yet, or the imbalance would only turn round."""
        present = _division(workers)
        stay = present.common(wanted)
        if wanted == present or not _keeps_sign(present, wanted, load):
            return None
        lacks = [role for role in Role for _ in range(wanted.count(role) - stay.count(role))]
        free: list[WorkerView] = []
        for role in Role:
            surplus = present.count(role) - stay.count(role)
            able = [each for each in workers if each.role is role and self._may_change(each, now)]
            if len(able) < surplus:
                return None
            free += sorted(able, key=lambda each: (each.assigned, each.id))[:surplus]
        free.sort(key=lambda each: (each.assigned, each.id))  # who has little becomes prefill
        roles = {each.id: role for each, role in zip(free, lacks, strict=True)}
        return self._priced(free, roles, wanted, load=load)

    def _back(self, workers: list[WorkerView], *, load: Load, now: float) -> Change | None:
        """All that may go back to mixed."""
        free = [each for each in workers if each.role is not Role.MIXED]
        free = [each for each in free if self._may_change(each, now)]
        if not free:
            return None
        roles = {each.id: Role.MIXED for each in free}
        after = _division([each for each in workers if each not in free])
        wanted = Division(prefill=after.prefill, decode=after.decode, mixed=after.mixed + len(free))
        return self._priced(free, roles, wanted, load=load)

    def _may_change(self, worker: WorkerView, now: float) -> bool:
        return now - worker.role_since >= self._settings.dwell and not worker.reserved

    def _priced(
        self,
        workers: list[WorkerView],
        roles: dict[WorkerId, Role],
        wanted: Division,
        *,
        load: Load,
    ) -> Change:
        settings = self._settings
        cost = 0.0
        for each in workers:
            moved = each.assigned if roles[each.id] is Role.PREFILL else 0
            cost += settings.flip_seconds + moved * settings.move_seconds
        return Change(roles=roles, division=wanted, after=pressure(wanted, load), cost=cost)

    def _pays(self, change: Change, present: Pressure) -> bool:
        settings = self._settings
        saved = present.worst - change.after.worst
        if saved < settings.gain * present.worst:
            return False
        return saved * settings.horizon > change.cost * max(1.0, present.worst)


def role_controller(settings: Mapping[str, object]) -> RolesSlot:
    """A controller of its own. Raises `PolicySettingsError` naming a setting that it does not
    have."""
    return RoleController(read_settings(RoleSettings, settings, policy="roles"))


def _division(workers: list[WorkerView]) -> Division:
    roles = [each.role for each in workers]
    return Division(
        prefill=roles.count(Role.PREFILL),
        decode=roles.count(Role.DECODE),
        mixed=roles.count(Role.MIXED),
    )


def _prompts(workers: list[WorkerView]) -> int:
    """Requests at workers that have no token yet, roughly."""
    return sum(min(each.assigned, each.load.queued) for each in workers)


def _keeps_sign(present: Division, wanted: Division, load: Load) -> bool:
    """Whether the phase that gets workers of the other one is the fuller one while they count for
    neither. A change that takes from neither is always right."""
    stay = present.common(wanted)
    to_prefill = wanted.prefill > present.prefill and wanted.decode < present.decode
    to_decode = wanted.decode > present.decode and wanted.prefill < present.prefill
    if not to_prefill and not to_decode:
        return True
    prefill = load.prefill / max(stay.prefill + stay.mixed, 1e-9)
    decode = load.decode / max(stay.decode + stay.mixed, 1e-9)
    return prefill > decode if to_prefill else decode > prefill
