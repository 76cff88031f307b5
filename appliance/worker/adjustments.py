"""What changes the logits of a row before a token is drawn from them.

In this order, which is that of vLLM: what the grammar forbids, what `min_tokens` forbids,
`logit_bias`, `repetition_penalty` (over prompt and answer), `frequency_penalty` and
`presence_penalty` (over the answer). Temperature and filters come after.

Everything a row needs is a function of its own known ids, and every change touches single entries
with single float32 operations: a row does not see the rows beside it, and a sequence that is taken
over from elsewhere goes on with the same logits.
"""

from array import array
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from appliance.core.payload import Sampling
from appliance.worker.grammar import BitMask

MASKED = float("-inf")


class TokenCounts:
    """Which ids a sequence has, and how often its answer has each."""

    __slots__ = ("_counts", "_ids", "_place")

    def __init__(self, prompt: Sequence[int], emitted: Sequence[int]) -> None:
        counts = Counter(dict.fromkeys(prompt, 0))
        counts.update(emitted)
        self._ids = array("q", counts)
        self._counts = array("f", map(float, counts.values()))
        self._place = {token: place for place, token in enumerate(counts)}

    @classmethod
    def wanted(cls, sampling: Sampling) -> bool:
        """Whether anything in `sampling` asks for counts."""
        return bool(
            sampling.presence_penalty
            or sampling.frequency_penalty
            or sampling.repetition_penalty != 1
        )

    def push(self, token: int) -> None:
        """The answer has one more token."""
        place = self._place.setdefault(token, len(self._ids))
        if place == len(self._ids):
            self._ids.append(token)
            self._counts.append(0.0)
        self._counts[place] += 1

    def columns(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Copies of the distinct ids and of their numbers of occurrences in the answer."""
        return np.array(self._ids, np.int64), np.array(self._counts, np.float32)


class SampleRow(NamedTuple):
    """What a row of logits is drawn for."""

    sampling: Sampling
    position: int
    """Index of the token to be drawn within the sequence (prompt included)."""
    num_emitted: int
    """Tokens of the answer before it."""
    counts: TokenCounts | None = None
    """Needed where the sampling has penalties."""
    allowed: BitMask | None = None
    """What the grammar allows; None: everything."""


def adjust(logits: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
    """`logits [R, vocab]` (float32) as they are drawn from: the tensor itself where no row asks for
    a change, else a new one."""
    banned = [_banned(row) for row in rows]
    ruled = [i for i, row in enumerate(rows) if row.allowed is not None]
    biased = [i for i, row in enumerate(rows) if row.sampling.logit_bias]
    counted = [i for i, row in enumerate(rows) if row.counts is not None]
    if not (ruled or biased or counted or any(banned)):
        return logits
    adjusted = logits.clone()
    if ruled:
        _apply_masks(adjusted, ruled, rows)
    if any(banned):
        _forbid(adjusted, banned)
    if biased:
        _add_bias(adjusted, biased, rows)
    if counted:
        _penalise(adjusted, counted, rows)
    return adjusted


def _banned(row: SampleRow) -> frozenset[int]:
    """What would end an answer that is still shorter than its min_tokens. A grammar that has come
    to its end wins: it allows nothing but the end."""
    sampling = row.sampling
    if row.num_emitted >= sampling.min_tokens or row.allowed is not None:
        return frozenset()
    ends = () if sampling.ignore_eos else sampling.eos_token_ids
    return frozenset((*sampling.stop_token_ids, *ends))


def _apply_masks(logits: torch.Tensor, ruled: Sequence[int], rows: Sequence[SampleRow]) -> None:
    masks = [rows[i].allowed for i in ruled]
    words = np.stack([mask for mask in masks if mask is not None])
    bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    forbidden = torch.from_numpy(bits[:, : logits.shape[1]] == 0).to(logits.device)
    if len(ruled) == len(logits):
        logits.masked_fill_(forbidden, MASKED)
    else:
        logits[ruled] = logits[ruled].masked_fill_(forbidden, MASKED)


def _forbid(logits: torch.Tensor, banned: Sequence[frozenset[int]]) -> None:
    vocab = logits.shape[1]
    cells = [(i, token) for i, ids in enumerate(banned) for token in ids if 0 <= token < vocab]
    if cells:
        where, what = zip(*cells, strict=True)
        logits[list(where), list(what)] = MASKED


def _add_bias(logits: torch.Tensor, biased: Sequence[int], rows: Sequence[SampleRow]) -> None:
    vocab = logits.shape[1]
    cells = [
        (i, token, bias)
        for i in biased
        for token, bias in rows[i].sampling.logit_bias
        if 0 <= token < vocab
    ]
    if cells:
        where, what, bias = zip(*cells, strict=True)
        logits[list(where), list(what)] += torch.tensor(bias, device=logits.device)


def _penalise(logits: torch.Tensor, counted: Sequence[int], rows: Sequence[SampleRow]) -> None:
    columns = [counts.columns() for i in counted if (counts := rows[i].counts) is not None]
    sizes = [len(ids) for ids, _ in columns]
    penalties = np.array(
        [
            (s.repetition_penalty, s.frequency_penalty, s.presence_penalty)
            for s in (rows[i].sampling for i in counted)
        ],
        np.float32,
    )
    device = logits.device
    where = torch.from_numpy(np.repeat(np.array(counted), sizes)).to(device)
    what = torch.from_numpy(np.concatenate([ids for ids, _ in columns])).to(device)
    count = torch.from_numpy(np.concatenate([count for _, count in columns])).to(device)
    each = torch.from_numpy(np.repeat(penalties, sizes, axis=0)).to(device)
    repetition, frequency, presence = each.unbind(1)
    values = logits[where, what]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= frequency * count
    values -= presence * (count > 0)
    logits[where, what] = values
