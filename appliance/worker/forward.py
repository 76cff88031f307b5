"""What the engine hands to a forward pass, and what it gets back.

Two passes stand behind `Forward`: `native.forward` (one call of C per step) and `torch_forward`
(torch, where no compiler is or more than one thread is wanted). Both write the step's keys and
values into the pool and return the logits of the rows that sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from appliance.core.payload import Sampling, SequenceState
from appliance.core.types import SeqWork
from appliance.worker.adjustments import TokenCounts
from appliance.worker.grammar import Grammar, Grammars


class EngineSequence:
    """Known ids of one sequence, what follows from them, and its row in the block tables."""

    __slots__ = (
        "address", "counts", "grammar", "is_plain", "num_blocks", "num_known", "num_prompt",
        "sampling", "slot", "tokens",
    )  # fmt: skip

    def __init__(self, state: SequenceState, grammars: Grammars) -> None:
        known = np.frombuffer(state.prompt + state.emitted, dtype="<i4")
        self.tokens = np.empty(len(known) + 64, np.int64)
        self.tokens[: len(known)] = known
        self.address: int = self.tokens.ctypes.data
        """Of `tokens`, in memory."""
        self.num_known = len(known)
        self.num_prompt = len(state.prompt) // 4
        self.sampling: Sampling = state.sampling
        self.slot = -1
        self.num_blocks = 0
        emitted = known[self.num_prompt :].tolist()
        self.counts: TokenCounts | None = None
        if TokenCounts.wanted(self.sampling):
            self.counts = TokenCounts(known[: self.num_prompt].tolist(), emitted)
        self.grammar: Grammar | None = None
        if self.sampling.grammar:
            self.grammar = grammars.open(
                self.sampling.grammar, ends=self.sampling.eos_token_ids, emitted=emitted
            )
        self.is_plain = is_plain(self.sampling)
        """Its next token is that of the largest logit, and nothing else is asked for."""

    def append(self, token: int) -> None:
        """Add a known token. Raises nothing: what a grammar thinks of it shows when it is asked."""
        if self.counts is not None:
            self.counts.push(token)
        if self.grammar is not None:
            self.grammar.push(token)
        if self.num_known == len(self.tokens):
            self.tokens = np.concatenate([self.tokens, np.empty_like(self.tokens)])
            self.address = self.tokens.ctypes.data
        self.tokens[self.num_known] = token
        self.num_known += 1


def is_plain(sampling: Sampling) -> bool:
    """Whether a token is drawn by the largest logit alone and comes without log-probabilities."""
    changed = sampling.grammar or sampling.logit_bias or sampling.min_tokens
    return not (
        sampling.temperature > 0
        or sampling.logprobs is not None
        or changed
        or TokenCounts.wanted(sampling)
    )


@dataclass
class BlockTables:
    """Block ids of all sequences that have any: `[slots, width]`, padded with the scratch block."""

    rows: npt.NDArray[np.int64]
    scratch: int
    unused: list[int]
    address: int

    @classmethod
    def empty(cls, *, slots: int, width: int, scratch: int) -> "BlockTables":
        rows = np.full((slots, width), scratch, np.int64)
        return cls(rows, scratch, list(range(slots)), rows.ctypes.data)

    def take(self) -> int:
        """A cleared row's number; the table doubles when all are in use."""
        if not self.unused:
            have = len(self.rows)
            self.rows = np.concatenate([self.rows, np.full_like(self.rows, self.scratch)])
            self.address = self.rows.ctypes.data
            self.unused = list(range(have, 2 * have))
        return self.unused.pop()

    def give_back(self, slot: int) -> None:
        """Clear a row; it may be taken again."""
        self.rows[slot] = self.scratch
        self.unused.append(slot)


Live = Sequence[tuple[SeqWork, EngineSequence]]
"""The work of a step; all blocks are in the tables, all tokens are known."""


class Computed(NamedTuple):
    """Of the sequences that sample, in their order."""

    logits: torch.Tensor
    """`[R, vocab]` float32, valid until the next step."""
    best: Sequence[int] | None
    """The first index of each row's largest logit, -1 where the row has NaN or its largest is
    infinite; None: not looked for."""


class Forward(Protocol):
    """Computes the tokens of a step."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What an operator should read about the kernels; the first says whether rows are
        invariant."""

    def compute(self, live: Live, tables: BlockTables) -> Computed:
        """Write keys and values of all of `live` into the pool. Not thread-safe."""
