"""The messages of /v1/messages as turns of a conversation."""

from collections.abc import Mapping, Sequence
from typing import Any

from appliance.api.decode import convert_at
from appliance.api.errors import ApiError, shown
from appliance.api.history import History
from appliance.api.messages.schemas import (
    MessagesBody,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from appliance.api.validate import invalid


def turns_of_messages(body: MessagesBody) -> list[dict[str, Any]]:
    """Turns for the template, the system's first. Raises `ApiError`."""
    history = History()
    system = _text(body.system or "", "system")
    if system:
        history.turn("system", system)
    if not body.messages:
        raise invalid("messages", "is empty; give at least one message.")
    for index, message in enumerate(body.messages):
        at = f"messages[{index}]"
        match message.role:
            case "user":
                _user(history, message.content, f"{at}.content")
            case "assistant":
                _assistant(history, message.content, f"{at}.content")
            case role:
                raise ApiError(
                    f"'{at}.role' is {shown(role)}; roles served are 'user' and 'assistant' "
                    "(the system's words have a field of their own).",
                    code="unsupported_value",
                    param=f"{at}.role",
                )
    if body.messages[-1].role == "assistant":
        raise ApiError(
            f"'messages[{len(body.messages) - 1}].role' is 'assistant': an answer cannot be begun "
            "for the model; end with a message of the user.",
            code="unsupported_value",
            param=f"messages[{len(body.messages) - 1}].role",
        )
    return history.done()


def _user(history: History, content: str | Sequence[Mapping[str, Any]], at: str) -> None:
    """Results of calls become turns of their own; texts are joined."""
    if isinstance(content, str):
        history.turn("user", content)
        return
    if not content:
        raise invalid(at, "is empty; give a text or at least one block.")
    texts: list[str] = []
    for index, block in enumerate(content):
        where = f"{at}[{index}]"
        match block.get("type"):
            case "text":
                texts.append(_text([convert_at(block, TextBlock, where)], at, first=index))
            case "tool_result":
                if texts:
                    history.turn("user", "".join(texts))
                    texts = []
                result = convert_at(block, ToolResultBlock, where)
                text = _text(result.content or "", f"{where}.content")
                history.result(result.tool_use_id, text, at=f"{where}.tool_use_id")
            case kind:
                raise _unserved(kind, where, "'text' and 'tool_result'")
    if texts:
        history.turn("user", "".join(texts))


def _assistant(history: History, content: str | Sequence[Mapping[str, Any]], at: str) -> None:
    if isinstance(content, str):
        history.prose(content)
        return
    for index, block in enumerate(content):
        where = f"{at}[{index}]"
        match block.get("type"):
            case "text":
                history.prose(_text([convert_at(block, TextBlock, where)], at, first=index))
            case "tool_use":
                call = convert_at(block, ToolUseBlock, where)
                history.call(call.id, call.name, call.input)
            case "thinking":
                history.thoughts(convert_at(block, ThinkingBlock, where).thinking)
            case kind:
                raise _unserved(kind, where, "'text', 'tool_use' and 'thinking'")


def _text(content: str | Sequence[TextBlock], at: str, *, first: int = 0) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for index, block in enumerate(content, first):
        if block.type != "text":
            raise _unserved(block.type, f"{at}[{index}]", "'text'")
        if block.text is None:
            raise invalid(f"{at}[{index}].text", "is missing; it is required in a text block.")
        texts.append(block.text)
    return "".join(texts)


def _unserved(kind: object, at: str, served: str) -> ApiError:
    return ApiError(
        f"'{at}.type' is {shown(kind)}; blocks served here are {served}.",
        code="unsupported_value",
        param=f"{at}.type",
    )
