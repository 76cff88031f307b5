"""Formats in which models write tool calls, and which of them a chat template teaches."""

from collections.abc import Callable, Collection, Mapping
from typing import Protocol

from appliance.api.parts import CallParser
from appliance.api.tool_parsers.hermes import CLOSER, OPENER, HermesCalls
from appliance.api.tool_parsers.llama import TAG, LlamaCalls
from appliance.core.types import Record


class MakeParser(Protocol):
    """Makes the parser of one answer."""

    def __call__(
        self, names: Collection[str], *, eager: bool, max_calls: int | None
    ) -> CallParser: ...


class CallWords(Record, frozen=True, kw_only=True):
    """The text around a call: `trigger before NAME, key: ARGUMENTS after`, and `between` two."""

    trigger: str
    """The tag that announces a call; empty when nothing does."""
    before: str
    key: str
    after: str
    between: str


class ToolFormat(Record, frozen=True, kw_only=True):
    """How a family of models writes its calls."""

    name: str
    make: MakeParser
    words: CallWords
    markers: tuple[str, ...]
    """Must reach the parser, even where the tokenizer holds them for markup."""
    taught_by: Callable[[str], bool]
    """Does this chat template teach the format?"""


def _teaches_hermes(template: str) -> bool:
    return OPENER in template and "<function=" not in template


def _teaches_llama(template: str) -> bool:
    return TAG in template or '"parameters": dictionary of argument name' in template


FORMATS: Mapping[str, ToolFormat] = {
    "hermes": ToolFormat(
        name="hermes",
        make=HermesCalls,
        words=CallWords(
            trigger=OPENER,
            before='\n{"name": ',
            key="arguments",
            after="}\n" + CLOSER,
            between="\n",
        ),
        markers=(OPENER, CLOSER),
        taught_by=_teaches_hermes,
    ),
    "llama3_json": ToolFormat(
        name="llama3_json",
        make=LlamaCalls,
        words=CallWords(trigger="", before='{"name": ', key="parameters", after="}", between="; "),
        markers=(TAG,),
        taught_by=_teaches_llama,
    ),
}
"""Formats by the name that the configuration uses, in the order in which templates are asked."""
