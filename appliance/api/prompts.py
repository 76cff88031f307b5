"""Prompts: messages, texts and token ids, and whether they leave room for an answer."""

from array import array
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from appliance.api.errors import ApiError, shown
from appliance.api.validate import Limits, invalid
from appliance.core.types import ErrorKind
from appliance.live.chat_template import TemplateFailed, TemplateMissing
from appliance.live.records import Encoded
from appliance.live.tokenise import TextService, TooLong

DEFAULT_COMPLETION_TOKENS = 16
Prompt: TypeAlias = "str | array[int]"


def room_for(
    prompt_tokens: int, requested: int | None, limits: Limits, *, chat: bool, least: int = 0
) -> int:
    """How many tokens the answer may have; without a request at least the `least` it must have.
    Raises `ApiError` (`context_length_exceeded`) when the prompt leaves no room, or less than was
    asked for."""
    if prompt_tokens == 0:
        raise invalid("messages" if chat else "prompt", "has no tokens; give at least one.")
    rest = limits.max_model_len - prompt_tokens
    longest = limits.max_prompt_tokens
    if longest is not None and prompt_tokens > longest:
        raise ApiError(
            f"Your prompt has {prompt_tokens} tokens; this server takes at most {longest} "
            "(limits.max_prompt_tokens). Shorten it.",
            code=ErrorKind.TOO_LONG.value,
            param="messages" if chat else "prompt",
        )
    if rest < 1:
        raise too_long(limits, f"your prompt has {prompt_tokens} tokens", chat=chat)
    wanted = least if requested is None else requested
    if wanted > rest:
        raise too_long(
            limits,
            f"you asked for {prompt_tokens + wanted} tokens "
            f"({prompt_tokens} in the prompt, {wanted} for the answer)",
            chat=chat,
            param="min_tokens" if requested is None else "max_tokens",
        )
    if requested is not None:
        return requested
    return rest if chat else min(rest, max(least, DEFAULT_COMPLETION_TOKENS))


def too_long(limits: Limits, found: str, *, chat: bool, param: str | None = None) -> ApiError:
    """The error for what does not fit into the context."""
    return ApiError(
        f"This model's maximum context length is {limits.max_model_len} tokens, but {found}. "
        "Shorten the prompt or ask for fewer tokens.",
        code=ErrorKind.TOO_LONG.value,
        param=param or ("messages" if chat else "prompt"),
    )


def prompts_of(value: str | list[Any], limits: Limits) -> list[Prompt]:
    """The prompts of a completion: one text, texts, one list of ids, or lists of ids."""
    if isinstance(value, str):
        return [value]
    if not value:
        raise invalid("prompt", "is an empty list; give a string, strings, ids or lists of ids.")
    kinds = set(map(type, value))
    if kinds == {int}:
        return [_ids(value, "prompt", limits)]
    if kinds == {str}:
        return list(value)
    if kinds == {list}:
        return [_ids(item, f"prompt[{index}]", limits) for index, item in enumerate(value)]
    raise invalid("prompt", "mixes kinds; give only strings, only ids, or only lists of ids.")


def _ids(value: Sequence[int], at: str, limits: Limits) -> "array[int]":
    if not value:
        raise invalid(at, "is an empty list; give at least one token id.")
    if len(value) >= limits.max_model_len:
        raise too_long(limits, f"your prompt has {len(value)} tokens", chat=False, param=at)
    check_ids(value, at, limits.vocab_size)
    return array("i", value)


def check_ids(value: Sequence[int], at: str, vocab_size: int) -> None:
    """Raise `ApiError` unless every id is one of the vocabulary."""
    if value and (min(value) < 0 or max(value) >= vocab_size):
        index = next(i for i, token in enumerate(value) if not 0 <= token < vocab_size)
        raise invalid(
            at,
            f"has {shown(value[index])} at position {index}; ids go from 0 to {vocab_size - 1}.",
        )


async def encode_prompt(
    text: TextService, prompt: Prompt, *, add_special_tokens: bool, salt: str = ""
) -> Encoded:
    """Token ids of one prompt. Raises `ApiError` when it provably does not fit."""
    try:
        if isinstance(prompt, str):
            return await text.encode(prompt, add_special_tokens=add_special_tokens, salt=salt)
        return await text.encode_ids(prompt, salt=salt)
    except TooLong as error:
        raise hopeless(error, "prompt") from error


async def encode_turns(
    text: TextService,
    turns: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool,
    template_kwargs: Mapping[str, Any] | None,
    salt: str = "",
) -> Encoded:
    """Token ids of turns that were checked. Raises `ApiError` when the template has no use for
    them, or they do not fit."""
    try:
        return await text.encode_chat(
            turns,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            template_kwargs=template_kwargs,
            salt=salt,
        )
    except TooLong as error:
        raise hopeless(error, "messages") from error
    except (TemplateMissing, TemplateFailed) as error:
        raise ApiError(
            f"'messages' cannot be served: {error}", code="invalid_value", param="messages"
        ) from error


def hopeless(error: TooLong, param: str) -> ApiError:
    """The error for a prompt that was refused before it was tokenised."""
    return ApiError(
        f"'{param}' does not fit into this model's maximum context length: {error}.",
        code=ErrorKind.TOO_LONG.value,
        param=param,
    )
