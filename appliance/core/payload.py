"""What travels beside a message and the schedulers never open.

`SequenceState` is everything a worker needs to go on with a sequence at any point of its life, so
any worker can. `StepOutputs` is what one step gave to all streams, in columns: one object per step,
not one per token.
"""

from typing import Any

import msgspec

from appliance.core.types import RequestId


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How tokens are drawn and when the answer stops. `temperature` 0 is greedy. `top_k` 0, `top_p`
    1 and `min_p` 0 switch the filter off. `seed` is always set by the node (drawn when the client
    gave none), so a re-placed sequence goes on with the same draws: noise is a function of (seed,
    position).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    """Subtracted once from the logit of every token that the answer has."""
    frequency_penalty: float = 0.0
    """Subtracted once per occurrence in the answer."""
    repetition_penalty: float = 1.0
    """Divides the positive and multiplies the negative logits of tokens of prompt and answer."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its logit); ids are distinct."""
    grammar: str = ""
    """What the answer must be, in the notation of the llguidance library; empty: anything."""
    seed: int = 0
    min_tokens: int = 0
    ignore_eos: bool = False
    eos_token_ids: tuple[int, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    """Keep the stop string in the text."""
    logprobs: int | None = None
    """Number of alternatives to report beside the chosen token's log-probability; None: report
    none."""
    skip_special_tokens: bool = True


class SequenceState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The whole state of a sequence. Token ids are little-endian int32 bytes.

    `salt` and `adapter` enter the block hashes. `extra` is a place for state of decoding options
    (grammar, penalties) that need more than the ids."""

    prompt: bytes
    sampling: Sampling
    emitted: bytes = b""
    adapter: str | None = None
    salt: str = ""
    extra: dict[str, Any] = {}


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural-log probability of the chosen token and of the best alternatives, best first."""

    logprob: float
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


class StepOutputs(msgspec.Struct, kw_only=True, array_like=True):
    """Columns over the sequences that emitted in a step, in the order of `StepReported.ids`.

    `texts[i]` is the text that became certain with these tokens (may be empty while a character or
    a possible stop string is incomplete). `logprobs[i]` has one entry per token, or is None."""

    ids: list[RequestId]
    tokens: list[list[int]]
    texts: list[str]
    logprobs: list[list[TokenLogprobs] | None] | None = None
