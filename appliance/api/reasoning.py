"""Thoughts before the answer: `<think>...</think>` and then the prose.

Some templates leave the opening tag to the model, others write it at the end of the prompt, so that
the answer begins within the thoughts. Only thoughts at the beginning are split off; white space
around the tags is neither thought nor prose. An answer that never closes its thoughts is thoughts
altogether.
"""

from enum import Enum, auto

from appliance.api.parts import held_back

OPENER = "<think>"
CLOSER = "</think>"


class _Place(Enum):
    BEFORE = auto()
    """Nothing but white space or a part of the opening tag was read."""
    INSIDE = auto()
    BEHIND = auto()
    """Right behind the closing tag: white space is skipped."""
    PROSE = auto()


class ThoughtSplitter:
    """Splits one answer."""

    def __init__(self, *, inside: bool) -> None:
        """`inside`: the prompt ended with the opening tag."""
        self._inside = inside
        self._place = _Place.BEFORE
        self._kept = ""
        self._begun = False
        """A thought was told: white space counts."""

    @property
    def thinking(self) -> bool:
        """Whether what comes next is thoughts, as far as it is known."""
        return self._place is _Place.INSIDE or (self._inside and self._place is _Place.BEFORE)

    def push(self, text: str) -> tuple[str, str]:
        """Read on; thoughts and prose that became certain."""
        if self._place is _Place.PROSE:
            return "", text
        text, self._kept = self._kept + text, ""
        if self._place is _Place.BEFORE and (text := self._begin(text)) == "":
            return "", ""
        thoughts = ""
        if self._place is _Place.INSIDE:
            thoughts, text = self._think(text)
        if self._place is _Place.BEHIND and (text := text.lstrip()):
            self._place = _Place.PROSE
        return thoughts, text

    def flush(self) -> tuple[str, str]:
        """The answer is over: what was kept back."""
        kept, self._kept = self._kept, ""
        if self.thinking:
            return kept.rstrip() if self._begun else kept.strip(), ""
        return "", kept

    def _begin(self, text: str) -> str:
        """The text behind an opening tag, if there is one; "" when that is not known yet."""
        stripped = text.lstrip()
        if OPENER.startswith(stripped):  # so does the empty text
            if stripped == OPENER:
                self._place = _Place.INSIDE
            else:
                self._kept = text
            return ""
        opened = stripped.startswith(OPENER)
        self._place = _Place.INSIDE if opened or self._inside else _Place.PROSE
        return stripped[len(OPENER) :] if opened else text

    def _think(self, text: str) -> tuple[str, str]:
        """Thoughts, and the text behind the closing tag."""
        at = text.find(CLOSER)
        if at >= 0:
            self._place = _Place.BEHIND
            return self._told(text[:at].rstrip()), text[at + len(CLOSER) :]
        keep = held_back(text, CLOSER)
        self._kept = text[len(text) - keep :]
        return self._told(text[: len(text) - keep]), ""

    def _told(self, thoughts: str) -> str:
        if not self._begun:
            thoughts = thoughts.lstrip()
        self._begun = self._begun or bool(thoughts)
        return thoughts
