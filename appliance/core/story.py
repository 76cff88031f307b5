"""What one call of a Dispatcher says about one request: first what was heard, then what was said.

The chapters of a request's story, as `GET /admin/requests/{id}` tells it. A name is that of the
message, but for "FirstToken" and "Finished", which are parts of a step's report.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from appliance.core.messages import (
    Abort,
    Aborted,
    Arrived,
    Assign,
    Cancelled,
    Degrade,
    Ended,
    Input,
    KvPulled,
    Migrate,
    Output,
    Preempted,
    Prefilled,
    PrefixPulled,
    Pull,
    PullFailed,
    Refused,
    Reject,
    Release,
    Released,
    Resume,
    StepReported,
    WorkerDown,
)
from appliance.core.types import RequestId

Chapter = tuple[str, dict[str, Any]]


def chapters(heard: Input, said: Sequence[Output], request_id: RequestId) -> Iterator[Chapter]:
    """(what, facts) of everything in this call that is about the request."""
    yield from _heard(heard, request_id)
    for output in said:
        yield from _said(output, request_id)


def _heard(message: Input, request_id: RequestId) -> Iterator[Chapter]:
    match message:
        case Arrived(request=request) if request.id == request_id:
            facts = {"prompt_tokens": request.prompt_tokens, "max_tokens": request.max_tokens}
            yield "Arrived", facts
        case StepReported():
            if request_id in message.ids:
                yield "FirstToken", {"worker": message.worker}
            for end in message.finished:
                if end.id == request_id:
                    yield "Finished", {"worker": message.worker, "emitted": end.emitted_tokens}
        case WorkerDown():
            yield "WorkerDown", {"worker": message.worker, "cause": message.cause}
        case Preempted() if message.request_id == request_id:
            facts = {"worker": message.worker, "lost_tokens": message.lost_tokens}
            yield "Preempted", facts
        case Refused() if message.request_id == request_id:
            words = {"command": message.command, "reason": message.reason}
            yield "Refused", {"worker": message.worker, **words}
        case Aborted() if message.request_id == request_id:
            yield "Aborted", {"worker": message.worker}
        case Cancelled() if message.request_id == request_id:
            yield "Cancelled", {"kind": message.kind}
        case Prefilled() | KvPulled() | PullFailed() | PrefixPulled() | Released():
            if message.request_id == request_id:
                yield _moved(message)
        case _:
            pass


def _moved(message: Prefilled | KvPulled | PullFailed | PrefixPulled | Released) -> Chapter:
    facts: dict[str, Any] = {"worker": message.worker}
    match message:
        case Prefilled():
            facts |= {"move": message.move, "emitted": message.emitted_tokens}
        case KvPulled():
            facts |= {"move": message.move, "source": message.source}
            facts |= {"emitted": message.emitted_tokens, "tokens": message.num_tokens}
            facts |= {"bytes": message.num_bytes, "seconds": message.seconds, "path": message.path}
        case PullFailed():
            facts |= {"move": message.move, "source": message.source, "reason": message.reason}
        case PrefixPulled():
            facts |= {"source": message.source, "wanted": message.wanted}
            facts |= {"blocks": message.num_blocks, "bytes": message.num_bytes}
            facts |= {"seconds": message.seconds, "path": message.path, "reason": message.reason}
        case Released():
            facts |= {"move": message.move, "expired": message.expired}
    return type(message).__name__, facts


def _said(output: Output, request_id: RequestId) -> Iterator[Chapter]:
    match output:
        case Assign(request=request) if request.id == request_id:
            facts: dict[str, Any] = {"worker": output.worker, "emitted": output.emitted_tokens}
            if output.pull_from is not None:
                facts |= {"pull_from": output.pull_from, "pull_blocks": output.pull_blocks}
            yield "Assign", facts
        case Pull(request=request) if request.id == request_id:
            facts = {"worker": output.worker, "move": output.move, "source": output.source}
            yield "Pull", facts
        case Migrate() if output.request_id == request_id:
            facts = {"worker": output.worker, "move": output.move, "target": output.target}
            yield "Migrate", {**facts, "live": output.live}
        case Resume() | Release() if output.request_id == request_id:
            yield type(output).__name__, {"worker": output.worker, "move": output.move}
        case Abort() if output.request_id == request_id:
            yield "Abort", {"worker": output.worker}
        case Reject() if output.request_id == request_id:
            yield "Reject", {"kind": output.kind, "reason": output.reason}
        case Degrade() if output.request_id == request_id:
            yield "Degrade", {"reason": output.reason}
        case Ended() if output.request_id == request_id:
            yield "Ended", {"reason": output.reason, "error": output.error}
        case _:
            pass
