"""The request bodies, field by field.

Only fields that this server acts on (or may safely accept) are in a struct. Fields of the OpenAI
API, or of the extensions that other servers made common, that would change the answer and are not
built are in `REFUSED`: each with the values that mean "as if it were not there". Everything else is
unknown.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import msgspec

Ids = list[int]


class ContentPart(msgspec.Struct):
    """One part of a message; only `type` "text" is served."""

    type: str
    text: str | None = None


class FunctionCallBody(msgspec.Struct):
    """What an earlier answer called: `arguments` is JSON in a string."""

    name: str
    arguments: str = "{}"


class ToolCallBody(msgspec.Struct):
    """One call of an earlier answer."""

    id: str
    function: FunctionCallBody
    type: str = "function"


class Message(msgspec.Struct):
    """One turn of a conversation."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCallBody] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    function_call: Any = None
    audio: Any = None


class FunctionBody(msgspec.Struct):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolBody(msgspec.Struct):
    """A tool; only `type` "function" is served."""

    type: str
    function: FunctionBody | None = None


class StreamOptions(msgspec.Struct):
    """How a stream reports its usage."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchemaFormat(msgspec.Struct):
    """The schema of a `response_format`; without `strict`, what cannot be enforced is ignored."""

    name: str | None = None
    description: str | None = None
    schema: msgspec.Raw = msgspec.Raw()
    strict: bool | None = None


class ResponseFormat(msgspec.Struct):
    """What the answer must be: `type` "text", "json_object" or "json_schema"."""

    type: str
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(msgspec.Struct, forbid_unknown_fields=True):
    """What the answer must be, in one of these forms."""

    json: msgspec.Raw = msgspec.Raw()
    regex: str | None = None
    choice: list[str] | None = None
    json_object: bool | None = None


class SloBody(msgspec.Struct, forbid_unknown_fields=True):
    """Latency targets of one request, in milliseconds; what is not given comes from the class."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None
    class_name: str | None = msgspec.field(name="class", default=None)


class GenerationBody(msgspec.Struct, kw_only=True):
    """What chat and plain completions share. `None` everywhere means "not given"."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: msgspec.Raw = msgspec.Raw()
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    seed: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    slo: str | SloBody | None = None
    ttft_slo_ms: float | None = None
    tpot_slo_ms: float | None = None
    ttlt_slo_ms: float | None = None
    priority: int | None = None
    """Not looked at by the policy fcfs, which says so in x-appliance-ignored."""
    cache_salt: str | None = None
    add_special_tokens: bool | None = None
    user: str | None = None
    metadata: Any = None
    store: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    parallel_tool_calls: bool | None = None
    """Says nothing without tools."""


class ChatBody(GenerationBody, kw_only=True):
    """POST /v1/chat/completions"""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[ToolBody] | None = None
    tool_choice: str | dict[str, Any] | None = None
    reasoning_effort: str | None = None


class CompletionBody(GenerationBody, kw_only=True):
    """POST /v1/completions"""

    prompt: str | list[str | int | Ids]
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None


class TokenizeBody(msgspec.Struct, kw_only=True):
    """POST /tokenize: a prompt or messages, one of them."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeBody(msgspec.Struct, kw_only=True):
    """POST /detokenize"""

    model: str | None = None
    tokens: list[int]


def fields_of(schema: type[msgspec.Struct]) -> frozenset[str]:
    """Names that a body of this schema may have, as written in JSON."""
    return frozenset(schema.__struct_encode_fields__)


def _one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value in values and type(value) in {type(v) for v in values}


def _number(neutral: float) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, int | float) and not isinstance(value, bool) and value == neutral
    )


def _empty(value: Any) -> bool:
    return value in ("", [], {}) or value is False


def _never(_: Any) -> bool:
    return False


Refused: TypeAlias = "Mapping[str, Callable[[Any], bool]]"
"""Field -> does this value leave the answer as it is? `null` always does."""

REFUSED: Refused = {
    "length_penalty": _number(1),
    "no_repeat_ngram_size": _number(0),
    "logits_processors": _empty,
    "allowed_token_ids": _empty,
    "bad_words": _empty,
    "best_of": _number(1),
    "use_beam_search": _empty,
    "echo": _empty,
    "suffix": _empty,
    "prompt_logprobs": _empty,
    "prompt_embeds": _empty,
    "truncate_prompt_tokens": _empty,
    "tools": _empty,
    "tool_choice": _one_of("none"),
    "functions": _empty,
    "function_call": _one_of("none"),
    "modalities": _one_of(["text"]),
    "audio": _empty,
    "prediction": _empty,
    "reasoning": _empty,
    "reasoning_effort": _one_of("none"),
    "thinking": _empty,
    "thinking_token_budget": _empty,
    "verbosity": _one_of("medium"),
    "web_search_options": _never,
    "guided_grammar": _empty,
    "chat_template": _empty,
    "documents": _empty,
    "continue_final_message": _empty,
    "mm_processor_kwargs": _empty,
    "detokenize": _one_of(True),
    "spaces_between_special_tokens": _one_of(True),
    "return_tokens_as_token_ids": _empty,
    "return_token_ids": _empty,
}
"""Of chat and plain completions."""

COMPLETIONS_REFUSED: Refused = {**REFUSED, "max_completion_tokens": _never, "top_logprobs": _never}
"""Of plain completions, where `max_tokens` and `logprobs` mean these."""
