"""From the text of one answer, as it comes, to its parts: the parsers of a request in a row."""

from collections.abc import Sequence

from appliance.api.parts import (
    CallBroken,
    CallEnded,
    CallParser,
    Part,
    Reasoning,
    Text,
    add_text,
)
from appliance.api.reasoning import ThoughtSplitter


class AnswerParser:
    """Reads one answer. Without a splitter and a call parser its text is one part per push."""

    def __init__(
        self,
        thoughts: ThoughtSplitter | None = None,
        calls: CallParser | None = None,
        *,
        stops: Sequence[str] = (),
    ) -> None:
        """`stops`: stop strings that the worker leaves in the text; one at the very end is cut off
        and remembered (a string like it before the end is text)."""
        self._thoughts = thoughts
        self._calls = calls
        self._stops = sorted(stops, key=len, reverse=True)
        self.stopped_by: str | None = None
        """The stop string that ended the answer, as far as it is known."""
        self.num_calls = 0
        """Complete calls so far."""
        self.broken = False
        """A call that was told broke off, so the answer is not one to act upon."""

    @property
    def thinking(self) -> bool:
        """Whether the next token is most likely a thought."""
        return self._thoughts is not None and self._thoughts.thinking

    def push(self, text: str) -> list[Part]:
        """Read on; the parts that became certain."""
        if self._stops:
            text = self._before_stop(text)
        if self._thoughts is None:
            return self._prose(text)
        thoughts, prose = self._thoughts.push(text)
        parts: list[Part] = [Reasoning(text=thoughts)] if thoughts else []
        return parts + self._prose(prose)

    def flush(self) -> list[Part]:
        """The answer is over: what was kept back."""
        thoughts, prose = ("", "") if self._thoughts is None else self._thoughts.flush()
        parts: list[Part] = [Reasoning(text=thoughts)] if thoughts else []
        parts += self._prose(prose)
        if self._calls is not None:
            last = self._counted(self._calls.flush())
            if last and isinstance(first := last[0], Text):
                add_text(parts, first.text)
                last = last[1:]
            parts += last
        return parts

    def finish_reason(self, reason: str) -> str:
        """The API's word: a natural end with calls is "tool_calls"."""
        called = self.num_calls > 0 and not self.broken
        return "tool_calls" if called and reason == "stop" else reason

    def _before_stop(self, text: str) -> str:
        """The text without the stop string that it ends with; one that was cut off before is put
        back when the answer goes on."""
        if text and self.stopped_by is not None:
            text, self.stopped_by = self.stopped_by + text, None
        for stop in self._stops:
            if text.endswith(stop):
                self.stopped_by = stop
                return text[: len(text) - len(stop)]
        return text

    def _prose(self, text: str) -> list[Part]:
        if not text:
            return []
        if self._calls is None:
            return [Text(text=text)]
        return self._counted(self._calls.push(text))

    def _counted(self, parts: list[Part]) -> list[Part]:
        for part in parts:
            if isinstance(part, CallEnded):
                self.num_calls += 1
            elif isinstance(part, CallBroken):
                self.broken = True
        return parts
