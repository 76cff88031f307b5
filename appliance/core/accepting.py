"""Which sequences a worker can serve at all, whatever else it does."""

from appliance.core.blocks import BlockLedger
from appliance.core.types import BatcherConfig, ErrorKind, Request


def limit_of(request: Request, config: BatcherConfig) -> int:
    """Known tokens (prompt and answer) at which this request ends for length."""
    return min(request.prompt_tokens + request.max_tokens, config.max_model_len)


def why_not(
    request: Request, emitted_tokens: int, *, config: BatcherConfig, ledger: BlockLedger
) -> tuple[ErrorKind, str] | None:
    """Why a sequence of this request, after `emitted_tokens` tokens, cannot be served in these
    bounds; None when it can."""
    limit = limit_of(request, config)
    prompt, known = request.prompt_tokens, request.prompt_tokens + emitted_tokens
    if prompt < 1 or request.max_tokens < 1:
        return ErrorKind.INTERNAL, (
            f"prompt_tokens {prompt} and max_tokens {request.max_tokens} must be at least 1"
        )
    if prompt >= config.max_model_len:
        return ErrorKind.TOO_LONG, (
            f"the prompt has {prompt} tokens; with max_model_len {config.max_model_len} it may "
            f"have {config.max_model_len - 1}"
        )
    if known >= limit:
        return ErrorKind.INTERNAL, (
            f"{emitted_tokens} tokens were emitted already, {limit - prompt} are allowed: nothing "
            "is left to do"
        )
    if len(request.prefix_hashes) > known // ledger.block_tokens:
        return ErrorKind.INTERNAL, (
            f"{len(request.prefix_hashes)} prefix_hashes for {known} tokens in blocks of "
            f"{ledger.block_tokens}"
        )
    lacking = ledger.lacking(limit - 1)
    if lacking is not None:
        spec, needed = lacking
        return ErrorKind.TOO_LONG, (
            f"prompt ({prompt} tokens) and max_tokens ({request.max_tokens}) need {needed} "
            f"blocks of {spec.block_tokens} tokens in cache group {spec.name!r}, there are "
            f"{spec.num_blocks}; lower max_tokens or give the worker more KV memory"
        )
    return None
