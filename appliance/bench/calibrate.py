"""The unloaded server: what a prompt and a token take when nothing else is there.

Targets relative to that transfer between machines, absolute ones say whether it is useful (see
`appliance.workload.spec`)."""

from statistics import linear_regression, median
from time import perf_counter

import msgspec

from appliance.bench.bodies import Targets, make_body
from appliance.bench.connection import Pool
from appliance.bench.target import BenchError, Target, ask
from appliance.core.types import Slo
from appliance.workload.items import Item
from appliance.workload.spec import Calibration

REPEATS = 5
OUTPUT_TOKENS = 24
SHARES = (0.02, 0.15, 0.4)
"""Of the longest prompt: the lengths that are tried."""
LONGEST = 4096
"""Tokens, where the server does not say what it takes."""


async def calibrate(pool: Pool, target: Target) -> Calibration:
    """One request at a time, each with a prompt of its own; medians, and a line through them.
    Raises `BenchError` where the server does not answer."""
    longest = target.max_model_len or LONGEST
    lengths = [max(8, round(share * longest)) for share in SHARES]
    firsts: list[float] = []
    tokens: list[float] = []
    for length in lengths:
        pairs = [await _one(pool, target, length, turn) for turn in range(REPEATS)]
        firsts.append(median(first for first, _ in pairs))
        tokens += [token for _, token in pairs if token is not None]
    if not tokens:
        raise BenchError("calibration: no answer had text in two events, so no time per token")
    slope, intercept = linear_regression([float(length) for length in lengths], firsts)
    slope = max(0.0, slope)
    rest = intercept if slope else median(firsts)
    return Calibration(a=max(0.0, rest), b=slope, tpot0=median(tokens))


async def _one(pool: Pool, target: Target, length: int, turn: int) -> tuple[float, float | None]:
    """Seconds to the first token, and per token after it; None if all text came in one event (a
    small model may go on with tokens that have none)."""
    item = Item(
        index=turn,
        at=0.0,
        class_name="calibration",
        prompt_tokens=length,
        output_tokens=OUTPUT_TOKENS,
        max_tokens=OUTPUT_TOKENS,
        slo=Slo(),
    )
    settings = msgspec.structs.replace(target.settings, targets={"calibration": Targets.NONE})
    prompt = target.prompts(f"calibration/{length}/{perf_counter()}")(item)
    body = make_body(item, prompt=prompt, settings=settings)
    request = target.address.head(settings.route.path)(len(body)) + body
    sent = perf_counter()
    answer = await ask(pool, request)
    if not answer.finished or not answer.times:
        raise BenchError(
            f"calibration: a prompt of {length} tokens was not answered with {OUTPUT_TOKENS} "
            f"({answer.error or 'none came'}: {answer.message})"
        )
    first, last = answer.times[0], answer.times[-1]
    if len(answer.times) < 2:
        return first - sent, None
    return first - sent, (last - first) / (max(answer.num_tokens, 2) - 1)
