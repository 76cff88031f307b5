"""Attention over the paged pool with a fixed order of reduction.

A query row's result must not depend on which rows and sequences are computed with it, nor on where
a chunk of its prompt began (R12). So nothing here reduces over a length that depends on the batch:

* context is cut into tiles of TILE positions aligned to absolute positions; scores, sums and the
  weighting of values are batched matrix products of one fixed size per tile;
* the maximum over all tiles is exact, so it has no order; probabilities are `2 ** (s - max)` over
  whole tiles (`exp2`: torch's `exp` is many times slower on CPU and slower still on masked scores);
* tiles are then added one after the other; a tile that a row cannot see adds exact zeros.

One token and a run of prompt tokens take the same code; they differ in the rows R of the products.
Equality of a row's bits between the two R is probed at start (`probe_rows`), and a single token's
heads get zero rows beside them where the library needs that.
"""

import math

import numpy as np
import torch

from appliance.worker.attention_group import Group, GroupSizes, Scratch
from appliance.worker.attention_plan import TILE, StepBatch, groups, index_pairs, split_items
from appliance.worker.kv_pool import KvPool

GROUP_BYTES = 8 << 20
"""Aim for the working set of one group of pairs: about what the shared cache takes."""
ROWS_PER_PRODUCT = 128
"""Aim for the query rows (tokens x heads of a group) of one product of a prompt run."""
ROW_STEP = 32
"""Rows of a prompt run's product are a multiple of this: libraries treat odd tails differently."""


class PagedAttention:
    """Implements `appliance.modeling.decoder.Attention` for one worker's pool."""

    def __init__(self, pool: KvPool, *, num_heads: int) -> None:
        if TILE % pool.block_tokens:
            raise ValueError(
                f"block_tokens={pool.block_tokens} must divide {TILE} where torch computes: set "
                f"kv.block_tokens to a power of two up to {TILE}, or use native kernels"
            )
        self._pool = pool
        self._num_heads = num_heads
        per_group = num_heads // pool.num_kv_heads
        query_tokens = max(8, ROWS_PER_PRODUCT // per_group)
        run_rows = -(-query_tokens * per_group // ROW_STEP) * ROW_STEP
        scale = math.log2(math.e) / math.sqrt(pool.head_dim)
        rows = probe_rows(head_dim=pool.head_dim, single=per_group, run=run_rows)
        self.invariant = rows is not None
        """Whether a row's bits were proven not to depend on the other rows."""
        self._single = GroupSizes(
            query_tokens=1, heads_per_group=per_group, rows=rows or per_group, scale=scale
        )
        self._run = GroupSizes(
            query_tokens=query_tokens, heads_per_group=per_group, rows=run_rows, scale=scale
        )
        self._scratch = Scratch()
        self._groups: list[Group] = []
        self._num_tokens = 0
        self._write_rows = self._order = torch.empty(0, dtype=torch.int64)
        self._outputs = torch.empty(0)

    def prepare(self, batch: StepBatch) -> None:
        """Plan a step. Must precede the layers' calls of that step."""
        self._num_tokens = batch.num_tokens
        self._write_rows = torch.from_numpy(self._rows_to_write(batch))
        singles, runs = split_items(batch, query_tokens=self._run.query_tokens)
        total = len(singles) + len(runs) * self._run.query_tokens
        self._outputs = self._scratch.take("outputs", total, self._num_heads * self._pool.head_dim)
        order = np.zeros(batch.num_rows, np.int64)
        self._groups = []
        begin = 0
        for sizes, items in ((self._single, singles), (self._run, runs)):
            for part in groups(items, max_pairs=self._max_pairs(sizes)):
                rows = part.token_rows(sizes.query_tokens)
                end = begin + rows.size
                real = rows >= 0
                order[rows[real]] = np.arange(begin, end).reshape(rows.shape)[real]
                index = index_pairs(
                    part,
                    batch.tables,
                    query_tokens=sizes.query_tokens,
                    block_tokens=self._pool.block_tokens,
                    kv_heads=self._pool.num_kv_heads,
                    rows_per_block=self._pool.rows_per_block,
                )
                output = self._outputs[begin:end]
                self._groups.append(
                    Group(sizes, part, index, pool=self._pool, scratch=self._scratch, output=output)
                )
                begin = end
        self._order = torch.from_numpy(order)

    def __call__(self, layer: int, heads: torch.Tensor) -> torch.Tensor:
        """See `Attention`: keep the step's keys and values, then attend."""
        pool = self._pool
        state = heads[: self._num_tokens, self._num_heads :].reshape(-1, pool.head_dim)
        pool.token_rows(layer).index_copy_(0, self._write_rows, state)
        queries = heads[:, : self._num_heads].flatten(1)
        for group in self._groups:
            group.attend(layer, queries)
        return self._outputs.index_select(0, self._order).to(heads.dtype)

    def _rows_to_write(self, batch: StepBatch) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Rows of `KvPool.token_rows`, per token all key heads, then all value heads."""
        pool, positions = self._pool, batch.positions()
        owner = np.repeat(np.arange(len(batch.counts)), batch.counts)
        blocks = batch.tables[owner, positions // pool.block_tokens]
        rows = blocks * (pool.rows_per_block * pool.block_tokens) + positions % pool.block_tokens
        heads = np.arange(2 * pool.num_kv_heads) * pool.block_tokens
        return (rows[:, None] + heads).reshape(-1)

    def _max_pairs(self, sizes: GroupSizes) -> int:
        """Pairs per group: their keys, values and scores together stay near GROUP_BYTES."""
        floats = self._pool.num_kv_heads * TILE * (2 * self._pool.head_dim + sizes.rows)
        return max(1, GROUP_BYTES // (4 * floats))


def probe_rows(*, head_dim: int, single: int, run: int) -> int | None:
    """Rows to give the products of one token (`single` heads) so that their bits equal those of
    the same heads among the `run` rows of a prompt run; None when no number of rows does."""
    generator = torch.Generator().manual_seed(20)
    batch = 3
    queries = torch.randn(batch, run, head_dim, generator=generator)
    keys = torch.randn(batch, TILE, head_dim, generator=generator)
    values = torch.randn(batch, TILE, head_dim, generator=generator)

    def attend(rows: torch.Tensor) -> torch.Tensor:
        count = len(rows)
        scores = torch.empty(count, rows.shape[1], TILE)
        key = keys[:count].transpose(1, 2)
        torch.baddbmm(scores, rows, key, beta=0, alpha=head_dim**-0.5, out=scores)
        return torch.cat([scores, torch.bmm(scores.exp2(), values[:count])], -1)

    def padded(first: int, *, rows: int, count: int) -> torch.Tensor:
        alone = torch.zeros(count, rows, head_dim)
        alone[:, :single] = queries[:count, first : first + single]
        return attend(alone)[:, :single]

    want = attend(queries)
    if not torch.equal(attend(queries.roll(1, 1)), want.roll(1, 1)):
        return None
    for rows in sorted({single, 2, 4, 8, 16, 32, 64, run}):
        if single <= rows <= run and all(
            torch.equal(padded(at, rows=rows, count=count), want[:count, at : at + single])
            for at in range(0, run - single + 1, single)
            for count in (1, batch)
        ):
            return rows
    return None
