"""Bricks for the Dispatcher's slots, shared by policies.

Each is a slot of `appliance.core.slots`, or makes one from its settings.
"""

from collections.abc import Callable, Sequence
from typing import Any

from appliance.core.lifecycle import WorkerState
from appliance.core.slots import (
    Accept,
    Admission,
    AdmitSlot,
    DispatchSlots,
    MigrateSlot,
    Migration,
    OrderSlot,
    PlaceSlot,
    Refuse,
)
from appliance.core.types import ErrorKind, Phase, Request, Role, WorkerId
from appliance.core.view import NodeView, WorkerView


def admit_all(view: NodeView, request: Request, now: float) -> Admission:
    """Accept whatever the node's own bounds let through."""
    del view, request, now
    return Accept()


def admit_bounded(*, max_requests: int, max_tokens: int) -> AdmitSlot:
    """Accept while fewer than `max_requests` wait and their prompts have fewer than `max_tokens`
    tokens; 0 stands for no bound of this policy's own. The node adds the `Retry-After`."""

    def admit(view: NodeView, request: Request, now: float) -> Admission:
        del now
        waiting, tokens = view.num_waiting, view.waiting_tokens
        if max_requests and waiting >= max_requests:
            reason = f"{waiting} requests wait already (policy setting max_waiting)"
        elif max_tokens and waiting and tokens + request.prompt_tokens > max_tokens:
            reason = f"{tokens} prompt tokens wait already (policy setting max_waiting_tokens)"
        else:
            return Accept()
        return Refuse(kind=ErrorKind.QUEUE_FULL, reason=reason)

    return admit


def order_fcfs(queue: Sequence[Request], view: NodeView, now: float) -> Sequence[Request]:
    """First come, first served: the queue as the mechanism keeps it."""
    del view, now
    return queue


def order_by(urgency: Callable[[Request], Any]) -> OrderSlot:
    """The most urgent first, and equal ones as the mechanism keeps them."""

    def order(queue: Sequence[Request], view: NodeView, now: float) -> Sequence[Request]:
        del view, now
        return sorted(queue, key=urgency) if len(queue) > 1 else queue

    return order


def place_least(load: Callable[[WorkerView], float]) -> PlaceSlot:
    """The willing worker with the least of that, the lower id where equal; for decode those meant
    for it first, for prompts last."""

    def place(view: NodeView, request: Request, phase: Phase, now: float) -> WorkerId | None:
        willing = view.willing(request, now, phase)
        if len(willing) < 2:
            return willing[0] if willing else None
        workers, decode = view.workers, phase is Phase.DECODE
        keys = (
            ((workers[each].role is Role.DECODE) is not decode, load(workers[each]), each)
            for each in willing
        )
        return min(keys)[2]

    return place


def place_least_work(view: NodeView, request: Request, phase: Phase, now: float) -> WorkerId | None:
    """For prefill, the willing worker with the least predicted work if it took this request: its
    cached prefix counted, and a peer's where copying it is cheaper than computing it; decode
    workers last, the lower id where equal.

    For decode, the worker whose batch would be the emptiest with the newcomer in it (its step is
    the shortest); decode workers before mixed ones."""
    willing = view.willing(request, now, phase)
    if not willing:
        return None
    if len(willing) == 1:
        return willing[0]
    workers, cost, hashes = view.workers, view.cost, request.prefix_hashes

    def work(worker_id: WorkerId) -> tuple[bool, float, WorkerId]:
        worker = workers[worker_id]
        seconds, cached = 0.0, 0
        if hashes:
            plan = view.prefix_plan(worker_id, hashes)
            seconds, cached = plan.copy_seconds, plan.num_blocks * worker.block_tokens
        new_tokens = max(1, request.prompt_tokens - cached)
        seconds += cost.work_seconds(worker, new_tokens)
        return (worker.role is Role.DECODE, seconds, worker_id)

    def fullness(worker_id: WorkerId) -> tuple[bool, float, WorkerId]:
        worker = workers[worker_id]
        batch = (worker.assigned + worker.incoming + 1) / max(1, worker.max_num_seqs)
        return (worker.role is not Role.DECODE, batch, worker_id)

    return min(willing, key=work if phase is Phase.PREFILL else fullness)


def migrate_evenly(*, gap: int) -> MigrateSlot:
    """Move one answer at a time from the fullest worker to the emptiest one of the same role, while
    the fullest has at least `gap` (>= 2) more. Never the other way round at once: after a move the
    difference is smaller by two."""

    def migrate(view: NodeView, now: float) -> Sequence[Migration]:
        workers = [each for each in view.workers.values() if each.state is WorkerState.READY]
        if len(workers) < 2 or any(each.incoming for each in workers):
            return ()
        fullest = max(workers, key=lambda each: (each.assigned, -each.id))
        others = [each for each in workers if each.role is fullest.role]
        emptiest = min(others, key=lambda each: (each.assigned, each.id))
        if fullest.assigned - emptiest.assigned < max(gap, 2):
            return ()
        for each in reversed(view.running(fullest.id)):  # the latest has the least to copy
            if not each.decoding or each.moving:
                continue
            if emptiest.id in view.willing(each.request, now, Phase.DECODE):
                return (Migration(id=each.request.id, target=emptiest.id),)
        return ()

    return migrate


def slots(
    *,
    order: OrderSlot = order_fcfs,
    place: PlaceSlot = place_least_work,
    migrate: MigrateSlot | None = None,
) -> DispatchSlots:
    """The Dispatcher's slots of a policy that takes in everything and waits for nothing; what it
    does not name is done as under first come, first served."""
    return DispatchSlots(
        admit=admit_all, order=order, place=place, wakeup=never_wake, migrate=migrate
    )


def never_wake(view: NodeView, now: float) -> float | None:
    """Events alone are reason enough to decide."""
    del view, now
    return None
