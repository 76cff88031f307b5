"""Calls as bare JSON, as Llama 3 writes them: the answer is a call, or several, or none.

    {"name": "weather", "parameters": {"city": "Paris"}}

Calls stand at the beginning of the answer, perhaps behind the tag `<|python_tag|>`, and follow each
other with a semicolon or white space between them. An answer that begins otherwise is prose, and so
is everything behind the last call.
"""

from collections.abc import Collection

from appliance.api.parts import Part, add_text
from appliance.api.tool_parsers.reader import CallReader, State

TAG = "<|python_tag|>"


class LlamaCalls:
    """A parser for one answer."""

    def __init__(self, names: Collection[str], *, eager: bool, max_calls: int | None) -> None:
        """`names`: the tools offered. `eager`: tell a call while it is written. After `max_calls`
        calls the rest of the answer is dropped."""
        self._names = names
        self._eager = eager
        self._left = max_calls
        self._reader: CallReader | None = None
        self._kept = ""
        """White space, separator and tag before a call that may come."""
        self._called = False
        """A call was read: separators are no prose."""
        self._prose = False
        """All that comes is prose."""

    def push(self, text: str) -> list[Part]:
        """Read on. What may be the beginning of a call is kept back."""
        parts: list[Part] = []
        while text and self._left != 0:
            if self._prose:
                add_text(parts, text)
                return parts
            text = self._begin(text) if self._reader is None else self._read(text, parts)
        return parts

    def flush(self) -> list[Part]:
        """The answer is over: what was kept back."""
        if self._left == 0:
            return []
        parts: list[Part] = []
        if self._reader is not None:
            parts += self._reader.flush()
            kept = "" if self._reader.begun or self._called else self._kept
            add_text(parts, kept + self._reader.rest)
        elif not self._called or self._without_separators(self._kept):
            add_text(parts, self._kept)
        self._reader, self._kept = None, ""
        return parts

    def _begin(self, text: str) -> str:
        """Between calls; from the brace that opens one, or all of it when it is prose."""
        text, self._kept = self._kept + text, ""
        rest = self._without_separators(text)
        if rest.startswith(TAG):
            rest = rest[len(TAG) :].lstrip()
        elif rest and TAG.startswith(rest):
            self._kept = text
            return ""
        if not rest:
            self._kept = text
            return ""
        if rest[0] != "{":
            self._prose = True
            return text.lstrip() if self._called else text
        self._kept = text[: len(text) - len(rest)]
        self._reader = CallReader(self._names, eager=self._eager)
        return rest

    def _read(self, text: str, parts: list[Part]) -> str:
        reader = self._reader
        assert reader is not None
        parts += reader.push(text)
        if reader.state is State.OPEN:
            return ""
        self._reader = None
        kept, self._kept = self._kept, ""
        if reader.state is State.DONE:
            self._called = True
            if self._left is not None:
                self._left -= 1
            return reader.rest
        self._prose = True
        return reader.rest if reader.begun or self._called else kept + reader.rest

    def _without_separators(self, text: str) -> str:
        return text.lstrip("; \t\r\n") if self._called else text.lstrip()
