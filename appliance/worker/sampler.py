"""Drawing the next token of every row of a step.

Order, as in common engines: what changes logits (`adjustments`: grammar, min_tokens, bias,
penalties), temperature, top_k, top_p over what top_k left, min_p. Filters are thresholds on values,
so equal logits are kept or dropped together. A token is drawn by inverting the cumulative
distribution in token order with one uniform number per row, which depends on (seed, position) only
(`philox`). All sums that decide run in sequence over a row in float64, so a row's token does not
depend on the rows beside it.

Log-probabilities are those of the raw logits: of the model, before any change or filter. So the
alternatives that are reported may be tokens that a grammar or a bias ruled out.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional

from appliance.core.payload import Sampling, TokenLogprobs
from appliance.worker.adjustments import MASKED, SampleRow, adjust
from appliance.worker.philox import uniforms

VECTOR = 32
"""Values that torch's widest vector kernel takes at a time; a multiple of it has no scalar tail."""
LEAST_TEMPERATURE = 1e-6
"""Lower ones are taken as this: a logit 0.0001 below the best has no chance either way, and in
float32 the quotients stay numbers."""
LOOKS = (64, 1024, 1 << 31)
"""How many of the largest values top_p looks at: first, then if that was too few, at last all."""


class Drawn(NamedTuple):
    token: int
    logprobs: TokenLogprobs | None


class NonFiniteLogits(ArithmeticError):
    """The model produced NaN or infinity for these rows."""

    def __init__(self, rows: Sequence[int]) -> None:
        super().__init__(f"logits of rows {list(rows)} are not finite")
        self.rows = tuple(rows)


def sample(logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[Drawn]:
    """Draw one token per row of `logits [R, vocab]` (float32). Raises `NonFiniteLogits`."""
    best = logits.amax(-1)
    if not bool(best.isfinite().all()):
        raise NonFiniteLogits(best.isfinite().logical_not().nonzero().flatten().tolist())
    adjusted = adjust(logits, rows)
    tokens = adjusted.argmax(-1)
    random = [i for i, row in enumerate(rows) if row.sampling.temperature > 0]
    if random:
        part = adjusted if len(random) == len(rows) else adjusted[random]
        tokens[random] = _draw(part, [rows[i] for i in random])
    chosen: list[int] = tokens.tolist()
    logprobs = _logprobs(logits, chosen, rows)
    return [Drawn(token, logprobs.get(i)) for i, token in enumerate(chosen)]


def _draw(logits: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
    """Tokens `[R]` of rows with a positive temperature."""
    samplings = [row.sampling for row in rows]
    # Whole vectors per row: torch computes the tail of an odd length by another routine.
    width = -(-logits.shape[1] // VECTOR) * VECTOR
    scaled = logits.new_full((len(rows), width), MASKED)
    temperature = torch.tensor([[max(s.temperature, LEAST_TEMPERATURE)] for s in samplings])
    below_best = logits - logits.amax(-1, keepdim=True)
    scaled[:, : logits.shape[1]] = below_best.div_(temperature).mul_(math.log2(math.e))
    if any(s.min_p > 0 for s in samplings):
        floor = torch.tensor([[s.min_p] for s in samplings]).log2_()
    else:
        floor = None
    filtered = [i for i, s in enumerate(samplings) if s.top_k > 0 or s.top_p < 1]
    if filtered:
        part = scaled[filtered]
        threshold = _top_threshold(part, [samplings[i] for i in filtered])
        scaled[filtered] = part.masked_fill_(part < threshold, MASKED)
    if floor is not None:
        scaled.masked_fill_(scaled < floor, MASKED)
    cumulative = scaled.exp2_().cumsum(-1, dtype=torch.float64)
    uniform = torch.from_numpy(uniforms([s.seed for s in samplings], [r.position for r in rows]))
    target = uniform.unsqueeze(-1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)


def _top_threshold(scaled: torch.Tensor, samplings: Sequence[Sampling]) -> torch.Tensor:
    """Smallest value `[R, 1]` that top_k and then top_p keep (powers of two of the probabilities).

    Looks at the largest values only, and further just for rows whose top_p reaches further. A
    longer look gives the same threshold, so it does not matter whose row made it long."""
    vocab = scaled.shape[1]
    counts = torch.tensor([[min(s.top_k, vocab) if s.top_k > 0 else vocab] for s in samplings])
    top_p = torch.tensor([[s.top_p] for s in samplings], dtype=torch.float64)
    threshold = torch.empty(len(samplings), 1)
    todo = torch.arange(len(samplings))
    shortest = max(s.top_k for s in samplings)
    for look in LOOKS:
        length = min(max(look, shortest), vocab)
        found, enough = _look(scaled[todo], counts[todo], top_p[todo], length)
        threshold[todo] = found
        todo = todo[enough.logical_not().squeeze(-1)]
        if not len(todo):
            break
    return threshold


def _look(
    scaled: torch.Tensor, counts: torch.Tensor, top_p: torch.Tensor, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Thresholds `[R, 1]` from the `length` largest values, and whether these were enough."""
    values = scaled.topk(length, -1).values
    padded = functional.pad(values, (0, -length % VECTOR), value=MASKED)
    mass = padded.exp2().double()[:, :length].masked_fill_(torch.arange(length) >= counts, 0)
    cumulative = mass.cumsum(-1)
    whole = scaled.exp2().cumsum(-1, dtype=torch.float64)[:, -1:]
    total = torch.where(counts < scaled.shape[1], cumulative[:, -1:], whole)
    # A value is kept while the mass before it is below top_p of the total; the first always is.
    kept = (cumulative - mass < top_p * total).sum(-1, keepdim=True)
    kept = torch.where(top_p < 1, kept, counts.clamp(max=length)).clamp_(min=1).minimum(counts)
    enough = (counts <= length) | (cumulative[:, -1:] >= top_p * total)
    return values.gather(-1, kept - 1), enough


def _logprobs(
    logits: torch.Tensor, chosen: Sequence[int], rows: Sequence[SampleRow]
) -> dict[int, TokenLogprobs]:
    """Log-probabilities for the rows that asked for them."""
    asked = {i: row.sampling.logprobs for i, row in enumerate(rows)}
    wanted = {i: count for i, count in asked.items() if count is not None}
    if not wanted:
        return {}
    index = list(wanted)
    table = logits[index].log_softmax(-1)
    own = table.gather(-1, torch.tensor([[chosen[i]] for i in index])).flatten().tolist()
    top = table.topk(min(max(wanted.values()), table.shape[1]), -1)
    ids: np.ndarray[tuple[int, int], np.dtype[np.int64]] = top.indices.numpy()
    return {
        i: TokenLogprobs(
            logprob=own[at],
            top_ids=tuple(ids[at, : wanted[i]].tolist()),
            top_logprobs=tuple(top.values[at, : wanted[i]].tolist()),
        )
        for at, i in enumerate(index)
    }
