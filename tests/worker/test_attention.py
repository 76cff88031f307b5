"""Paged attention: right against a slow obvious one, and row-invariant bit for bit (R12)."""

import random

import numpy as np
import pytest
import torch
from msgspec import structs

from appliance.core.model_shape import DType, ModelShape, kv_slab_bytes
from appliance.worker import attention as attention_module
from appliance.worker.attention import PagedAttention, probe_rows
from appliance.worker.attention_plan import TILE, QueryItems, StepBatch, groups, index_pairs
from appliance.worker.kv_pool import KvPool
from tests.worker.test_kv_pool import SHAPE

NUM_BLOCKS = 160


class Rig:
    """One layer's attention with keys, values and queries of whole sequences held beside it."""

    def __init__(
        self, shape: ModelShape, *, dtype: DType = "float32", block_tokens: int = 16
    ) -> None:
        torch.set_num_threads(1)
        self.shape = shape
        size = kv_slab_bytes(shape, dtype, num_blocks=NUM_BLOCKS, block_tokens=block_tokens)
        self.pool = KvPool(
            memoryview(bytearray(size)),
            shape=shape,
            dtype=dtype,
            num_blocks=NUM_BLOCKS,
            block_tokens=block_tokens,
        )
        self.pool.blocks[:NUM_BLOCKS] = 1e9  # what a former owner left; finite, must not be seen
        self.attention = PagedAttention(self.pool, num_heads=shape.num_heads)
        self.generator = torch.Generator().manual_seed(5)
        self.heads: list[torch.Tensor] = []
        self.tables: list[list[int]] = []
        self._free = np.random.default_rng(1).permutation(NUM_BLOCKS).tolist()

    def add(self, length: int) -> int:
        """A sequence with random heads; returns its number."""
        heads = self.shape.num_heads + 2 * self.shape.num_kv_heads
        made = torch.randn(length, heads, self.shape.head_dim, generator=self.generator)
        self.heads.append(made.to(self.pool.dtype))
        blocks = -(-length // self.pool.block_tokens)
        self.tables.append([self._free.pop() for _ in range(blocks)])
        return len(self.heads) - 1

    def run(self, chunks: list[tuple[int, int, int]], *, layer: int = 1) -> list[torch.Tensor]:
        """Attend for (sequence, start, count) chunks in one step, padded by a few rows."""
        starts = np.array([start for _, start, _ in chunks])
        counts = np.array([count for _, _, count in chunks])
        width = -(-int((starts + counts).max()) // TILE) * TILE // self.pool.block_tokens
        tables = np.full((len(chunks), width), self.pool.scratch)
        for row, (sequence, _, _) in enumerate(chunks):
            table = self.tables[sequence][:width]
            tables[row, : len(table)] = table
        total = int(counts.sum())
        rows = torch.cat([self.heads[s][a : a + n] for s, a, n in chunks])
        padded = torch.cat([rows, rows.new_full((3, *rows.shape[1:]), 2.0)])
        batch = StepBatch(starts=starts, counts=counts, tables=tables, num_rows=total + 3)
        with torch.inference_mode():
            self.attention.prepare(batch)
            out = self.attention(layer, padded)
        assert bool(out.isfinite().all())
        return list(out[:total].split(counts.tolist()))

    def slow(self, sequence: int) -> torch.Tensor:
        """The obvious way, in float64."""
        shape = self.shape
        heads = self.heads[sequence].double()
        query, key, value = heads.split(
            [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], 1
        )
        group = shape.num_heads // shape.num_kv_heads
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", query, key) / shape.head_dim**0.5
        later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, value).flatten(1)


SHAPES = {
    "grouped": SHAPE,
    "one query head per key head": structs.replace(SHAPE, num_heads=3, num_kv_heads=3),
    "odd group, odd dimension": structs.replace(SHAPE, num_heads=5, num_kv_heads=1, head_dim=22),
    "wide": structs.replace(SHAPE, num_heads=16, num_kv_heads=2, head_dim=64),
}


@pytest.fixture(params=list(SHAPES))
def rig(request: pytest.FixtureRequest) -> Rig:
    return Rig(SHAPES[request.param])


def test_whole_sequences_equal_the_slow_obvious_way(rig: Rig) -> None:
    sequences = [rig.add(length) for length in (1, 2, 15, 127, 128, 129, 300)]
    results = rig.run([(s, 0, len(rig.heads[s])) for s in sequences])
    for sequence, result in zip(sequences, results, strict=True):
        assert torch.allclose(result.double(), rig.slow(sequence), atol=2e-6)


@pytest.mark.parametrize("block_tokens", [1, 8, 32, 128])
def test_any_block_size_that_divides_a_tile_gives_the_same_bits(block_tokens: int) -> None:
    rigs = [
        Rig(structs.replace(SHAPE, num_layers=2), block_tokens=size) for size in (16, block_tokens)
    ]
    first, second = [r.run([(r.add(100), 0, 100)]) for r in rigs]
    assert torch.equal(first[0], second[0])


def test_a_block_size_that_does_not_divide_a_tile_is_refused() -> None:
    with pytest.raises(ValueError, match="block_tokens=24 must divide 128"):
        Rig(SHAPE, block_tokens=24)


def test_bfloat16_pools_are_attended_to_in_float32() -> None:
    rig = Rig(SHAPE, dtype="bfloat16")
    sequence = rig.add(200)
    (result,) = rig.run([(sequence, 0, 200)])
    assert result.dtype == torch.bfloat16
    assert torch.allclose(result.double(), rig.slow(sequence), atol=1e-2)


def cut(length: int, rng: random.Random) -> list[tuple[int, int]]:
    """Cut a sequence into chunks (start, count) of all sizes."""
    pieces, start = [], 0
    while start < length:
        count = min(length - start, rng.choice((1, 1, 2, 3, 8, 31, 32, 33, 64, 127, 200)))
        pieces.append((start, count))
        start += count
    return pieces


@pytest.mark.parametrize("seed", [0, 1])
def test_R12_rows_do_not_depend_on_batch_mates_or_chunk_borders(rig: Rig, seed: int) -> None:
    rng = random.Random(seed)
    sequences = [rig.add(length) for length in (1, 7, 40, 128, 129, 200, 260, 300)]
    alone = [rig.run([(s, 0, len(rig.heads[s]))])[0] for s in sequences]
    todo = {s: cut(len(rig.heads[s]), rng) for s in sequences}
    while todo:
        chosen = [s for s in todo if rng.random() < 0.7] or list(todo)[:1]
        rng.shuffle(chosen)
        chunks = [(s, *todo[s].pop(0)) for s in chosen]
        for (s, start, count), rows in zip(chunks, rig.run(chunks), strict=True):
            assert torch.equal(rows, alone[s][start : start + count]), (s, start, count)
        todo = {s: pieces for s, pieces in todo.items() if pieces}


def test_R12_splitting_the_work_into_groups_changes_no_bit(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences = [rig.add(length) for length in (1, 60, 128, 200, 270, 300)]
    chunks = [(s, 0, len(rig.heads[s])) for s in sequences]
    whole = rig.run(chunks)
    monkeypatch.setattr(attention_module, "GROUP_BYTES", 1)
    for a, b in zip(whole, rig.run(chunks), strict=True):
        assert torch.equal(a, b)


def test_R13_nothing_beyond_a_sequences_tokens_is_read(rig: Rig) -> None:
    """Another owner's keys in the tail of the last block, however large, have no effect."""
    sequence = rig.add(130)
    (before,) = rig.run([(sequence, 0, 130)])
    last = rig.tables[sequence][-1]
    rows = rig.pool.blocks[last].view(rig.shape.num_layers, 2, -1, 16, rig.shape.head_dim)
    rows[:, :, :, 2:] = -1e30
    (after,) = rig.run([(sequence, 0, 130)])
    assert torch.equal(before, after)


def test_extreme_scores_stay_finite_and_exact() -> None:
    rig = Rig(SHAPE)
    sequence = rig.add(150)
    rig.heads[sequence][:, : SHAPE.num_heads + SHAPE.num_kv_heads] *= 60
    (result,) = rig.run([(sequence, 0, 150)])
    assert torch.allclose(result.double(), rig.slow(sequence), atol=2e-3)


def test_items_are_grouped_by_falling_tiles_within_the_bound() -> None:
    positions = np.array([0, 500, 127, 128, 1000, 3])
    ones = np.ones(6, np.int64)
    items = QueryItems(sequence=np.arange(6), position=positions, tokens=ones, row=np.arange(6))
    parts = list(groups(items, max_pairs=9))
    assert [part.tiles.tolist() for part in parts] == [[8], [4, 2, 1, 1, 1]]
    assert sorted(np.concatenate([part.row for part in parts]).tolist()) == list(range(6))


def test_pairs_of_a_tile_belong_to_the_first_items() -> None:
    items = QueryItems(
        sequence=np.array([1, 0]),
        position=np.array([130, 5]),
        tokens=np.ones(2, np.int64),
        row=np.arange(2),
    )
    tables = np.arange(16).reshape(2, 8)
    index = index_pairs(
        items, tables, query_tokens=1, block_tokens=32, kv_heads=1, rows_per_block=10
    )
    assert index.item.tolist() == [0, 1, 0]
    assert index.tile_sizes == [2, 1]
    blocks = [[8, 9, 10, 11], [0, 1, 2, 3], [12, 13, 14, 15]]
    assert index.head_rows.tolist() == [b * 10 + kv for kv in (0, 1) for row in blocks for b in row]
    assert index.visible.sum(-1).flatten().tolist() == [128, 6, 3]


def test_a_library_without_equal_rows_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.bmm

    def depends_on_rows(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return real(a, b) * (1 + 1e-6 * (a.shape[1] < 64))

    monkeypatch.setattr(torch, "bmm", depends_on_rows)
    assert probe_rows(head_dim=8, single=2, run=128) == 64
    monkeypatch.setattr(torch, "bmm", lambda a, b: real(a, b) + torch.arange(a.shape[1])[:, None])
    assert probe_rows(head_dim=8, single=2, run=128) is None
