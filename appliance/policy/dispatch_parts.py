"""Bricks for the Dispatcher's slots, shared by policies.

Each is a slot of `appliance.core.slots`, or makes one from its settings.
"""

from collections.abc import Sequence

from appliance.core.slots import Accept, Admission, AdmitSlot, Refuse
from appliance.core.types import ErrorKind, Phase, Request, Role, WorkerId
from appliance.core.view import NodeView


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


def place_least_work(view: NodeView, request: Request, phase: Phase, now: float) -> WorkerId | None:
    """The willing worker with the least predicted work if it took this request, its cached prefix
    counted; mixed workers before others, the lower id where equal."""
    del phase
    willing = view.willing(request, now)
    if not willing:
        return None
    if len(willing) == 1:
        return willing[0]
    workers, cost, hashes = view.workers, view.cost, request.prefix_hashes

    def work(worker_id: WorkerId) -> tuple[bool, float, WorkerId]:
        worker = workers[worker_id]
        cached = view.cached_blocks(worker_id, hashes) * worker.block_tokens if hashes else 0
        new_tokens = max(1, request.prompt_tokens - cached)
        return (worker.role is not Role.MIXED, cost.work_seconds(worker, new_tokens), worker_id)

    return min(willing, key=work)


def never_wake(view: NodeView, now: float) -> float | None:
    """Events alone are reason enough to decide."""
    del view, now
    return None
