"""The input of /v1/responses as turns of a conversation."""

from collections.abc import Sequence
from typing import Any

from appliance.api.decode import convert_at
from appliance.api.errors import ApiError, shown
from appliance.api.history import History
from appliance.api.responses.schemas import (
    CallItem,
    CallOutputItem,
    MessageItem,
    Part,
    ReasoningItem,
    ResponsesBody,
)
from appliance.api.turns import loaded_arguments
from appliance.api.validate import invalid

ROLES = frozenset({"system", "developer", "user", "assistant"})
TEXT_PARTS = frozenset({"input_text", "output_text", "text"})
THOUGHT_PARTS = frozenset({"reasoning_text", "text"})


def turns_of_input(body: ResponsesBody) -> list[dict[str, Any]]:
    """Turns for the template, the instructions first. Raises `ApiError`."""
    history = History()
    if body.instructions:
        history.turn("system", body.instructions)
    if isinstance(body.input, str):
        history.turn("user", body.input)
        return history.done()
    if not body.input:
        raise invalid("input", "is empty; give a text or at least one item.")
    for index, item in enumerate(body.input):
        _tell(history, item, f"input[{index}]")
    return history.done()


def _tell(history: History, item: dict[str, Any], at: str) -> None:
    match item.get("type", "message"):
        case "message":
            message = convert_at(item, MessageItem, at)
            _message(history, message, at)
        case "function_call":
            call = convert_at(item, CallItem, at)
            history.call(call.call_id, call.name, loaded_arguments(call.arguments))
        case "function_call_output":
            output = convert_at(item, CallOutputItem, at)
            text = _text(output.output, f"{at}.output", TEXT_PARTS)
            history.result(output.call_id, text, at=f"{at}.call_id")
        case "reasoning":
            reasoning = convert_at(item, ReasoningItem, at)
            history.thoughts(_text(reasoning.content or [], f"{at}.content", THOUGHT_PARTS))
        case kind:
            raise ApiError(
                f"'{at}.type' is {shown(kind)}; items served are 'message', 'function_call', "
                "'function_call_output' and 'reasoning'.",
                code="unsupported_value",
                param=f"{at}.type",
            )


def _message(history: History, message: MessageItem, at: str) -> None:
    if message.role not in ROLES:
        raise ApiError(
            f"'{at}.role' is {shown(message.role)}; roles served are {', '.join(sorted(ROLES))}.",
            code="unsupported_value",
            param=f"{at}.role",
        )
    text = _text(message.content, f"{at}.content", TEXT_PARTS)
    if message.role == "assistant":
        history.prose(text)
    else:
        history.turn(message.role, text)


def _text(content: str | Sequence[Part], at: str, kinds: frozenset[str]) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for index, part in enumerate(content):
        if part.type not in kinds:
            raise ApiError(
                f"'{at}[{index}].type' is {shown(part.type)}; parts served here are "
                f"{', '.join(sorted(kinds))}.",
                code="unsupported_value",
                param=f"{at}[{index}].type",
            )
        if part.text is None:
            raise invalid(f"{at}[{index}].text", "is missing; it is required in this part.")
        texts.append(part.text)
    return "".join(texts)
