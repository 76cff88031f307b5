"""One tool call written as a JSON object, read while it is being written.

    {"name": "weather", "arguments": {"city": "Paris"}}

The object is followed by its brackets and strings alone, each character once; when the last bracket
closes it is parsed as JSON. An *eager* reader tells the name as soon as it is certain (it stands
first, and is one of the tools offered) and then the arguments as they come; otherwise nothing is
told before the whole object proved to be a call. `arguments` may be called `parameters`, may stand
before the name, may be missing (no arguments) or may be a string that holds the object.
"""

import json
import re
from collections.abc import Collection
from enum import Enum, auto
from typing import Any, NoReturn

from appliance.api.parts import CallArguments, CallBegun, CallBroken, CallEnded, Part

ARGUMENTS = ("arguments", "parameters")
_STRING = r'"(?:[^"\\\x00-\x1f]|\\.)*"'
_HEADER = re.compile(
    rf'\s*\{{\s*(?:"(?:type|id)"\s*:\s*{_STRING}\s*,\s*)*'
    rf'"name"\s*:\s*(?P<name>{_STRING})\s*,\s*"(?:{"|".join(ARGUMENTS)})"\s*:\s*(?=\{{)'
)
_NAMED = re.compile(rf'\s*\{{\s*"name"\s*:\s*(?P<name>{_STRING})')
_FIRST_KEY = re.compile(rf'\s*\{{\s*(?:(?P<key>{_STRING})|[^\s"])')
_KEYS = frozenset({"type", "id", "name", *ARGUMENTS})
_OUTSIDE = re.compile(r'["{}\[\]<]')
"""A tag outside of a string is no JSON: the object was left open."""
_INSIDE = re.compile(r'["\\\x00-\x1f]')
_PAIRS = {"}": "{", "]": "["}
MAX_HEADER = 1024
"""Characters within which a header must show; past them the call is told when it is complete."""


class State(Enum):
    """How far a reader has got."""

    OPEN = auto()
    DONE = auto()
    """The object was a call; `rest` is what followed it."""
    FAILED = auto()
    """It is no call, or is one no more; `rest` is all text that was not told."""


class CallReader:
    """Reads one call. Push until `state` is no longer OPEN."""

    def __init__(self, names: Collection[str], *, eager: bool) -> None:
        """`names`: the tools that may be called."""
        self._names = names
        self._eager = eager
        self._pieces: list[str] = []
        self._size = 0
        self._stack: list[str] = []
        self._in_string = False
        self._escaped = False
        self._head = ""
        self._looking = True
        """The header may still show."""
        self._name = ""
        self._arguments = (-1, -1)
        """Where the arguments begin and end in the text; -1: not yet known."""
        self._told = -1
        """Up to where the text was told as arguments; -1: the call was not told at all."""
        self.state = State.OPEN
        self.rest = ""

    @property
    def begun(self) -> bool:
        """Whether the call was told."""
        return self._told >= 0

    def push(self, text: str) -> list[Part]:
        """Read on; what can be told now."""
        parts: list[Part] = []
        begin = self._size
        self._pieces.append(text)
        self._size += len(text)
        if self._looking:
            self._look(text)
        end = None
        if self.state is State.OPEN:
            end = self._scan(text, begin)
        if self.state is State.FAILED:
            self._fail(parts)
        elif end is not None:
            self._tell(parts, text, begin)
            self._finish(end, parts)
        else:
            self._tell(parts, text, begin)
        return parts

    def flush(self) -> list[Part]:
        """The answer is over though the object is not."""
        parts: list[Part] = []
        if self.state is State.OPEN:
            self._fail(parts)
        return parts

    def _look(self, text: str) -> None:
        """Try to read the header, or to see that there will be none."""
        self._head += text
        if match := _HEADER.match(self._head):
            self._looking = False
            self._name = str(_loaded(match["name"]))
            self._arguments = (match.end(), -1)
            if self._name not in self._names:
                self.state = State.FAILED
            return
        self._looking = len(self._head) <= MAX_HEADER
        first, named = _FIRST_KEY.match(self._head), _NAMED.match(self._head)
        stripped = self._head.lstrip()
        if (
            (stripped and stripped[0] != "{")
            or (first and (first["key"] is None or _loaded(first["key"]) not in _KEYS))
            or (named and _loaded(named["name"]) not in self._names)
        ):
            self.state = State.FAILED

    def _scan(self, text: str, begin: int) -> int | None:
        """Follow brackets and strings; the index in `text` behind the object, if it closes."""
        at = 0
        while at < len(text):
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            found = (_INSIDE if self._in_string else _OUTSIDE).search(text, at)
            if found is None:
                return None
            at = found.end()
            if self._in_string:
                self._in_string = found[0] == "\\"
                self._escaped = self._in_string
                if found[0] < " ":
                    self.state = State.FAILED  # a raw control character: this is no JSON
                    return None
            elif found[0] == '"':
                self._in_string = True
            elif found[0] in "{[":
                self._stack.append(found[0])
            elif not self._stack or self._stack.pop() != _PAIRS.get(found[0]):
                self.state = State.FAILED
                return None
            elif not self._stack:
                return at
            elif len(self._stack) == 1 and 0 <= self._arguments[0] < begin + at:
                first, last = self._arguments
                self._arguments = (first, begin + at if last < 0 else last)
        return None

    def _tell(self, parts: list[Part], text: str, begin: int) -> None:
        """What an eager reader says of the text read so far."""
        first, last = self._arguments
        if not self._eager or first < 0:
            return
        if not self.begun:
            parts.append(CallBegun(name=self._name))
            self._told = first
        end = self._size if last < 0 else last
        if end > self._told:  # what was not told yet lies in this piece
            parts.append(CallArguments(text=text[self._told - begin : end - begin]))
            self._told = end

    def _finish(self, end: int, parts: list[Part]) -> None:
        """The object has closed `end` characters into the last piece."""
        whole = "".join(self._pieces)
        size = self._size - len(self._pieces[-1]) + end
        call = _call_of(whole[:size])
        if call is None or call[0] not in self._names or (self.begun and call[0] != self._name):
            self.state = State.FAILED
            self._fail(parts)
            return
        if not self.begun:
            first, last = self._arguments
            verbatim = whole[first:last] if 0 <= first < last else None
            parts.append(CallBegun(name=call[0]))
            parts.append(CallArguments(text=call[1] if verbatim is None else verbatim))
        parts.append(CallEnded())
        self.state = State.DONE
        self.rest = whole[size:]

    def _fail(self, parts: list[Part]) -> None:
        self.state = State.FAILED
        self.rest = "".join(self._pieces)[max(self._told, 0) :]
        if self.begun:
            parts.append(CallBroken())


def _call_of(text: str) -> tuple[str, str] | None:
    """Name and arguments (as JSON) of a complete object; None when it is no call."""
    document = _loaded(text)
    if not isinstance(document, dict) or not isinstance(name := document.get("name"), str):
        return None
    arguments = next((document[key] for key in ARGUMENTS if key in document), None)
    if isinstance(arguments, str):
        arguments = _loaded(arguments)
    elif arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        return None
    return name, json.dumps(arguments, ensure_ascii=False)


def _loaded(text: str) -> Any:
    """The JSON value of a text; None when it is none."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
