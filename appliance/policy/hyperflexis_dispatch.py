"""HyperFlexis at the node: one queue, late binding, and no worker that gets more than its budgets
bear.

A request leaves the queue only for a worker where, with it, four things hold: its first token is in
time, and so are those of the prompts that would wait behind it (*TTFT*); a step of all decodes, the
newcomer among them, is within the tightest budget per token of both (*TPOT*); less than about two
steps of more urgent prompts are before it (*chunk*: whatever more would only wait there, where it
can be ordered no longer); and its prompt and a likely answer fit beside what is there (*memory*).

What cannot be in time even if it began now is demoted (or refused, if its class says so). Best
effort goes where there is little to do, and one at a time to every worker whatever there is."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from appliance.core.slots import Late
from appliance.core.types import OnMiss, Phase, Request, RequestId, WorkerId
from appliance.core.view import NodeView
from appliance.policy.hyperflexis_budget import HyperflexisSettings, first_token_due
from appliance.policy.hyperflexis_decode import place_decode
from appliance.policy.hyperflexis_queue import Entry, Lanes
from appliance.policy.hyperflexis_workers import Estimate, Workers

PLAN_EVERY = 0.025
"""Seconds between two looks at whether all that waits can be in time."""
TICK = 0.025
"""While something is held, the node looks again after so many seconds at most."""
SCAN = 4
"""Of the most urgent ones, how many are looked at for one that some worker may take."""
BATCH = 2
"""Requests of a lane that `order` names at a time; it is asked again when one was placed."""
GRACE = -0.03
"""Share of the time that is left by which a first token may be predicted late."""
RELEARN = 1.0
"""Seconds after which lengths of answers are looked up again."""
HOPELESS = 0.5
"""A budget per token below this share of the step of an answer that decodes alone is kept by
nobody; the rest of the way the step model may be wrong."""
PICKY = 8
"""Answers side by side that a budget per token must allow: a worker so empty that it keeps a
tighter one is not waited for."""
FORGETTING = 0.02
"""Weight of the newest fate in a class's share of those given up."""


class Answer(NamedTuple):
    """What an answer of a class is planned to be, until it is looked up again."""

    tokens: int
    seconds: float
    until: float


class HyperflexisDispatch:
    """The slots `late`, `order`, `place` and `wakeup`. What it remembers it hears from the view."""

    def __init__(self, settings: HyperflexisSettings) -> None:
        self._settings = settings
        self._view: NodeView | None = None
        self._begin()

    def _begin(self) -> None:
        self._lanes = Lanes()
        self._workers = Workers(self._settings, self._urgency)
        self._estimates: Mapping[WorkerId, Estimate] = {}
        """Of those that get prompts."""
        self._mark = 0
        self._is_fresh = False
        """Heard in `late`, which is asked right before the first `order`."""
        self._plan_at = -math.inf
        self._given_up: dict[str, float] = {}
        self._answers: dict[str, Answer] = {}

    # --- slots ----------------------------------------------------------------------------------

    def late(self, view: NodeView, now: float) -> Sequence[Late]:
        """Who cannot be in time even if it began now."""
        self._hear(view, now)
        self._is_fresh = True
        next_start = self._lanes.next_start
        if next_start is None or next_start > now or self._settings.late == "keep":
            return ()
        if not self._settings.priority:
            return ()
        found: list[Late] = []
        for entry in self._lanes.overdue(now):
            late = self._too_late(view, entry, now)
            if late is not None:
                found.append(late)
        return found

    def order(self, queue: Sequence[Request], view: NodeView, now: float) -> Sequence[Request]:
        """The next few that some worker may take; none while all have enough to do."""
        if not self._is_fresh:
            self._hear(view, now)
        self._is_fresh = False
        if not self._settings.priority:
            return queue[:BATCH]
        if now >= self._plan_at and self._settings.overload != "none":
            self._plan(now)
        lanes = self._lanes
        head = lanes.head
        estimates = list(self._estimates.values())
        chosen = self._aged(now)
        if head is not None and any(each.is_open(head.key) for each in estimates):
            heads = lanes.first("main", SCAN)
            for index, entry in enumerate(heads):
                if self._best(entry, self._estimates, now) is not None:
                    chosen += heads[index : index + BATCH]
                    return [each.request for each in chosen]
        if any(each.is_underfull for each in estimates):
            chosen += [*lanes.first("main", BATCH), *lanes.first("shed", BATCH)]
            for entry in lanes.first("lane", SCAN):
                if self._best_effort(entry, self._estimates, now) is not None:
                    chosen.append(entry)
                    break
        return [each.request for each in dict.fromkeys(chosen)]

    def _aged(self, now: float) -> list[Entry]:
        """The oldest of best effort if its turn has come and some worker has none of them: it is
        offered before all others, since a full worker has room for the first only."""
        for entry in self._lanes.first("lane", 1):
            if self._has_turn(entry, now) and any(
                not each.num_late and not each.is_full for each in self._estimates.values()
            ):
                return [entry]
        return []

    def place(self, view: NodeView, request: Request, phase: Phase, now: float) -> WorkerId | None:
        """The best worker where all budgets hold; None: it waits."""
        if phase is Phase.DECODE:
            willing = view.willing(request, now, phase)
            return place_decode(view, request, willing, self._settings) if willing else None
        self._hear(view, now)
        entry = self._lanes.entries.get(request.id)
        if entry is None:
            return None
        best = self._choose(view, entry, self._estimates, now)
        if best is None:
            return None
        willing = view.willing(request, now, phase)
        if best in willing:
            return best
        known = self._workers.estimates
        return self._choose(view, entry, {id_: known[id_] for id_ in willing}, now)

    def wakeup(self, view: NodeView, now: float) -> float | None:
        """While something waits: soon, at a time that stays the same until it has come."""
        del view
        if not len(self._lanes):
            return None
        return (math.floor(now / TICK) + 1) * TICK

    # --- the queue ------------------------------------------------------------------------------

    def _hear(self, view: NodeView, now: float) -> None:
        """What changed since the last time. Another node is another story."""
        if view is not self._view:
            self._begin()
            self._view = view
        self._workers.refresh(view, now)
        self._estimates = self._workers.able
        changes = view.queue_changes(self._mark)
        if changes.mark == self._mark:
            return
        self._mark = changes.mark
        if changes.whole:
            self._lanes = Lanes()
        for request, came in changes.changes:
            if came:
                self._came(view, request, now)
            else:
                self._left(request.id)

    def _came(self, view: NodeView, request: Request, now: float) -> None:
        self._learn_answer(view, request.slo.class_name, now)
        tokens = self._tokens(view, request)
        key, due = self._urgency(request, tokens, self._workers.serial)
        start_by = due - tokens / self._workers.serial
        entry = Entry(request, tokens=tokens, due=due, start_by=start_by, key=key)
        if entry.tpot is not None and entry.tpot < view.cost.steps.tail_seconds(decodes=PICKY):
            if self._is_hopeless(view, request):
                entry.start_by = min(start_by, now - TICK)  # looked at as one that is late
            entry.tpot = None
        if view.emitted(request.id) > 0:  # its worker died: it goes on as soon as possible
            entry.begun = True
            entry.key, entry.due, entry.start_by = request.arrived, math.inf, math.inf
        if view.is_demoted(request.id):
            entry.lane = "lane"
        self._lanes.add(entry)

    def _learn_answer(self, view: NodeView, class_name: str, now: float) -> None:
        known = self._answers.get(class_name)
        if known is not None and now < known.until:
            return
        cost = view.cost
        tokens = int(cost.lengths.at(class_name, self._settings.length_quantile))
        alone = self._lone(view)
        steps = [each.pace.decode or alone for each in self._estimates.values()]
        seconds = tokens * min(steps, default=alone)
        self._answers[class_name] = Answer(tokens, seconds, now + RELEARN)

    def _left(self, request_id: RequestId) -> None:
        entry = self._lanes.remove(request_id)
        if entry is not None and entry.lane != "lane":
            self._note(entry.name, given_up=False)

    def _note(self, class_name: str, *, given_up: bool) -> None:
        share = self._given_up.get(class_name, 0.0)
        self._given_up[class_name] = share + FORGETTING * ((1.0 if given_up else 0.0) - share)

    def _tokens(self, view: NodeView, request: Request) -> int:
        """Prompt tokens to compute where the most is cached."""
        hashes, most = request.prefix_hashes, 0
        if hashes:
            for id_, estimate in self._estimates.items():
                most = max(most, view.cached_blocks(id_, hashes) * estimate.view.block_tokens)
        return max(1, request.prompt_tokens - most)

    def _urgency(self, request: Request, tokens: int, rate: float) -> tuple[float, float]:
        """(key, due); the least key is the most urgent."""
        settings = self._settings
        answer = 0.0
        if request.slo.e2e is not None:
            known = self._answers.get(request.slo.class_name)
            answer = 0.0 if known is None else known.seconds
        due = first_token_due(request, answer_seconds=answer, patience=settings.patience)
        if not settings.priority:
            return request.arrived, due
        if settings.order == "deadline":
            return due, due
        if settings.order == "density":
            return tokens / max(request.slo.weight, 1e-9), due
        return due - tokens / rate, due

    # --- too late, too much ---------------------------------------------------------------------

    def _too_late(self, view: NodeView, entry: Entry, now: float) -> Late | None:
        """What becomes of one whose latest start is past; None if a worker could do it yet."""
        best = math.inf
        for each in self._estimates.values():
            best = min(best, each.residual(now) + entry.tokens / each.pace.rate)
        left = entry.due - now
        hopeless = self._is_hopeless(view, entry.request)
        if best <= left * (1.0 + GRACE) and left > 0.0 and not hopeless:
            start_by = now + 0.5 * (left - best) + 1e-3
            self._lanes.rekey(entry, start_by=start_by, key=entry.key)
            return None
        if not hopeless and not entry.request.slo.bounds_start:
            self._lanes.demote(entry)
            return None
        self._note(entry.name, given_up=True)
        words = f"first token too late: it needs {best:.3f} s and is due in {left:.3f} s"
        if hopeless:
            tpot = entry.request.slo.tpot or 0.0
            words = f"no step is that short: tokens are due every {1000 * tpot:g} ms"
        elif best == math.inf:
            words = f"no worker for prompts: the first token is due in {left:.3f} s"
        refuses = entry.request.slo.on_miss is OnMiss.REFUSE
        if refuses and not entry.begun and entry.request.group is None:
            self._lanes.remove(entry.id)
            return Late(id=entry.id, action="refuse", reason=words)
        self._lanes.demote(entry)
        return Late(id=entry.id, action="demote", reason=words)

    def _is_hopeless(self, view: NodeView, request: Request) -> bool:
        """Whether no step is as short as its budget per token."""
        tpot = request.slo.tpot
        return tpot is not None and tpot < HOPELESS * self._lone(view)

    def _lone(self, view: NodeView) -> float:
        """Seconds of a step of one that decodes alone."""
        return view.cost.steps.seconds(decodes=1)

    def _plan(self, now: float) -> None:
        self._plan_at = now + PLAN_EVERY
        workers, lanes = self._workers, self._lanes
        head = lanes.head
        if workers.rate <= 1.0 or (head is None and not lanes.num_shed):
            return
        lanes.plan(
            now,
            rate=workers.rate,
            serial=workers.serial,
            begun=workers.begun(),
            value=self._values(),
            step=workers.step,
            reserve=self._settings.reserve,
        )

    def _values(self) -> dict[str, float]:
        """Classes of which more was given up than of others count for more."""
        gain = self._settings.fairness
        if not gain or not self._given_up:
            return {}
        least = min(self._given_up.values())
        return {
            name: math.exp(gain * min(1.0, 10.0 * (share - least)))
            for name, share in self._given_up.items()
        }

    # --- where ----------------------------------------------------------------------------------

    def _choose(
        self, view: NodeView, entry: Entry, estimates: Mapping[WorkerId, Estimate], now: float
    ) -> WorkerId | None:
        if entry.lane == "lane" or entry.due <= now:  # the latter where nobody is demoted
            return self._best_effort(entry, estimates, now)
        best = self._best(entry, estimates, now, view=view)
        return self._idle(estimates) if best is None and entry.lane == "main" else best

    def _best(
        self,
        entry: Entry,
        estimates: Mapping[WorkerId, Estimate],
        now: float,
        *,
        view: NodeView | None = None,
    ) -> WorkerId | None:
        """The worker to take it, of those where all budgets hold."""
        fullest = self._settings.placement == "fullest"
        best: WorkerId | None = None
        least = math.inf
        left = (entry.due - now) * (1.0 + GRACE)
        held_back = entry.lane == "shed"
        whole, tpot = self._whole(entry.request), entry.tpot
        binds = self._settings.budget and self._settings.priority and not entry.begun
        for id_, each in estimates.items():
            ahead = each.remaining if held_back else each.ahead(entry.key)
            if ahead >= each.limit or each.is_full:
                continue
            if not each.bears(whole, tpot):
                continue
            tokens, copy = entry.tokens, 0.0
            if view is not None and entry.request.prefix_hashes:
                tokens, copy = _missing(view, id_, entry.request, each)
            seconds = copy + each.residual(now) + (ahead + tokens) / each.pace.rate
            if binds and (seconds > left or each.harms(entry.key, tokens, now)):
                continue
            score = -(each.remaining + each.view.context_tokens) if fullest else seconds
            if score < least:
                best, least = id_, score
        return best

    def _whole(self, request: Request) -> int:
        """Tokens of its prompt and a likely answer."""
        known = self._answers.get(request.slo.class_name)
        return request.prompt_tokens + (0 if known is None else known.tokens)

    def _best_effort(
        self, entry: Entry, estimates: Mapping[WorkerId, Estimate], now: float
    ) -> WorkerId | None:
        """Where there is little to do. What has waited so long that its turn has come goes
        anywhere, one at a time to each, and need not fit beside what is there."""
        little = [id_ for id_, each in estimates.items() if each.is_underfull]
        whole = self._whole(entry.request)
        fitting = [id_ for id_ in little if estimates[id_].bears(whole, None)]
        if not fitting and self._has_turn(entry, now):
            free = [id_ for id_, each in estimates.items() if not (each.num_late or each.is_full)]
            fitting = little or free
        return min(
            fitting,
            key=lambda id_: (estimates[id_].remaining / estimates[id_].pace.rate, id_),
            default=None,
        )

    def _has_turn(self, entry: Entry, now: float) -> bool:
        """Whether best effort has waited so long that full workers take it too."""
        return now - entry.request.arrived > self._settings.lane_after

    def _idle(self, estimates: Mapping[WorkerId, Estimate]) -> WorkerId | None:
        """A worker without any work, if there is one: it takes what no budget allows."""
        for id_, each in estimates.items():
            if each.is_idle:
                return id_
        return None


def _missing(
    view: NodeView, worker: WorkerId, request: Request, each: Estimate
) -> tuple[int, float]:
    """Prompt tokens to compute there, and seconds to copy what need not be."""
    plan = view.prefix_plan(worker, request.prefix_hashes)
    tokens = request.prompt_tokens - plan.num_blocks * each.view.block_tokens
    return max(1, tokens), plan.copy_seconds
