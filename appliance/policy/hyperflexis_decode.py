"""HyperFlexis: where answers are decoded.

The decode of one more sequence is predicted with it counted: a step of B + 1 sequences over K + L
tokens of context, against the tightest budget per token of both. Among the workers that bear it the
one where that step is the shortest share of its budget (or, to empty the others, the longest); if
none does, the least bad. An answer leaves a worker whose step, without any prompts, has become too
long for the tightest that runs there, for one that bears it."""

from collections.abc import Sequence

from appliance.core.lifecycle import WorkerState
from appliance.core.slots import Migration
from appliance.core.types import Phase, Request, WorkerId
from appliance.core.view import NodeView, RunningView, WorkerView
from appliance.policy.hyperflexis_budget import HyperflexisSettings

LOOK_EVERY = 0.025
"""Seconds between two looks."""
PAUSE = 0.1
"""Seconds after a look that found a worker too full."""
WORTH = 24
"""Tokens that an answer must be expected to get yet, to be worth a move."""


def pressure(view: NodeView, worker: WorkerView, request: Request, *, context: int) -> float:
    """Predicted step with this sequence decoding there too, over the tightest budget per token; of
    steps without budgets the seconds, far below."""
    seconds = view.cost.steps.tail_seconds(
        decodes=worker.decodes + worker.incoming + 1,
        context_tokens=worker.context_tokens + context,
    )
    budgets = [each for each in (worker.tightest_tpot, request.slo.tpot) if each is not None]
    return seconds / min(budgets) if budgets else 1e-3 * seconds


def place_decode(
    view: NodeView, request: Request, willing: Sequence[WorkerId], settings: HyperflexisSettings
) -> WorkerId:
    """The worker for an answer that leaves the one where it is; `willing` is not empty."""
    if len(willing) == 1:
        return willing[0]
    workers, context = view.workers, request.prompt_tokens
    loads = {id_: pressure(view, workers[id_], request, context=context) for id_ in willing}
    fitting = [id_ for id_ in willing if loads[id_] <= settings.headroom]
    if fitting and settings.placement == "fullest":
        return max(fitting, key=lambda id_: (loads[id_], -id_))
    return min(fitting or willing, key=lambda id_: (loads[id_], id_))


class Migrator:
    """The slot `migrate`."""

    def __init__(self, settings: HyperflexisSettings) -> None:
        self._settings = settings
        self._after = 0.0

    def __call__(self, view: NodeView, now: float) -> Sequence[Migration]:
        """One answer off a worker that is too full for its tightest budget, if one bears it."""
        if self._after - PAUSE <= now < self._after:
            return ()
        self._after = now + LOOK_EVERY
        for worker in view.workers.values():
            tight = worker.tightest_tpot
            if tight is None or worker.decodes < 2 or worker.state is not WorkerState.READY:
                continue
            seconds = view.cost.steps.tail_seconds(
                decodes=worker.decodes, context_tokens=worker.context_tokens
            )
            if seconds > tight:
                self._after = now + PAUSE
                wish = self._move_off(view, worker, now)
                if wish is not None:
                    return (wish,)
        return ()

    def _move_off(self, view: NodeView, worker: WorkerView, now: float) -> Migration | None:
        """The longest context that another worker bears."""
        lengths = view.cost.lengths

        def context(each: RunningView) -> int:
            return each.request.prompt_tokens + each.emitted

        movable = [each for each in view.running(worker.id) if each.decoding and not each.moving]
        movable.sort(key=context, reverse=True)
        for each in movable[:8]:
            name = each.request.slo.class_name
            if lengths.at(name, 0.5, each.emitted) - each.emitted < WORTH:
                continue
            loads = {
                id_: pressure(view, view.workers[id_], each.request, context=context(each))
                for id_ in view.willing(each.request, now, Phase.DECODE)
            }
            best = min(loads, key=lambda id_: (loads[id_], id_), default=None)
            if best is not None and loads[best] <= self._settings.headroom:
                return Migration(id=each.request.id, target=best)
        return None
