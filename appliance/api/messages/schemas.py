"""The bodies of /v1/messages, field by field, and the blocks of its messages by type.

Fields that decide how tokens are drawn, and this server's own, are those of chat completions.
"""

from typing import Any

import msgspec

from appliance.api.schemas import REFUSED, GenerationBody, Refused


class TextBlock(msgspec.Struct):
    """A block of text."""

    type: str
    text: str | None = None


class ToolUseBlock(msgspec.Struct):
    """A call of an earlier answer."""

    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(msgspec.Struct):
    """What a call gave."""

    tool_use_id: str
    content: str | list[TextBlock] | None = None


class ThinkingBlock(msgspec.Struct):
    """Thoughts of an earlier answer."""

    thinking: str


class MessageBody(msgspec.Struct):
    """One turn; blocks are read by their type."""

    role: str
    content: str | list[dict[str, Any]]


class SchemaTool(msgspec.Struct):
    """A tool; only those that the client runs are served (`type` "custom" or none)."""

    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    type: str | None = None
    strict: bool | None = None


class ToolChoiceBody(msgspec.Struct):
    """`type` "auto", "any", "tool" or "none"."""

    type: str
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingBody(msgspec.Struct):
    """`type` "disabled", "adaptive" or "enabled" (then `budget_tokens` is a wish)."""

    type: str
    budget_tokens: int | None = None


class OutputFormat(msgspec.Struct):
    """What the answer must be: `type` "json_schema"."""

    type: str
    schema: msgspec.Raw = msgspec.Raw()


class OutputConfig(msgspec.Struct):
    """`output_config` of a request."""

    effort: str | None = None
    format: OutputFormat | None = None


class MessagesBody(GenerationBody, kw_only=True):
    """POST /v1/messages; `count_tokens` reads the part of it that makes the prompt."""

    messages: list[MessageBody]
    system: str | list[TextBlock] | None = None
    stop_sequences: list[str] | None = None
    tools: list[SchemaTool] | None = None
    tool_choice: ToolChoiceBody | None = None
    thinking: ThinkingBody | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def _never(_: Any) -> bool:
    return False


def _empty(value: Any) -> bool:
    return value in ([], {})


def _keeps_all(value: Any) -> bool:
    """An edit of the context that takes nothing away."""
    edits = value.get("edits", []) if isinstance(value, dict) else None
    return isinstance(edits, list) and all(
        isinstance(edit, dict) and edit.get("keep") == "all" for edit in edits
    )


OWN = frozenset({"tools", "tool_choice", "thinking"})
MESSAGES_REFUSED: Refused = {
    **{name: harmless for name, harmless in REFUSED.items() if name not in OWN},
    "container": _never,
    "context_management": _keeps_all,
    "mcp_servers": _empty,
    "speed": lambda value: value == "standard",
}
"""Beside those of chat completions: what another server than this would have to do."""
