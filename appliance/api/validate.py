"""From a well-formed body to what the node is asked for: ranges, contradictions, defaults.

Nothing here knows of HTTP or of the node; each refusal names the field and the values it may have.
"""

from collections.abc import Mapping, Sequence

from appliance.api.errors import ApiError, shown
from appliance.api.schemas import ChatBody, CompletionBody, GenerationBody, StreamOptions
from appliance.core.payload import Sampling
from appliance.core.types import Record, Slo

MAX_STOP_TOKEN_IDS = 256
MAX_LOGPROBS = 20
MAX_BIASES = 1024
SEED_RANGE = 2**63


class Streaming(Record, frozen=True, kw_only=True):
    """What a stream says beside its text."""

    include_usage: bool = False
    continuous_usage: bool = False


class Limits(Record, frozen=True, kw_only=True):
    """Facts about the served model, and bounds of one request, that it is checked against."""

    max_model_len: int
    vocab_size: int
    max_sequences: int
    eos_token_ids: tuple[int, ...] = ()
    max_prompt_tokens: int | None = None
    """None: what the context has room for."""
    max_messages: int = 4096
    max_stop_strings: int = 16
    max_stop_length: int = 1024
    """Characters of one stop string."""


class Plan(Record, frozen=True, kw_only=True):
    """One checked request, prompt aside. `max_tokens` None: as many as the context has room for."""

    sampling: Sampling
    max_tokens: int | None
    n: int
    slo: Slo
    salt: str
    priority: int
    seed: int | None
    streaming: Streaming | None
    logprobs: int | None


def invalid(param: str, message: str) -> ApiError:
    """A value outside its range."""
    return ApiError(f"'{param}' {message}", code="invalid_value", param=param)


def plan_of(body: ChatBody | CompletionBody, slo: Slo, limits: Limits, *, scope: str) -> Plan:
    """Check every field that is not the prompt. The caller's cached blocks stay within `scope`.
    Raises `ApiError`."""
    logprobs = chat_logprobs(body) if isinstance(body, ChatBody) else completion_logprobs(body)
    max_tokens = answer_limit(body)
    check_min_tokens(body.min_tokens, max_tokens)
    n = int(within("n", body.n, 1, low=1, high=limits.max_sequences))
    if isinstance(body, CompletionBody):
        check_best_of(body.best_of, n)
        check_echo(body)
    return Plan(
        sampling=sampling_of(body, logprobs, limits),
        max_tokens=max_tokens,
        n=n,
        slo=slo,
        salt=scope + salt_of(body.cache_salt),
        priority=int(within("priority", body.priority, 0, low=-(2**31), high=2**31 - 1)),
        seed=seed_of(body),
        streaming=streaming_of(body.stream, body.stream_options),
        logprobs=logprobs,
    )


def within(name: str, value: float | None, default: float, *, low: float, high: float) -> float:
    """`value`, or `default` when not given. Raises `ApiError` outside `low..high`."""
    if value is None:
        return default
    if not low <= value <= high:
        raise invalid(name, f"must be between {low:g} and {high:g}, not {shown(value)}.")
    return value


def sampling_of(body: GenerationBody, logprobs: int | None, limits: Limits) -> Sampling:
    """How tokens are drawn. `top_p` 0 keeps the single best token."""
    top_p = within("top_p", body.top_p, 1.0, low=0.0, high=1.0)
    top_k = top_k_of(body.top_k, limits.vocab_size)
    if top_p == 0.0:
        top_p, top_k = 1.0, 1
    skip_special = body.skip_special_tokens
    return Sampling(
        temperature=within("temperature", body.temperature, 1.0, low=0.0, high=2.0),
        top_k=top_k,
        top_p=top_p,
        min_p=within("min_p", body.min_p, 0.0, low=0.0, high=1.0),
        presence_penalty=within("presence_penalty", body.presence_penalty, 0.0, low=-2.0, high=2.0),
        frequency_penalty=within(
            "frequency_penalty", body.frequency_penalty, 0.0, low=-2.0, high=2.0
        ),
        repetition_penalty=within(
            "repetition_penalty", body.repetition_penalty, 1.0, low=0.01, high=100.0
        ),
        logit_bias=biases_of(body.logit_bias, limits.vocab_size),
        min_tokens=body.min_tokens or 0,
        ignore_eos=bool(body.ignore_eos),
        eos_token_ids=limits.eos_token_ids,
        stop_token_ids=stop_ids_of(body.stop_token_ids, limits.vocab_size),
        stop=stop_of(body.stop, limits),
        include_stop=bool(body.include_stop_str_in_output),
        logprobs=logprobs,
        skip_special_tokens=True if skip_special is None else skip_special,
    )


def seed_of(body: GenerationBody) -> int | None:
    """The client's seed as a number in 0..2^63-1; `None` when the node shall draw one."""
    if body.seed is None:
        return None
    if not -SEED_RANGE <= body.seed < SEED_RANGE:
        raise invalid("seed", "must be a signed 64-bit integer.")
    return body.seed % SEED_RANGE


def top_k_of(value: int | None, vocab_size: int) -> int:
    """-1 and 0 switch the filter off."""
    if value is None or value == -1:
        return 0
    if value < 0:
        raise invalid("top_k", f"must be -1 or 0 (off) or positive, not {shown(value)}.")
    return 0 if value >= vocab_size else value


def stop_of(value: str | Sequence[str] | None, limits: Limits) -> tuple[str, ...]:
    """Stop strings; none of them empty."""
    strings = (value,) if isinstance(value, str) else tuple(value or ())
    most, longest = limits.max_stop_strings, limits.max_stop_length
    if len(strings) > most:
        raise invalid("stop", f"may name at most {most} strings, not {len(strings)}.")
    for text in strings:
        if not text:
            raise invalid("stop", "has an empty string; leave it out or give `null`.")
        if len(text) > longest:
            raise invalid("stop", f"has a string of more than {longest} characters.")
    return strings


def stop_ids_of(value: Sequence[int] | None, vocab_size: int) -> tuple[int, ...]:
    """Stop token ids, each one of the vocabulary."""
    ids = tuple(value or ())
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise invalid("stop_token_ids", f"may name at most {MAX_STOP_TOKEN_IDS} ids.")
    for token in ids:
        if not 0 <= token < vocab_size:
            raise invalid(
                "stop_token_ids", f"has {shown(token)}; ids go from 0 to {vocab_size - 1}."
            )
    return ids


def biases_of(value: Mapping[str, float] | None, vocab_size: int) -> tuple[tuple[int, float], ...]:
    """(token id, bias) from a map whose keys are ids in decimal digits."""
    given = value or {}
    if len(given) > MAX_BIASES:
        raise invalid("logit_bias", f"may name at most {MAX_BIASES} tokens, not {len(given)}.")
    biases: dict[int, float] = {}
    for name, bias in given.items():
        plain = name.isascii() and name.isdecimal() and len(name) <= 10
        if not plain or int(name) >= vocab_size or int(name) in biases:
            raise invalid(
                "logit_bias",
                f"has {shown(name)}; keys are ids from 0 to {vocab_size - 1}, once each.",
            )
        biases[int(name)] = within(f"logit_bias.{name}", bias, 0.0, low=-100.0, high=100.0)
    return tuple(biases.items())


def check_best_of(best_of: int | None, n: int) -> None:
    """Answers are not ranked: as many are made as are given."""
    if best_of not in (None, 1, n):
        raise ApiError(
            f"'best_of' is not supported with the value {shown(best_of)}; it may be 1 or 'n'.",
            code="unsupported_parameter",
            param="best_of",
        )


def check_echo(body: CompletionBody) -> None:
    """The prompt has no log-probabilities here."""
    if body.echo and body.logprobs is not None:
        raise ApiError(
            "'echo' is not supported together with 'logprobs'; leave one of them out.",
            code="unsupported_parameter",
            param="echo",
        )


def answer_limit(body: ChatBody | CompletionBody) -> int | None:
    """The explicit bound on the answer's tokens."""
    name, value = "max_tokens", body.max_tokens
    if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
        if value is not None and value != body.max_completion_tokens:
            raise invalid("max_tokens", "and 'max_completion_tokens' differ; give only the latter.")
        name, value = "max_completion_tokens", body.max_completion_tokens
    if value is not None and value < 1:
        raise invalid(name, f"must be at least 1, not {shown(value)}.")
    return value


def check_min_tokens(min_tokens: int | None, max_tokens: int | None) -> None:
    """`min_tokens` may not ask for more than `max_tokens` allows."""
    if min_tokens is None:
        return
    if min_tokens < 0:
        raise invalid("min_tokens", f"must be at least 0, not {shown(min_tokens)}.")
    if max_tokens is not None and min_tokens > max_tokens:
        raise invalid(
            "min_tokens", f"is {min_tokens} and may not be over the answer's limit of {max_tokens}."
        )


def chat_logprobs(body: ChatBody) -> int | None:
    """Number of alternatives per token, or `None` for no log-probabilities."""
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs", "needs 'logprobs' to be true.")
    if not body.logprobs:
        return None
    return int(within("top_logprobs", body.top_logprobs, 0, low=0, high=MAX_LOGPROBS))


def completion_logprobs(body: CompletionBody) -> int | None:
    """Number of alternatives per token, or `None` for no log-probabilities."""
    if body.logprobs is None:
        return None
    return int(within("logprobs", body.logprobs, 0, low=0, high=MAX_LOGPROBS))


def streaming_of(stream: bool | None, options: StreamOptions | None) -> Streaming | None:
    """`None` for an answer in one piece."""
    if not stream:
        if options is not None:
            raise invalid("stream_options", "is only allowed with 'stream': true.")
        return None
    if options is None:
        return Streaming()
    if options.continuous_usage_stats and not options.include_usage:
        raise invalid(
            "stream_options.continuous_usage_stats", "needs 'stream_options.include_usage': true."
        )
    return Streaming(
        include_usage=bool(options.include_usage),
        continuous_usage=bool(options.continuous_usage_stats),
    )


def salt_of(value: str | None) -> str:
    """What keeps this client's cached blocks apart from others'."""
    if value is None:
        return ""
    if not 0 < len(value) <= 256:
        raise invalid("cache_salt", "must have between 1 and 256 characters.")
    return value


def check_model(name: str | None, served: str) -> None:
    """Raise `ApiError` 404 unless the request names the served model, or none."""
    if name is not None and name != served:
        raise ApiError(
            f"The model {shown(name)} does not exist here; this server has {shown(served)}.",
            status=404,
            code="model_not_found",
            param="model",
        )


def check_total(prompts: int, n: int, limits: Limits) -> None:
    """Raise `ApiError` when one request asks for too many answers."""
    if prompts * n > limits.max_sequences:
        raise invalid(
            "prompt",
            f"times 'n' asks for {prompts * n} answers; at most {limits.max_sequences} "
            "are given to one request.",
        )
