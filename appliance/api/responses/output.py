"""The output items of one response while they grow, and the event for each step of their growth.

An item is announced when it begins, told in deltas, and repeated whole when it is done; the list of
the items that are done is the output of the response.
"""

from collections.abc import Callable, Sequence
from typing import Any, assert_never

from appliance.api.ids import item_id
from appliance.api.parts import (
    CallArguments,
    CallBegun,
    CallBroken,
    CallEnded,
    Part,
    Reasoning,
    Text,
)

Say = Callable[[str, dict[str, Any]], None]
"""Takes the type of an event and its fields."""


class Output:
    """Items of one response."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self.items: list[dict[str, Any]] = []
        """Complete when they are done."""
        self._open: _Prose | _Call | None = None

    def take(self, parts: Sequence[Part]) -> None:
        """The answer went on with these parts."""
        for part in parts:
            match part:
                case Text():
                    self._prose(_MESSAGE).add(part.text)
                case Reasoning():
                    self._prose(_THOUGHTS).add(part.text)
                case CallBegun():
                    self._begin(_Call(self._say, len(self.items), name=part.name))
                case CallArguments():
                    if self._open is not None:
                        self._open.add(part.text)
                case CallEnded():
                    self._close("completed")
                case CallBroken():
                    self._close("incomplete")
                case never:
                    assert_never(never)

    def finish(self, status: str) -> None:
        """The answer is over; a response has at least one item."""
        if not self.items:
            self._prose(_MESSAGE)
        self._close(status)

    def _prose(self, kind: "_Kind") -> "_Prose":
        if isinstance(self._open, _Prose) and self._open.kind is kind:
            return self._open
        prose = _Prose(self._say, len(self.items), kind=kind)
        self._begin(prose)
        return prose

    def _begin(self, item: "_Prose | _Call") -> None:
        self._close("completed")
        self._open = item
        self.items.append(item.document)
        item.begin()

    def _close(self, status: str) -> None:
        if self._open is not None:
            self._open.end(status)
            self._open = None


class _Kind:
    """What tells a message and a thought apart."""

    def __init__(self, prefix: str, event: str, part: dict[str, Any], item: dict[str, Any]) -> None:
        self.prefix = prefix
        self.event = event
        self.part = part
        self.item = item


_MESSAGE = _Kind(
    "msg",
    "response.output_text",
    {"type": "output_text", "annotations": [], "logprobs": []},
    {"type": "message", "role": "assistant"},
)
_THOUGHTS = _Kind(
    "rs",
    "response.reasoning_text",
    {"type": "reasoning_text"},
    {"type": "reasoning", "summary": []},
)


class _Prose:
    """A message or a thought: an item with one part of text."""

    def __init__(self, say: Say, index: int, *, kind: _Kind) -> None:
        self.kind = kind
        self._say = say
        self._texts: list[str] = []
        self.document: dict[str, Any] = {
            "id": item_id(kind.prefix),
            **kind.item,
            "status": "in_progress",
            "content": [],
        }
        self._place = {
            "item_id": self.document["id"],
            "output_index": index,
            "content_index": 0,
        }
        self._logprobs: dict[str, Any] = {"logprobs": []} if kind is _MESSAGE else {}

    def begin(self) -> None:
        """Announce the item and its part."""
        index = self._place["output_index"]
        self._say("response.output_item.added", {"output_index": index, "item": self.document})
        part = {**self.kind.part, "text": ""}
        self._say("response.content_part.added", {**self._place, "part": part})

    def add(self, text: str) -> None:
        """Tell more of it."""
        self._texts.append(text)
        event = {**self._place, "delta": text, **self._logprobs}
        self._say(f"{self.kind.event}.delta", event)

    def end(self, status: str) -> None:
        """Tell all of it."""
        text = "".join(self._texts)
        part = {**self.kind.part, "text": text}
        self._say(f"{self.kind.event}.done", {**self._place, "text": text, **self._logprobs})
        self._say("response.content_part.done", {**self._place, "part": part})
        self.document |= {"content": [part], "status": status}
        index = self._place["output_index"]
        self._say("response.output_item.done", {"output_index": index, "item": self.document})


class _Call:
    """A function call."""

    def __init__(self, say: Say, index: int, *, name: str) -> None:
        self._say = say
        self._texts: list[str] = []
        self.document: dict[str, Any] = {
            "id": item_id("fc"),
            "type": "function_call",
            "status": "in_progress",
            "call_id": item_id("call"),
            "name": name,
            "arguments": "",
        }
        self._index = index

    def begin(self) -> None:
        """Announce the item."""
        item = {"output_index": self._index, "item": self.document}
        self._say("response.output_item.added", item)

    def add(self, text: str) -> None:
        """Tell more of the arguments."""
        self._texts.append(text)
        place = {"item_id": self.document["id"], "output_index": self._index}
        self._say("response.function_call_arguments.delta", {**place, "delta": text})

    def end(self, status: str) -> None:
        """Tell all of it."""
        arguments = "".join(self._texts)
        self.document |= {"arguments": arguments, "status": status}
        place = {"item_id": self.document["id"], "output_index": self._index}
        event = {**place, "name": self.document["name"], "arguments": arguments}
        self._say("response.function_call_arguments.done", event)
        item = {"output_index": self._index, "item": self.document}
        self._say("response.output_item.done", item)
