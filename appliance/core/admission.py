"""May a request enter? What can never be served and what the queue cannot hold is turned away
here, whatever the policy says; the policy may turn away more. And what was accepted in good faith,
but has become hopeless since (the workers are gone, or their pools turned out too small), is
ended.

`Retry-After` is the predicted time to work off what is assigned and what waits.
"""

from appliance.core.lifecycle import RequestState, WorkerState
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
        return _reject(state, request, ErrorKind.NO_WORKER, _no_worker(state))
    room = config.max_model_len
    if request.prompt_tokens >= room:
        words = (
            f"the prompt has {request.prompt_tokens} tokens; with at least one token of answer "
            f"the limit of this server is {room} (max_model_len)"
        )
        return _reject(state, request, ErrorKind.TOO_LONG, words)
    large = too_large(state, request)
    if large is not None:
        return _reject(state, request, ErrorKind.TOO_LONG, large)
    return _queue_refusal(state, request)


def end_hopeless(state: NodeState, now: float) -> None:
    """End the waiting requests that no worker can serve any more. Asked when a worker came up or
    was quarantined: nothing else changes the answer."""
    abandoned = state.is_abandoned
    for record in state.requests.records():
        if record.state is not RequestState.WAITING:
            continue
        if abandoned:
            state.fail(record, now, kind=ErrorKind.NO_WORKER, message=_no_worker(state))
        elif (words := too_large(state, record.request)) is not None:
            state.fail(record, now, kind=ErrorKind.TOO_LONG, message=words)


def too_large(state: NodeState, request: Request) -> str | None:
    """Why no worker that may still serve could hold the longest answer; None if one could, or if
    the pool of one is not known yet."""
    pool, needed = _largest_pool(state), kv_tokens(request, state.config.max_model_len)
    if pool is None or needed <= pool:
        return None
    return (
        f"prompt ({request.prompt_tokens} tokens) and max_tokens ({request.max_tokens}) need a KV "
        f"cache of {needed} tokens, a worker holds {pool}; lower max_tokens, or give the workers "
        "more (kv.memory)"
    )


def retry_after(state: NodeState) -> float:
    """Seconds after which trying again makes sense, from the predicted backlog."""
    ready = [s.view(state.cost) for s in state.slots.values() if s.state is WorkerState.READY]
    queue = state.requests.queue
    seconds = state.cost.backlog_seconds(ready, num_waiting=len(queue), waiting_tokens=queue.tokens)
    return min(max(seconds, state.config.retry_after_min), state.config.retry_after_max)


def _no_worker(state: NodeState) -> str:
    causes = "; ".join(f"worker {slot.id}: {slot.last_cause}" for slot in state.slots.values())
    return f"every worker is quarantined ({causes})"


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
        if slot.state is not WorkerState.QUARANTINED and not slot.parked
    ]
    sizes = [size for size in pools if size is not None]
    return max(sizes, default=None) if len(sizes) == len(pools) else None


def _reject(state: NodeState, request: Request, kind: ErrorKind, words: str) -> Reject:
    again = retry_after(state) if kind in (ErrorKind.QUEUE_FULL, ErrorKind.DRAINING) else None
    return Reject(request_id=request.id, kind=kind, reason=words, retry_after=again)
