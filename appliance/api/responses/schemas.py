"""The body of /v1/responses, field by field, and the items of its input by type.

Fields that decide how tokens are drawn, and this server's own, are those of chat completions.
"""

from typing import Any

import msgspec

from appliance.api.schemas import REFUSED, GenerationBody, Refused


class FlatTool(msgspec.Struct):
    """A tool; only `type` "function" is served."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class TextFormat(msgspec.Struct):
    """What the answer must be: `type` "text", "json_object" or "json_schema"."""

    type: str
    name: str | None = None
    description: str | None = None
    schema: msgspec.Raw = msgspec.Raw()
    strict: bool | None = None


class TextConfig(msgspec.Struct):
    """`text` of a request."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ReasoningConfig(msgspec.Struct):
    """`reasoning` of a request."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class ResponsesBody(GenerationBody, kw_only=True):
    """POST /v1/responses"""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    tools: list[FlatTool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    truncation: str | None = None
    include: list[str] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class Part(msgspec.Struct):
    """One part of a message, an output or a thought."""

    type: str
    text: str | None = None


class MessageItem(msgspec.Struct):
    """A message; its `type` may be left out."""

    role: str
    content: str | list[Part]


class CallItem(msgspec.Struct):
    """A call of an earlier answer; `arguments` is JSON in a string."""

    call_id: str
    name: str
    arguments: str = "{}"


class CallOutputItem(msgspec.Struct):
    """What a call gave."""

    call_id: str
    output: str | list[Part]


class ReasoningItem(msgspec.Struct):
    """Thoughts of an earlier answer."""

    content: list[Part] | None = None


def _never(_: Any) -> bool:
    return False


def _off(value: Any) -> bool:
    return value is False


def _zero(value: Any) -> bool:
    return type(value) is int and value == 0


RESPONSES_REFUSED: Refused = {
    **{name: harmless for name, harmless in REFUSED.items() if name not in ("tools", "reasoning")},
    "background": _off,
    "context_management": lambda value: value == [],
    "conversation": _never,
    "max_tool_calls": _never,
    "messages": _never,
    "previous_response_id": _never,
    "prompt": _never,
    "top_logprobs": _zero,
}
"""Beside those of chat completions: what needs stored responses, or another server than this."""
