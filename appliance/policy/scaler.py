"""How many workers should be in service: the half of the controller that wakes, adds and parks.

More are asked for when, `out_confirm` times in a row, the predicted pressure is above `high`
(demand says that there are too few), the attainment of the last answers is below its bound, or
requests wait that can no longer start in time; unless the budgets are such that no number of
workers could meet them. Order of action: a flip that is predicted to suffice comes first
(`appliance.policy.role_control` finds it), then parked workers are woken, as many as are predicted
to be needed, and only when none is left spare ones are started, if the pressure saved within the
horizon is worth the time they take.

One is parked when for `in_hold` seconds the others alone have been predicted to serve all of what
came, with room to spare, in time and in memory, and nothing was late. Between the two thresholds
nothing changes. Actions of one kind are at least their cool-down apart, so their number is bounded
whatever the load does.

The price is counted in instance-seconds, those of loading, waking and draining included. The worker
that changes counts for neither side while it does."""

import msgspec

from appliance.core.lifecycle import WorkerState
from appliance.core.types import Role, WorkerId
from appliance.core.view import NodeView, WorkerView
from appliance.policy.demand import Division, Load, Pressure, pressure
from appliance.policy.role_settings import RoleSettings

MANY = 15
"""Times the workers there are: what they cannot do, more workers do not help."""
MEMORY = 0.8
"""Share of the KV memory of those who stay that may be in use when one is parked."""


class Signals(msgspec.Struct, frozen=True, kw_only=True):
    """What was observed, beside the load: the answers of the last seconds within and outside of
    their targets, requests that wait and can no longer start in time, and arrivals."""

    met: int
    missed: int
    overdue: int
    arrived: int

    def attainment(self, enough: int) -> float | None:
        """Share within targets; None while too few answers ended."""
        total = self.met + self.missed
        return self.met / total if total >= enough else None

    @property
    def infeasible(self) -> float:
        """Share of the requests that can no longer start in time."""
        return self.overdue / max(1, self.arrived, self.overdue)


class Scaling(msgspec.Struct, frozen=True, kw_only=True):
    """Who should come and go."""

    wake: tuple[WorkerId, ...] = ()
    park: tuple[WorkerId, ...] = ()
    add: int = 0
    trigger: str
    workers_after: int
    after: float
    """Predicted pressure."""
    cost: float
    """Instance-seconds of the transition."""


class Scaler:
    """State: since when more, or fewer, workers have been asked for, and the last actions."""

    def __init__(self, settings: RoleSettings) -> None:
        self._settings = settings
        self._floor: int | None = None
        self._is_on = False
        self._asked = 0
        self._calm_since: float | None = None
        self._woken_at = self._added_at = self._parked_at = float("-inf")

    def is_resting(self, view: NodeView) -> bool:
        """Nobody is left that could be parked."""
        return not self._is_on or len(_serving(view)) <= (self._floor or 1)

    def step(
        self,
        view: NodeView,
        load: Load,
        signals: Signals,
        *,
        present: Pressure,
        flip_to: float | None,
        now: float,
    ) -> Scaling | None:
        """What to do now. `flip_to` is the pressure after the flip that is being begun, if any: one
        change at a time, so nothing else is done then."""
        self._note_staff(view)
        if not self._is_on:
            return None
        serving = _serving(view)
        staying = [each for each in serving if not each.parked]
        words = self._wanted(load, signals, present, division=division_of(staying))
        self._asked = self._asked + 1 if words else 0
        if words:
            self._calm_since = None
        if flip_to is not None:
            return None
        if words:
            if self._asked < self._settings.out_confirm:
                return None
            return self._out(view, load, serving, present=present, words=words, now=now)
        return self._in(view, load, signals, serving, now=now)

    def _note_staff(self, view: NodeView) -> None:
        if self._floor is not None:
            return
        settings, workers = self._settings, view.workers.values()
        begun = sum(not each.parked for each in workers)
        self._is_on = settings.scale == "on" or (
            settings.scale == "auto" and (begun < len(workers) or view.num_spares > 0)
        )
        default = 1 if settings.scale == "on" else begun
        self._floor = max(1, settings.min_workers or default)

    # --- more ---------------------------------------------------------------------------------

    def _wanted(
        self, load: Load, signals: Signals, present: Pressure, *, division: Division
    ) -> str:
        """Why more workers are asked for; empty if they are not."""
        settings = self._settings
        if not division.total:
            busy = load.prompt_rate + load.token_rate > 0.0
            return "no worker is ready" if busy else ""
        level = max(present.prefill, present.decode)
        many = pressure(division.plus(MANY * division.total), load).worst
        if many > settings.high and level <= settings.high:
            return ""  # budgets that no number of workers can meet
        if present.worst > settings.high:
            return f"{present.words()} is the bottleneck of all workers in service"
        if level < settings.out_above:
            return ""
        if signals.infeasible > settings.infeasible:
            return "requests wait that can no longer start in time"
        share = signals.attainment(settings.enough)
        if share is not None and share < settings.attainment:
            return "too many answers miss their targets"
        return ""

    def _out(
        self,
        view: NodeView,
        load: Load,
        serving: list[WorkerView],
        *,
        present: Pressure,
        words: str,
        now: float,
    ) -> Scaling | None:
        settings = self._settings
        room = (settings.max_workers or len(view.workers) + view.num_spares) - len(serving)
        back = [each for each in serving if each.parked]
        parked = [
            each
            for each in view.workers.values()
            if each.parked and each.on_call and each.state is WorkerState.PARKED
        ]
        free = [each for each in back if each.on_call] + sorted(parked, key=lambda each: each.id)
        room += len(back)
        starting = any(_is_coming(each) for each in view.workers.values())
        if free and room > 0 and now - self._woken_at >= settings.wake_cooldown:
            serve = [each for each in serving if not each.parked]
            count = self._needed(load, division_of(serve), most=min(len(free), room))
            chosen = free[:count]
            self._woken_at, self._asked = now, 0
            after = pressure(division_of([*serve, *chosen]), load).worst
            return Scaling(
                wake=tuple(each.id for each in chosen),
                trigger=words,
                workers_after=len(serve) + count,
                after=after,
                cost=count * settings.wake_seconds,
            )
        if free or starting or room <= 0 or not view.num_spares:
            return None
        if now - self._added_at < settings.add_cooldown:
            return None
        division = division_of(serving)
        count = self._needed(load, division, most=min(view.num_spares, room))
        after = pressure(division.plus(count), load).worst
        saved = (present.worst - after) * len(serving)
        if saved * 10 * settings.horizon < count * settings.add_seconds:
            return None
        self._added_at, self._asked = now, 0
        return Scaling(
            add=count,
            trigger=words,
            workers_after=len(serving) + count,
            after=after,
            cost=count * settings.add_seconds,
        )

    def _needed(self, load: Load, division: Division, *, most: int) -> int:
        """How many more mixed workers bring the pressure down far enough; at least one."""
        for count in range(1, most):
            if pressure(division.plus(count), load).worst <= self._settings.out_to:
                return count
        return most

    # --- fewer --------------------------------------------------------------------------------

    def _in(
        self,
        view: NodeView,
        load: Load,
        signals: Signals,
        serving: list[WorkerView],
        *,
        now: float,
    ) -> Scaling | None:
        settings = self._settings
        chosen = self._spare(view, load, signals, serving)
        if chosen is None:
            self._calm_since = None
            return None
        if self._calm_since is None:
            self._calm_since = now
        worker, after = chosen
        if now - self._calm_since < settings.in_hold:
            return None
        if now - self._parked_at < settings.park_cooldown:
            return None
        self._parked_at, self._calm_since = now, None
        return Scaling(
            park=(worker.id,),
            trigger="fewer workers have sufficed for a while",
            workers_after=len(serving) - 1,
            after=after,
            cost=settings.flip_seconds + worker.assigned * settings.move_seconds,
        )

    def _spare(
        self, view: NodeView, load: Load, signals: Signals, serving: list[WorkerView]
    ) -> tuple[WorkerView, float] | None:
        """Whom the others could do without, and their pressure then; None: nobody."""
        settings = self._settings
        in_motion = any(
            _is_coming(each)
            or each.next_role is not None
            or each.state in (WorkerState.DRAINING, WorkerState.FLIPPING)
            for each in view.workers.values()
        )
        if in_motion or len(serving) <= (self._floor or 1) or signals.overdue:
            return None
        share = signals.attainment(settings.enough)
        if share is not None and share < settings.attainment:
            return None
        best: tuple[float, int, int, WorkerView] | None = None
        for each in serving:
            if each.reserved:
                continue
            others = [other for other in serving if other is not each]
            if not _fits(others, each) or (not settings.mixed and _leaves_a_gap(others, each)):
                continue
            after = pressure(division_of(others), load).worst
            key = (after, each.assigned, -each.id, each)
            if best is None or key[:3] < best[:3]:
                best = key
        if best is None or best[0] > settings.in_below:
            return None
        return best[3], best[0]


def division_of(workers: list[WorkerView]) -> Division:
    """Their roles, counted."""
    roles = [each.role for each in workers]
    return Division(
        prefill=roles.count(Role.PREFILL),
        decode=roles.count(Role.DECODE),
        mixed=roles.count(Role.MIXED),
    )


def _serving(view: NodeView) -> list[WorkerView]:
    """Those in service, the ones that wind down included: they could be called back."""
    states = (WorkerState.READY, WorkerState.DRAINING, WorkerState.FLIPPING)
    return [each for each in view.workers.values() if each.state in states]


def _leaves_a_gap(others: list[WorkerView], leaving: WorkerView) -> bool:
    """Whether it is the last one for its phase."""
    return all(other.role is not leaving.role and other.role is not Role.MIXED for other in others)


def _is_coming(worker: WorkerView) -> bool:
    return not worker.parked and worker.state in (WorkerState.STARTING, WorkerState.DEAD)


def _fits(others: list[WorkerView], leaving: WorkerView) -> bool:
    """Whether those who stay have memory and places for what the other one has."""
    total = sum(each.load.blocks_total for each in others)
    held = sum(each.load.blocks_total - each.load.blocks_free for each in (*others, leaving))
    places = sum(each.max_num_seqs for each in others)
    here = sum(each.assigned + each.incoming for each in (*others, leaving))
    return held <= MEMORY * total and here <= MEMORY * places
