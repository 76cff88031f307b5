"""May a request enter? What can never be served and what the queue cannot hold is turned away here,
whatever the policy says; the policy may turn away more.

`Retry-After` is the predicted time to work off what is assigned and what waits.
"""

from appliance.core.lifecycle import WorkerState
from appliance.core.messages import Reject
from appliance.core.node_state import NodeState
from appliance.core.types import ErrorKind, Request
from appliance.core.worker_table import kv_tokens


def legal_refusal(state: NodeState, request: Request) -> Reject | None:
    """The refusal that the mechanism owes this request; None: the policy may decide."""
    config = state.config
    if state.is_draining:
        return _reject(
            state,
            request,
            ErrorKind.DRAINING,
            "the server is shutting down and takes no more requests",
        )
    if state.is_abandoned:
        causes = "; ".join(f"worker {s.id}: {s.last_cause}" for s in state.slots.values())
        words = f"every worker is quarantined ({causes})"
        return _reject(state, request, ErrorKind.NO_WORKER, words)
    room = config.max_model_len
    if request.prompt_tokens >= room:
        words = (
            f"the prompt has {request.prompt_tokens} tokens; with at least one token of answer "
            f"the limit of this server is {room} (max_model_len)"
        )
        return _reject(state, request, ErrorKind.TOO_LONG, words)
    pool, needed = _largest_pool(state), kv_tokens(request, room)
    if pool is not None and needed > pool:
        words = (
            f"prompt ({request.prompt_tokens} tokens) and max_tokens ({request.max_tokens}) need "
            f"the KV cache of {needed} tokens, a worker holds {pool}; lower max_tokens, or give "
            "the workers more (kv.memory)"
        )
        return _reject(state, request, ErrorKind.TOO_LONG, words)
    return _queue_refusal(state, request)


def retry_after(state: NodeState) -> float:
    """Seconds after which trying again makes sense, from the predicted backlog."""
    ready = [s.view(state.cost) for s in state.slots.values() if s.state is WorkerState.READY]
    queue = state.requests.queue
    seconds = state.cost.backlog_seconds(ready, num_waiting=len(queue), waiting_tokens=queue.tokens)
    return min(max(seconds, state.config.retry_after_min), state.config.retry_after_max)


def _queue_refusal(state: NodeState, request: Request) -> Reject | None:
    queue, config = state.requests.queue, state.config
    if len(queue) >= config.max_queue:
        words = f"{len(queue)} requests wait already (queue.max_requests)"
    elif len(queue) and queue.tokens + request.prompt_tokens > config.max_queue_tokens:
        words = f"{queue.tokens} prompt tokens wait already (queue.max_tokens)"
    else:
        return None
    return _reject(state, request, ErrorKind.QUEUE_FULL, words)


def _largest_pool(state: NodeState) -> int | None:
    """Tokens that the largest pool of a worker still in play holds; None while one is unknown or
    without bound."""
    pools = [
        slot.capacity_tokens
        for slot in state.slots.values()
        if slot.state is not WorkerState.QUARANTINED
    ]
    sizes = [size for size in pools if size is not None]
    return max(sizes, default=None) if len(sizes) == len(pools) else None


def _reject(state: NodeState, request: Request, kind: ErrorKind, words: str) -> Reject:
    again = retry_after(state) if kind in (ErrorKind.QUEUE_FULL, ErrorKind.DRAINING) else None
    return Reject(request_id=request.id, kind=kind, reason=words, retry_after=again)
