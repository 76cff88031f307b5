"""How the served model speaks: whether its template knows tools and thoughts, and in what form.

Both are read off the chat template, as far as the operator does not say otherwise. A request that
wants what the model cannot do is refused by name.
"""

from collections.abc import Collection
from typing import Any

from aiohttp import web

from appliance.api.answer import AnswerParser
from appliance.api.errors import ApiError
from appliance.api.reasoning import CLOSER, OPENER, ThoughtSplitter
from appliance.api.settings import ApiSettings
from appliance.api.tool_parsers import FORMATS, ToolFormat
from appliance.core.types import Record
from appliance.live.records import Encoded
from appliance.live.tokenise import TextService

SWITCH = "enable_thinking"
"""Variable by which templates let thoughts be switched off."""
SINGLE = "only supports single tool-calls"
"""What a template says that refuses an earlier answer with several calls."""
TAIL = 16
"""Last tokens of a prompt in which an opening tag is looked for."""


class Speech(Record, frozen=True, kw_only=True):
    """What the model's chat template can do."""

    tool_format: ToolFormat | None
    """How it writes tool calls; None: tools cannot be served."""
    no_tools: str
    """Why not, in words."""
    single_call: bool = False
    """The template takes no answer with more than one call."""
    reasons: bool
    """Answers may begin with thoughts."""
    switch: bool
    """The template takes `SWITCH`."""
    special: frozenset[str]
    """Tags that the tokenizer takes for markup, so that workers would drop them."""

    def quiet(self, param: str) -> dict[str, Any]:
        """Template variables by which the model does not think. Raises `ApiError` naming `param`
        when it thinks and cannot be told not to."""
        if not self.reasons:
            return {}
        if not self.switch:
            raise ApiError(
                f"'{param}' asks for an answer without reasoning, which this model's chat template "
                "cannot switch off; leave it out.",
                code="unsupported_parameter",
                param=param,
            )
        return {SWITCH: False}


class Reading(Record, frozen=True, kw_only=True):
    """How the answers to one request are read."""

    tool_format: ToolFormat | None = None
    names: Collection[str] = ()
    """Tools that may be called."""
    max_calls: int | None = None
    reasons: bool = False
    inside: bool = False
    """Answers begin within the thoughts."""
    stops: tuple[str, ...] = ()
    """Stop strings that the worker leaves in the text."""

    @property
    def plain(self) -> bool:
        """Whether the text is the answer, with nothing to be read from it."""
        return self.tool_format is None and not self.reasons and not self.stops

    def parser(self, *, eager: bool) -> AnswerParser:
        """A parser for one answer; an eager one tells calls while they are written."""
        calls = None
        if self.tool_format is not None:
            calls = self.tool_format.make(self.names, eager=eager, max_calls=self.max_calls)
        thoughts = ThoughtSplitter(inside=self.inside) if self.reasons else None
        return AnswerParser(thoughts, calls, stops=self.stops)


SPEECH = web.AppKey("speech", Speech)


def speech_of(text: TextService, settings: ApiSettings) -> Speech:
    """What can be known before the first request."""
    templates = text.templates
    template = templates.source(tools=True)
    variables = templates.variables(tools=False)
    found = next((known for known in FORMATS.values() if known.taught_by(template)), None)
    if settings.tool_format != "auto":
        found = FORMATS.get(settings.tool_format)
    no_tools = ""
    if "tools" not in templates.variables(tools=True):
        found, no_tools = None, "this model's chat template has no place for tools"
    elif found is None and settings.tool_format == "auto":
        no_tools = "this model's chat template writes calls in a form that is not known here"
    elif found is None:
        no_tools = "tools are switched off (model.tool_format)"
    reasons = settings.reasoning == "think"
    if settings.reasoning == "auto":
        reasons = CLOSER in templates.source(tools=False)
    markers = (*(found.markers if found else ()), *((OPENER, CLOSER) if reasons else ()))
    return Speech(
        tool_format=found,
        no_tools=no_tools,
        single_call=SINGLE in template,
        reasons=reasons,
        switch=SWITCH in variables,
        special=frozenset(marker for marker in markers if text.is_special(marker)),
    )


async def begins_inside(text: TextService, prompt: Encoded) -> bool:
    """Whether the prompt ends with the opening tag of thoughts."""
    tail = await text.decode(prompt.ids[-TAIL:], skip_special_tokens=False)
    return tail.rstrip().endswith(OPENER)
