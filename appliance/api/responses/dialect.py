"""How /v1/responses words an answer: one document, or events with running numbers.

response.created, response.in_progress,
response.output_item.added, response.content_part.added, response.output_text.delta ..., .done,
response.content_part.done, response.output_item.done, ...
response.completed | response.incomplete | response.failed
"""

import time
from collections.abc import Sequence
from typing import Any

from appliance.api.answer import AnswerParser
from appliance.api.dialect import Outlet
from appliance.api.errors import ApiError
from appliance.api.one_answer import OneAnswerDialect, TypedStream, judged, unheard
from appliance.api.part_sinks import PartCollectSink
from appliance.api.parts import Part
from appliance.api.render import Identity, Usage
from appliance.api.responses.output import Output
from appliance.api.sinks import EventStream, Exchange
from appliance.api.speech import Reading

KIND = "response"


def usage_document(usage: Usage) -> dict[str, Any]:
    """The `usage` object of a response."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


class Envelope:
    """The response object around the output; most of it repeats the request."""

    def __init__(self, name: str, model: str, echoed: dict[str, Any]) -> None:
        """`echoed`: members taken from the request."""
        self.identity = Identity(id=name, object=KIND, created=int(time.time()), model=model)
        self._echoed = echoed

    def document(
        self,
        status: str,
        *,
        output: Sequence[dict[str, Any]] = (),
        usage: Usage | None = None,
        error: ApiError | None = None,
    ) -> dict[str, Any]:
        """The whole object."""
        reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
        failure = None
        if error is not None:
            failure = {"code": "server_error", "message": error.body.message}
        ended = None if status == "in_progress" else int(time.time())
        return {
            "id": self.identity.id,
            "object": KIND,
            "created_at": self.identity.created,
            "completed_at": ended if status == "completed" else None,
            "status": status,
            "error": failure,
            "incomplete_details": reason,
            "model": self.identity.model,
            "output": output,
            "usage": None if usage is None else usage_document(usage),
            **self._echoed,
        }


def status_of(reason: str) -> str:
    """The status of a response whose answer ended for this reason."""
    return "incomplete" if reason == "length" else "completed"


class ResponseStream(TypedStream):
    """The events of one response."""

    def __init__(self, outlet: Outlet, envelope: Envelope) -> None:
        super().__init__(outlet, envelope.identity)
        self._envelope = envelope
        self._number = 0
        self._status = "completed"
        self.output = Output(self.say)

    def _numbered(self) -> dict[str, Any]:
        self._number += 1
        return {"sequence_number": self._number - 1}

    def begin(self) -> None:
        """Announce the response."""
        response = {"response": self._envelope.document("in_progress")}
        self.say("response.created", response)
        self.say("response.in_progress", response)
        self.flush()

    def take(self, parts: Sequence[Part]) -> None:
        """The output went on."""
        self.output.take(parts)

    def finish(self, parts: Sequence[Part], reason: str, parser: AnswerParser) -> None:
        """The answer is over; the last event waits for the usage."""
        del parser
        self._status = status_of(reason)
        self.output.take(parts)
        self.output.finish(self._status)

    def on_complete(self) -> None:
        """The whole response."""
        document = self._envelope.document(self._status, output=self.output.items, usage=self.usage)
        self.say(f"response.{self._status}", {"response": {**document, **judged(self.slo)}})
        self.flush()

    def on_error(self, error: ApiError) -> None:
        """The failure; nothing follows it."""
        self._events.clear()
        document = self._envelope.document("failed", output=self.output.items, error=error)
        self.say("response.failed", {"response": document})
        self.flush()
        self._closed = True


class ResponsesDialect(OneAnswerDialect):
    """See the module's text."""

    def __init__(self, envelope: Envelope, reading: Reading) -> None:
        super().__init__(reading)
        self._envelope = envelope

    def stream(self, outlet: Outlet) -> EventStream:
        return ResponseStream(outlet, self._envelope)

    def whole(self, exchange: Exchange, sink: PartCollectSink) -> dict[str, Any]:
        output = Output(unheard)
        output.take(sink.parts)
        status = status_of(sink.finish_reason)
        output.finish(status)
        response = self._envelope.document(status, output=output.items, usage=exchange.usage)
        return {**response, **judged(exchange.slo)}
