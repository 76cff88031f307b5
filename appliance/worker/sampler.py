"""Drawing the next token of every row of a step.

Order of the filters, as in common engines: forbidden ids, temperature, top_k, top_p over what top_k
left, min_p. Filters are thresholds on values, so equal logits are kept or dropped together. A token
is drawn by inverting the cumulative distribution in token order with one uniform number per row,
which depends on (seed, position) only (`philox`). All sums that decide run in sequence over a row
in float64, so a row's token does not depend on the rows beside it.

Log-probabilities are those of the raw logits, before any filter, as the OpenAI API means them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from appliance.core.payload import Sampling, TokenLogprobs
from appliance.worker.philox import uniforms

MASKED = float("-inf")


class SampleRow(NamedTuple):
    """What a row of logits is drawn for."""

    sampling: Sampling
    position: int
    """Index of the token to be drawn within the sequence (prompt included)."""
    num_emitted: int
    """Tokens of the answer before it."""


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
    allowed = _forbid(logits, rows)
    tokens = allowed.argmax(-1)
    random = [i for i, row in enumerate(rows) if row.sampling.temperature > 0]
    if random:
        part = allowed if len(random) == len(rows) else allowed[random]
        tokens[random] = _draw(part, [rows[i] for i in random])
    chosen: list[int] = tokens.tolist()
    logprobs = _logprobs(logits, chosen, rows)
    return [Drawn(token, logprobs.get(i)) for i, token in enumerate(chosen)]


def _forbid(logits: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
    """Mask what would end an answer that is still shorter than its min_tokens."""
    where: list[int] = []
    what: list[int] = []
    for i, (sampling, _, num_emitted) in enumerate(rows):
        if num_emitted >= sampling.min_tokens:
            continue
        banned = set(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            banned.update(sampling.eos_token_ids)
        inside = [token for token in banned if 0 <= token < logits.shape[1]]
        where += [i] * len(inside)
        what += inside
    if not where:
        return logits
    masked = logits.clone()
    masked[where, what] = MASKED
    return masked


def _draw(logits: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
    """Tokens `[R]` of rows with a positive temperature."""
    samplings = [row.sampling for row in rows]
    temperature = torch.tensor([s.temperature for s in samplings], dtype=torch.float64)
    scaled = (logits - logits.amax(-1, keepdim=True)).double().div_(temperature.unsqueeze(-1))
    if any(s.top_k > 0 or s.top_p < 1 for s in samplings):
        scaled = scaled.masked_fill_(scaled < _top_threshold(scaled, samplings), MASKED)
    if any(s.min_p > 0 for s in samplings):
        floor = torch.tensor([s.min_p for s in samplings], dtype=torch.float64).log_()
        scaled = scaled.masked_fill_(scaled < floor.unsqueeze(-1), MASKED)
    cumulative = scaled.exp_().cumsum(-1)
    uniform = torch.from_numpy(
        uniforms([s.seed for s in samplings], [row.position for row in rows])
    ).unsqueeze(-1)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).squeeze(-1)


def _top_threshold(scaled: torch.Tensor, samplings: Sequence[Sampling]) -> torch.Tensor:
    """Smallest value `[R, 1]` that top_k and then top_p keep; -inf where neither is on."""
    vocab = scaled.shape[1]
    counts = [min(s.top_k, vocab) if s.top_k > 0 else vocab for s in samplings]
    values = scaled.topk(max(counts), -1).values
    count = torch.tensor(counts).unsqueeze(-1)
    mass = values.exp().masked_fill_(torch.arange(values.shape[1]) >= count, 0)
    cumulative = mass.cumsum(-1)
    top_p = torch.tensor([s.top_p for s in samplings], dtype=torch.float64).unsqueeze(-1)
    # A value is kept while the mass before it is below top_p of the whole; the first always is.
    kept = ((cumulative - mass) < top_p * cumulative[:, -1:]).sum(-1, keepdim=True)
    kept = torch.where(top_p < 1, kept, count).clamp_(min=1).minimum(count)
    threshold = values.gather(-1, kept - 1)
    off = torch.tensor([s.top_k <= 0 and s.top_p >= 1 for s in samplings]).unsqueeze(-1)
    return threshold.masked_fill_(off, MASKED)


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
