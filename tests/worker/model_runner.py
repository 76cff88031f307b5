"""Runs a checkpoint's decoder over a paged pool, row by row visible: what tests of numerics
need."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from appliance.core.model_shape import DType, kv_slab_bytes, slab_bytes
from appliance.modeling.decoder import Decoder
from appliance.modeling.linear import LinearFactory
from appliance.modeling.slab import attach, load_into_slab
from appliance.worker.attention import PagedAttention
from appliance.worker.attention_plan import TILE, StepBatch
from appliance.worker.kv_pool import KvPool
from appliance.worker.torch_engine import read_shape

Chunk = tuple[int, int, int]
"""Sequence, first position, number of tokens."""


class ModelRunner:
    """A decoder, its pool and block tables drawn at random, so that no test depends on their
    order."""

    def __init__(
        self,
        directory: Path,
        *,
        dtype: DType = "float32",
        block_tokens: int = 16,
        num_blocks: int = 256,
        seed: int = 0,
        max_rows: int = 128,
    ) -> None:
        torch.set_num_threads(1)
        self.shape = read_shape(directory)
        buffer = memoryview(bytearray(slab_bytes(self.shape, dtype)))
        load_into_slab(directory, buffer, shape=self.shape, dtype=dtype)
        kv = memoryview(
            bytearray(
                kv_slab_bytes(self.shape, dtype, num_blocks=num_blocks, block_tokens=block_tokens)
            )
        )
        self.pool = KvPool(
            kv, shape=self.shape, dtype=dtype, num_blocks=num_blocks, block_tokens=block_tokens
        )
        self.factory = LinearFactory(invariant=dtype == "float32")
        self.decoder = Decoder(
            self.shape,
            attach(buffer, shape=self.shape, dtype=dtype),
            factory=self.factory,
            max_positions=self.shape.max_positions,
            max_rows=max_rows,
            max_sampled=32,
        )
        self.attention = PagedAttention(self.pool, num_heads=self.shape.num_heads)
        self._free = np.random.default_rng(seed).permutation(num_blocks).tolist()
        self._tables: dict[int, list[int]] = {}

    def forget(self) -> None:
        """Give all blocks back; their content stays, as in life."""
        for blocks in self._tables.values():
            self._free[:0] = blocks
        self._tables.clear()

    def step(self, tokens: Sequence[Sequence[int]], chunks: Sequence[Chunk]) -> list[torch.Tensor]:
        """Compute `chunks` of the sequences `tokens` in one step; logits `[count, vocab]` per
        chunk."""
        starts = np.array([start for _, start, _ in chunks])
        counts = np.array([count for _, _, count in chunks])
        width = (int((starts + counts).max()) - 1) // TILE + 1
        tables = np.full((len(chunks), width * TILE // self.pool.block_tokens), self.pool.scratch)
        for row, (sequence, start, count) in enumerate(chunks):
            blocks = self._tables.setdefault(sequence, [])
            while len(blocks) * self.pool.block_tokens < start + count:
                blocks.append(self._free.pop())
            tables[row, : len(blocks)] = blocks[: tables.shape[1]]
        batch = StepBatch(
            starts=starts,
            counts=counts,
            tables=tables,
            num_rows=self.decoder.padded_rows(int(counts.sum())),
        )
        ids, positions = np.zeros((2, batch.num_rows), np.int64)
        flat = [token for s, start, n in chunks for token in tokens[s][start : start + n]]
        ids[: batch.num_tokens], positions[: batch.num_tokens] = flat, batch.positions()
        with torch.inference_mode():
            self.attention.prepare(batch)
            hidden = self.decoder.hidden(
                torch.from_numpy(ids), torch.from_numpy(positions), attention=self.attention
            )
            logits = self.decoder.logits(hidden, torch.arange(batch.num_tokens))
        return list(logits.split(counts.tolist()))

    def whole(self, tokens: Sequence[int]) -> torch.Tensor:
        """Logits `[len(tokens), vocab]` of one sequence alone, in one chunk."""
        self.forget()
        return self.step([tokens], [(0, 0, len(tokens))])[0]
