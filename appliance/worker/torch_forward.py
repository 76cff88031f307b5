"""The forward pass in torch: plans a step's attention in numpy, then runs the decoder.

Needs no compiler and takes any number of threads. Its rows do not notice each other in float32, as
far as the products of this machine's libraries were proven so (docs/adr/0003).
"""

import numpy as np
import torch

from appliance.core.model_shape import DType, ModelShape
from appliance.modeling.decoder import Decoder
from appliance.modeling.linear import LinearFactory
from appliance.worker.attention import PagedAttention
from appliance.worker.attention_plan import TILE, StepBatch
from appliance.worker.forward import BlockTables, Computed, Live
from appliance.worker.kv_pool import KvPool


class TorchForward:
    """Implements `appliance.worker.forward.Forward`."""

    def __init__(
        self, decoder: Decoder, attention: PagedAttention, pool: KvPool, *, notes: tuple[str, ...]
    ) -> None:
        """`attention` works on `pool`."""
        self._decoder = decoder
        self._attention = attention
        self._pool = pool
        self.notes = notes

    @classmethod
    def open(
        cls,
        shape: ModelShape,
        weights: dict[str, torch.Tensor],
        pool: KvPool,
        *,
        dtype: DType,
        threads: int,
        max_positions: int,
        max_rows: int,
        max_sampled: int,
    ) -> "TorchForward":
        """Choose kernels by probing them."""
        factory = LinearFactory(invariant=dtype == "float32")
        with torch.inference_mode():
            attention = PagedAttention(pool, num_heads=shape.num_heads)
            decoder = Decoder(
                shape,
                weights,
                factory=factory,
                max_positions=max_positions,
                max_rows=max_rows,
                max_sampled=max_sampled,
            )
        proven = decoder.invariant and attention.invariant and threads == 1
        return cls(decoder, attention, pool, notes=_notes(factory, proven=proven, threads=threads))

    def compute(self, live: Live, tables: BlockTables) -> Computed:
        """See `Forward.compute`."""
        with torch.inference_mode():
            hidden = self._hidden(live, tables)
            ends = np.cumsum([work.num_tokens for work, _ in live]) - 1
            sampled = [i for i, (work, _) in enumerate(live) if work.samples]
            rows = torch.from_numpy(ends[sampled])
            if not sampled:
                return Computed(torch.empty(0, self._decoder.shape.vocab_size), None)
            return Computed(self._decoder.logits(hidden, rows), None)

    def _hidden(self, live: Live, tables: BlockTables) -> torch.Tensor:
        starts = np.array([work.start for work, _ in live], np.int64)
        counts = np.array([work.num_tokens for work, _ in live], np.int64)
        tiles = int(((starts + counts - 1) // TILE).max()) + 1
        slots = np.array([sequence.slot for _, sequence in live])
        batch = StepBatch(
            starts=starts,
            counts=counts,
            tables=tables.rows[slots, : tiles * (TILE // self._pool.block_tokens)],
            num_rows=self._decoder.padded_rows(int(counts.sum())),
        )
        ids = np.zeros(batch.num_rows, np.int64)
        positions = np.zeros(batch.num_rows, np.int64)
        pieces = [s.tokens[w.start : w.start + w.num_tokens] for w, s in live]
        np.concatenate(pieces, out=ids[: batch.num_tokens])
        positions[: batch.num_tokens] = batch.positions()
        self._attention.prepare(batch)
        return self._decoder.hidden(
            torch.from_numpy(ids), torch.from_numpy(positions), attention=self._attention
        )


def _notes(factory: LinearFactory, *, proven: bool, threads: int) -> tuple[str, ...]:
    paths = "+".join(sorted({path.name for path in factory.paths.values()}))
    promise = "row-invariant" if proven else "not row-invariant"
    return (f"torch products {paths}, {promise} at {threads} thread(s)", *factory.notes)
