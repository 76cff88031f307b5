"""Runs a checkpoint through the native forward pass over a pool of its own: what tests of its
numerics need."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from appliance.core.model_shape import DType, kv_slab_bytes, slab_bytes
from appliance.core.payload import Sampling
from appliance.core.types import Phase, RequestId, SeqWork
from appliance.modeling.slab import attach, load_into_slab
from appliance.worker.forward import BlockTables, EngineSequence
from appliance.worker.grammar import Grammars
from appliance.worker.kv_pool import KvPool
from appliance.worker.native.build import Library
from appliance.worker.native.forward import NativeForward
from appliance.worker.torch_engine import read_shape
from tests.worker.engine_rig import state_of

Chunk = tuple[int, int, int]
"""Sequence, first position, number of tokens."""


class NativeRunner:
    """Blocks are drawn at random, so that no test depends on their order."""

    def __init__(
        self,
        directory: Path,
        library: Library,
        *,
        dtype: DType = "float32",
        block_tokens: int = 16,
        num_blocks: int = 256,
    ) -> None:
        self.shape = read_shape(directory)
        buffer = memoryview(bytearray(slab_bytes(self.shape, dtype)))
        load_into_slab(directory, buffer, shape=self.shape, dtype=dtype)
        size = kv_slab_bytes(self.shape, dtype, num_blocks=num_blocks, block_tokens=block_tokens)
        self.pool = KvPool(
            memoryview(bytearray(size)),
            shape=self.shape,
            dtype=dtype,
            num_blocks=num_blocks,
            block_tokens=block_tokens,
        )
        self.forward = NativeForward(
            library,
            self.shape,
            attach(buffer, shape=self.shape, dtype=dtype),
            pool=self.pool,
            dtype=dtype,
            max_positions=self.shape.max_positions,
            max_rows=8,
            max_sampled=2,
        )
        self._grammars = Grammars(directory / "tokenizer.json", vocab_size=self.shape.vocab_size)
        self._free = np.random.default_rng(0).permutation(num_blocks).tolist()
        self._width = self.shape.max_positions // block_tokens + 1
        self.best: list[int] = []
        self.forget()

    def forget(self) -> None:
        """Give all blocks back; their content stays, as in life."""
        for row in getattr(self, "blocks", {}).values():
            self._free[:0] = row
        self.blocks: dict[int, list[int]] = {}
        self._known: dict[int, EngineSequence] = {}
        self._tables = BlockTables.empty(slots=64, width=self._width, scratch=self.pool.scratch)

    def step(self, tokens: Sequence[Sequence[int]], chunks: Sequence[Chunk]) -> torch.Tensor:
        """Compute `chunks` of the sequences `tokens` in one step; the logits `[chunks, vocab]` of
        each chunk's last token."""
        live = []
        for name, start, count in chunks:
            if name not in self._known:
                state = state_of(tokens[name], sampling=Sampling(temperature=0.0))
                self._known[name] = EngineSequence(state, self._grammars)
                self._known[name].slot = self._tables.take()
                self.blocks[name] = []
            blocks = self.blocks[name]
            while len(blocks) * self.pool.block_tokens < start + count:
                blocks.append(self._free.pop())
            self._tables.rows[self._known[name].slot, : len(blocks)] = blocks
            work = SeqWork(
                id=RequestId(name),
                start=start,
                num_tokens=count,
                phase=Phase.PREFILL,
                samples=True,
                fresh=False,
                new_blocks=(),
            )
            live.append((work, self._known[name]))
        computed = self.forward.compute(live, self._tables)
        self.best = list(computed.best or ())
        return computed.logits.clone()

    def whole(self, tokens: Sequence[int]) -> torch.Tensor:
        """Logits `[vocab]` after one sequence alone, in one chunk."""
        self.forget()
        return self.step([tokens], [(0, 0, len(tokens))])[0]

    def state(self, name: int) -> torch.Tensor:
        """Keys and values of a sequence, `[layers, 2, kv heads, positions, head_dim]`."""
        shape, pool = self.shape, self.pool
        blocks = pool.blocks[self.blocks[name]].view(
            -1, shape.num_layers, 2, shape.num_kv_heads, pool.block_tokens, shape.head_dim
        )
        joined = blocks.permute(1, 2, 3, 0, 4, 5).flatten(3, 4)
        return joined[..., : self._known[name].num_known, :].clone()
