"""Calls between tags, as Hermes and Qwen write them; prose may stand around them.

    <tool_call>
    {"name": "weather", "arguments": {"city": "Paris"}}
    </tool_call>

White space around a call belongs to it. A missing closing tag is forgiven: the object says where
the call ends. What stands between the tags and is no call stays prose, tags included.
"""

from collections.abc import Collection

from appliance.api.parts import Part, add_text, held_back
from appliance.api.tool_parsers.reader import CallReader, State

OPENER = "<tool_call>"
CLOSER = "</tool_call>"
MAX_RETRIES = 8
"""Failed calls whose text is searched for another call; past them it is prose as a whole, so that
no text takes more than a fixed number of looks."""


class HermesCalls:
    """A parser for one answer."""

    def __init__(self, names: Collection[str], *, eager: bool, max_calls: int | None) -> None:
        """`names`: the tools offered. `eager`: tell a call while it is written. After `max_calls`
        calls the rest of the answer is dropped."""
        self._names = names
        self._eager = eager
        self._left = max_calls
        self._reader: CallReader | None = None
        self._lead = ""
        """White space and opening tag of the call being read."""
        self._kept = ""
        """What may be the beginning of a tag."""
        self._closing = False
        """A call has ended and its closing tag is due."""
        self._trim = False
        """White space that follows a call is not prose."""
        self._retries = 0

    def push(self, text: str) -> list[Part]:
        """Read on. What may be the beginning of a tag is kept back."""
        parts: list[Part] = []
        while text and self._left != 0:
            if self._reader is not None:
                text = self._read(self._reader, text, parts)
            elif self._closing:
                text = self._close(text)
            else:
                text = self._search(text, parts)
        return parts

    def flush(self) -> list[Part]:
        """The answer is over: what was kept back."""
        if self._left == 0:
            return []
        parts: list[Part] = []
        if self._reader is not None:
            reader = self._reader
            parts += reader.flush()
            self._prose(parts, reader.rest if reader.begun else self._lead + reader.rest)
        elif not self._closing or self._kept.strip():
            self._prose(parts, self._kept)
        self._reader, self._kept = None, ""
        return parts

    def _search(self, text: str, parts: list[Part]) -> str:
        """Outside of calls; the text behind an opening tag, if there is one."""
        text, self._kept = self._kept + text, ""
        at = text.find(OPENER)
        if at < 0:
            keep = held_back(text, OPENER)
            self._kept = text[len(text) - keep :]
            self._prose(parts, text[: len(text) - keep])
            return ""
        before = text[:at].rstrip()
        self._prose(parts, before)
        self._lead = text[len(before) : at + len(OPENER)]
        self._reader = CallReader(self._names, eager=self._eager)
        return text[at + len(OPENER) :]

    def _read(self, reader: CallReader, text: str, parts: list[Part]) -> str:
        """Inside a call; the text behind it, once it is over."""
        parts += reader.push(text)
        if reader.state is State.OPEN:
            return ""
        self._reader = None
        if reader.state is State.DONE:
            self._closing, self._trim = True, True
            if self._left is not None:
                self._left -= 1
            return reader.rest
        if not reader.begun:
            self._prose(parts, self._lead)
        self._retries += 1
        if self._retries <= MAX_RETRIES:
            return reader.rest
        self._prose(parts, reader.rest)
        return ""

    def _close(self, text: str) -> str:
        """Behind a call; the text behind its closing tag."""
        text, self._kept = self._kept + text, ""
        stripped = text.lstrip()
        if stripped.startswith(CLOSER):
            self._closing = False
            return stripped[len(CLOSER) :]
        if CLOSER.startswith(stripped):
            self._kept = text
            return ""
        self._closing = False
        return text

    def _prose(self, parts: list[Part], text: str) -> None:
        if self._trim:
            text = text.lstrip()
        if text:
            self._trim = False
            add_text(parts, text)
