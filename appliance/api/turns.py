"""The messages of a conversation as a chat template wants them: role, text, calls, results."""

from collections.abc import Sequence
from typing import Any

import msgspec

from appliance.api.errors import ApiError, shown
from appliance.api.schemas import Message, ToolCallBody
from appliance.api.validate import invalid

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})


def turns_of(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Turns for the template. Raises `ApiError`.

    A tool's result must answer a call of an earlier turn."""
    if not messages:
        raise invalid("messages", "is empty; give at least one message.")
    called: set[str] = set()
    return [
        _turn(message, f"messages[{index}]", called=called)
        for index, message in enumerate(messages)
    ]


def _turn(message: Message, at: str, *, called: set[str]) -> dict[str, Any]:
    if message.role not in ROLES:
        raise ApiError(
            f"'{at}.role' is {shown(message.role)}; roles served are {', '.join(sorted(ROLES))}.",
            code="unsupported_value",
            param=f"{at}.role",
        )
    for name in ("function_call", "audio"):
        if getattr(message, name):
            raise ApiError(
                f"'{at}.{name}' is not supported; leave it out.",
                code="unsupported_parameter",
                param=f"{at}.{name}",
            )
    _check_belongs(message, at)
    turn: dict[str, Any] = {"role": message.role}
    if message.tool_calls and message.content is None:
        turn["content"] = ""
    else:
        turn["content"] = _text(message, at)
    if message.name is not None:
        turn["name"] = message.name
    if message.reasoning_content:
        turn["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        turn["tool_calls"] = [_call(call, at) for call in message.tool_calls]
        called.update(call.id for call in message.tool_calls)
    if message.role == "tool":
        turn["tool_call_id"] = _answered(message.tool_call_id, f"{at}.tool_call_id", called=called)
    return turn


def _check_belongs(message: Message, at: str) -> None:
    for name, role in (
        ("tool_calls", "assistant"),
        ("reasoning_content", "assistant"),
        ("tool_call_id", "tool"),
    ):
        if getattr(message, name) and message.role != role:
            raise invalid(f"{at}.{name}", f"is only allowed in a message of role '{role}'.")


def _call(call: ToolCallBody, at: str) -> dict[str, Any]:
    if call.type != "function":
        raise ApiError(
            f"'{at}.tool_calls' has the type {shown(call.type)}; only 'function' is served.",
            code="unsupported_value",
            param=f"{at}.tool_calls",
        )
    return call_turn(call.id, call.function.name, call.function.arguments)


def call_turn(name_of_call: str, function: str, arguments: str) -> dict[str, Any]:
    """One earlier call for the template, which wants its arguments as an object."""
    return {
        "id": name_of_call,
        "type": "function",
        "function": {"name": function, "arguments": loaded_arguments(arguments)},
    }


def loaded_arguments(text: str) -> Any:
    """The object that an earlier call's arguments are; the text itself when they are none."""
    try:
        value = msgspec.json.decode(text)
    except (msgspec.MsgspecError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def _answered(call_id: str | None, at: str, *, called: set[str]) -> str:
    if call_id is None:
        raise invalid(at, "is missing; name the call that this message answers.")
    if call_id not in called:
        raise invalid(at, f"is {shown(call_id)}, which no call of an earlier message has.")
    return call_id


def _text(message: Message, at: str) -> str:
    if message.content is None:
        raise invalid(f"{at}.content", "is missing; give a string or a list of text parts.")
    if isinstance(message.content, str):
        return message.content
    texts = []
    for index, part in enumerate(message.content):
        where = f"{at}.content[{index}]"
        if part.type != "text":
            raise ApiError(
                f"'{where}.type' is {shown(part.type)}; only parts of type 'text' are served.",
                code="unsupported_value",
                param=f"{where}.type",
            )
        if part.text is None:
            raise invalid(f"{where}.text", "is missing; it is required in a text part.")
        texts.append(part.text)
    return "".join(texts)
