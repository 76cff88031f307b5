"""Which worker should take which role, and who should be in service: the automatic controller, a
brick for the slot `roles`.

Every `interval` seconds it predicts what has to be served (what arrived within `window` seconds,
and what waits) and what each division of the workers into prefill, decode and mixed ones would have
to bear (`appliance.policy.demand`). The *pressure* of a division is the worst of

* the level of the fullest workers, mixed ones shared out as well as possible,
* the predicted time to the first token over the tightest target of a live request,
* the predicted time per token over the tightest target: on a mixed worker prompts lengthen the
  steps of the decodes beside them, on a decode worker they do not.

Above 1 somebody's budget is infeasible. All divisions are compared; those that need fewer workers
to change are preferred. The workers of one change flip as one transaction:

* **up** when the pressure is above `high`: the division that lowers it most, if by at least the
  share `gain`; if a phase that gets workers from the other one is the fuller one even while they
  count for neither (so that a flip never just turns the imbalance round); and if the pressure saved
  within `horizon` seconds is worth more than the transition, during which they serve neither.
* **down** when the pressure with mixed workers alone has been below `low` for `hold` seconds, or
  has been no worse than the present one for so long: all that may go back to mixed. Otherwise
  nothing changes.
* only what was found `confirm` times in a row is done; a worker keeps a role for at least `dwell`
  seconds, and any two changes are at least `cooldown` seconds apart. So a worker never flips more
  often than 1 / dwell, and the node 1 / cooldown times a second, whatever the load does.

When no flip is predicted to suffice, workers are woken or added, and parked when they are no longer
needed (`appliance.policy.scaler`).

The rules are after public ones: the price of the transition as in MindIE-Motor (the imbalance must
keep its sign), distinct thresholds as in BlitzScale, feasibility of budgets as in xLLM-Service,
mixed as a third state as in TokenScale. HyperFlexis names the goal and not the rule."""

import math
from collections import deque
from collections.abc import Iterator, Mapping

import msgspec

from appliance.core.lifecycle import WorkerState
from appliance.core.slots import RolePlan, RolesSlot
from appliance.core.types import Role, WorkerId
from appliance.core.view import NodeView, Traffic, WorkerView
from appliance.policy.demand import Division, Load, Pressure, pressure
from appliance.policy.role_settings import RoleSettings
from appliance.policy.scaler import Scaler, Scaling, Signals, division_of
from appliance.policy.settings import read_settings

EFFORT = 0.02
"""Pressure that each worker more of a change must save."""
AT_ONCE = 4
"""Workers that may always change together; of a larger node half."""
CACHE_SECONDS = 60.0
"""How long it is remembered what share of the prompts was found in caches."""
FIT = 0
"""As `chunk`: the policy fits the prompts of a step into the slack of its decodes."""


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

    def __init__(self, settings: RoleSettings, *, chunk: int | None = None) -> None:
        """`chunk`: prompt tokens of a step beside decodes as the policy plans them, `FIT`, or None
        for full steps; the settings may say otherwise."""
        self._settings = settings
        words = settings.chunk
        known = {"auto": chunk, "full": None, "fit": FIT}
        self._chunk = known[words] if isinstance(words, str) else words
        self._scaler = Scaler(settings)
        self._seen: deque[tuple[float, Traffic]] = deque()
        self._due = self._computed = 0.0
        """Prompt tokens that should have been computed, and that were, fading."""
        self._open_before = 0
        self._flipped_at = float("-inf")
        self._low_since: float | None = None
        self._wanted: Division | None = None
        self._times = 0

    def __call__(self, view: NodeView, now: float) -> RolePlan:
        """The change to make now, or none and why."""
        workers = [each for each in view.workers.values() if each.state is WorkerState.READY]
        self._remember(view, workers, now)
        load = self._load(view, workers, now)
        division = division_of(workers)
        present = pressure(division, load)
        trigger, change = self._weigh(workers, division, present=present, load=load, now=now)
        scaling = self._scaler.step(
            view,
            load,
            self._signals(view, now),
            present=present,
            flip_to=None if change is None else change.after.worst,
            now=now,
        )
        home = not self._settings.mixed or all(each.role is Role.MIXED for each in workers)
        idle = load.prompt_rate == 0.0 and load.token_rate == 0.0
        resting = idle and home and self._scaler.is_resting(view)
        return self._plan(
            trigger, change, scaling, load=load, present=present, resting=resting, now=now
        )

    def _plan(
        self,
        trigger: str,
        change: Change | None,
        scaling: Scaling | None,
        *,
        load: Load,
        present: Pressure,
        resting: bool,
        now: float,
    ) -> RolePlan:
        prediction = {
            "prefill_load": load.prefill,
            "decode_load": load.decode,
            "pressure": present.worst,
        }
        cost = 0.0
        if change is not None:
            prediction["pressure_after"] = change.after.worst
            cost = change.cost
            self._flipped_at, self._wanted, self._times = now, None, 0
        elif scaling is not None:
            prediction["pressure_after"] = scaling.after
            prediction["workers_after"] = float(scaling.workers_after)
            cost, trigger = scaling.cost, scaling.trigger
        if change is not None or scaling is None:
            scaling = Scaling(trigger=trigger, workers_after=0, after=0.0, cost=0.0)
        return RolePlan(
            roles={} if change is None else change.roles,
            wake=scaling.wake,
            park=scaling.park,
            add=scaling.add,
            trigger=trigger,
            prediction=prediction,
            cost=cost,
            again=now + self._settings.interval,
            alarm=not resting,
        )

    # --- what there is to do ------------------------------------------------------------------

    def _remember(self, view: NodeView, workers: list[WorkerView], now: float) -> None:
        traffic, settings = view.traffic, self._settings
        here = view.waiting_tokens + sum(each.pending_tokens for each in workers)
        if self._seen:
            then, before = self._seen[-1]
            keep = math.exp((then - now) / CACHE_SECONDS)
            came = traffic.prompt_tokens - before.prompt_tokens - (here - self._open_before)
            self._due = keep * self._due + max(0, came)
            self._computed *= keep
            self._computed += traffic.prefilled_tokens - before.prefilled_tokens
        self._open_before = here
        self._seen.append((now, traffic))
        longest = max(settings.window, settings.attainment_window)
        while len(self._seen) > 2 and self._seen[1][0] <= now - longest:
            self._seen.popleft()

    def _before(self, now: float, seconds: float) -> tuple[float, Traffic]:
        """The counts at the beginning of the last `seconds`, and since when they are counted."""
        began, traffic = self._seen[0]
        for at, each in self._seen:
            if at > now - seconds:
                break
            began, traffic = at, each
        return max(began, now - seconds), traffic

    def _signals(self, view: NodeView, now: float) -> Signals:
        traffic = view.traffic
        _, before = self._before(now, self._settings.attainment_window)
        _, lately = self._before(now, self._settings.window)
        return Signals(
            met=traffic.met - before.met,
            missed=traffic.missed - before.missed,
            overdue=view.overdue(now),
            arrived=traffic.arrived - lately.arrived,
        )

    def _load(self, view: NodeView, workers: list[WorkerView], now: float) -> Load:
        began, before = self._before(now, self._settings.window)
        traffic, cost, window = view.traffic, view.cost, self._settings.window
        seconds = max(now - began, self._settings.interval)
        arrived = traffic.arrived - before.arrived
        computed = min(1.0, self._computed / self._due) if self._due >= 1.0 else 1.0
        tokens = (traffic.prompt_tokens - before.prompt_tokens) * computed
        pending = float(sum(each.pending_tokens for each in workers))
        pending += computed * view.waiting_tokens
        decodes = sum(each.decodes for each in workers)
        context = sum(each.context_tokens for each in workers)
        expected = traffic.expected_tokens - before.expected_tokens
        prompt = tokens / arrived if arrived else pending / max(1, view.num_waiting)
        answer = expected / arrived if arrived else cost.answer_tokens
        known = cost.steps.coefficients
        most = max((each.max_batch_tokens for each in workers), default=1)
        load = Load(
            prompt_rate=tokens / seconds + pending / window,
            token_rate=expected / seconds,
            prompt_tokens=max(1.0, prompt),
            context_tokens=context / decodes if decodes else prompt + answer / 2,
            answer_tokens=answer,
            backlog_tokens=pending,
            planes=known.planes,
            tail=cost.tail,
            max_batch_tokens=most,
            max_num_seqs=max((each.max_num_seqs for each in workers), default=1),
            chunk=most if self._chunk is None else min(self._chunk, most),
            targets=view.targets,
        )
        here = decodes / load.step(0.0, load.full_batch)
        return msgspec.structs.replace(load, token_rate=max(load.token_rate, here))

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
        if not self._settings.flips:
            return "roles are fixed", None
        if len(workers) < 2:
            return "fewer than two workers are ready", None
        if load.prompt_rate == 0.0 and load.token_rate == 0.0 and division.mixed == len(workers):
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
        mixed = pressure(all_mixed, load).worst
        calm = mixed < settings.low or mixed <= present.worst
        if not settings.mixed or division == all_mixed or not calm:
            self._low_since = None
            return None, "the roles suffice"
        if self._low_since is None:
            self._low_since = now
        if now - self._low_since < settings.hold:
            return None, "mixed workers would do, for a short time"
        back = self._back(workers, load=load, now=now)
        if back is None:
            return None, "mixed workers would do, but roles have just changed"
        return back, "mixed workers do as well"

    def _divisions(self, total: int) -> Iterator[Division]:
        """All that are allowed."""
        for prefill in range(total + 1):
            for decode in range(total + 1 - prefill):
                mixed = total - prefill - decode
                if not prefill + mixed:
                    continue  # nobody would be meant for prompts
                if self._settings.mixed or (not mixed and prefill and decode):
                    yield Division(prefill=prefill, decode=decode, mixed=mixed)

    def _change(
        self, workers: list[WorkerView], wanted: Division, *, load: Load, now: float
    ) -> Change | None:
        """How to get there: who has the least to move changes first. None: it is as it is, some
        must keep their role a while yet, or the imbalance would only turn round."""
        present = division_of(workers)
        stay = present.common(wanted)
        if wanted == present or present.total - stay.total > max(AT_ONCE, present.total // 2):
            return None
        if not _keeps_sign(present, wanted, load):
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
        after = division_of([each for each in workers if each not in free])
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


def role_controller(settings: Mapping[str, object], *, chunk: int | None = None) -> RolesSlot:
    """A controller of its own; `chunk` as for `RoleController`. Raises `PolicySettingsError` naming
    a setting that it does not have."""
    return RoleController(read_settings(RoleSettings, settings, policy="roles"), chunk=chunk)


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
