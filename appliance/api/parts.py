"""What an answer is made of, once its text has been read: prose, thoughts, tool calls.

Parsers turn the text of a model into these parts, in order; dialects turn the parts into the words
of their route. A call is told piece by piece: it begins with its name, grows by its arguments (as
the model wrote them), and ends, or breaks off. Only a call that has ended may be acted upon.
"""

from collections.abc import Iterable
from typing import Protocol, TypeAlias

from appliance.core.types import Record


class Text(Record, frozen=True):
    """Prose for the reader."""

    text: str


class Reasoning(Record, frozen=True):
    """Thoughts that the template keeps apart from the prose."""

    text: str


class CallBegun(Record, frozen=True):
    """A call of this tool; arguments follow."""

    name: str


class CallArguments(Record, frozen=True):
    """The next piece of the arguments of the open call, JSON as written."""

    text: str


class CallEnded(Record, frozen=True):
    """The arguments of the open call are complete: a JSON object."""


class CallBroken(Record, frozen=True):
    """The open call was cut off, or went on as no JSON object does; it is over."""


Part: TypeAlias = Text | Reasoning | CallBegun | CallArguments | CallEnded | CallBroken


class Call(Record, frozen=True, kw_only=True):
    """A whole call."""

    name: str
    arguments: str


class CallParser(Protocol):
    """Finds the tool calls in one answer's prose."""

    def push(self, text: str) -> list[Part]:
        """Read on. What may be the beginning of a marker is kept back."""

    def flush(self) -> list[Part]:
        """The answer is over: what was kept back."""


def add_text(parts: list[Part], text: str) -> None:
    """Append prose, joined with prose before it."""
    if not text:
        return
    if parts and isinstance(last := parts[-1], Text):
        parts[-1] = Text(text=last.text + text)
    else:
        parts.append(Text(text=text))


def held_back(text: str, marker: str) -> int:
    """Length of the end of `text` that may belong to `marker`: white space and a beginning of the
    marker, either of them possibly absent."""
    size = min(len(marker) - 1, len(text))
    while size and not text.endswith(marker[:size]):
        size -= 1
    return len(text) - len(text[: len(text) - size].rstrip())


def joined(parts: Iterable[Part]) -> tuple[str, str, list[Call]]:
    """Prose, thoughts and complete calls of an answer that has ended."""
    prose: list[str] = []
    thoughts: list[str] = []
    calls: list[Call] = []
    name, arguments = "", ""
    for part in parts:
        match part:
            case Text():
                prose.append(part.text)
            case Reasoning():
                thoughts.append(part.text)
            case CallBegun():
                name, arguments = part.name, ""
            case CallArguments():
                arguments += part.text
            case CallEnded():
                calls.append(Call(name=name, arguments=arguments))
            case CallBroken():
                name, arguments = "", ""
    return "".join(prose), "".join(thoughts), calls
