"""Which keys meet which queries in a step: index arithmetic, in numpy, once per step.

A *query item* is a run of up to `query_tokens` consecutive tokens of one sequence. A *pair* is a
query item with one tile of `TILE` context positions, aligned to absolute positions. Items of a
group are sorted by falling number of tiles and pairs are listed tile by tile, so the pairs of tile
t are a slice that belongs to the first items: no padding for shorter sequences, no loop over
sequences.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

TILE = 128
"""Context positions per tile: the fixed length of every reduction over positions."""

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """The tokens of a step: sequence s computes `counts[s]` tokens from position `starts[s]`.

    `tables [S, W]` holds block ids, padded with the scratch block; W * block_tokens is a multiple
    of TILE and covers every computed position. `num_rows` is the padded number of token rows."""

    starts: Ints
    counts: Ints
    tables: Ints
    num_rows: int

    @property
    def num_tokens(self) -> int:
        return int(self.counts.sum())

    def positions(self) -> Ints:
        """Position of each token, `[num_tokens]`."""
        first = np.cumsum(self.counts) - self.counts
        positions: Ints = np.arange(self.num_tokens) + np.repeat(self.starts - first, self.counts)
        return positions


@dataclass(frozen=True, kw_only=True)
class QueryItems:
    """Query items in parallel arrays `[items]`: sequence, first position, real tokens, first token
    row."""

    sequence: Ints
    position: Ints
    tokens: Ints
    row: Ints

    @property
    def tiles(self) -> Ints:
        """Tiles that each item's last token can see."""
        tiles: Ints = (self.position + self.tokens - 1) // TILE + 1
        return tiles

    def token_rows(self, query_tokens: int) -> Ints:
        """`[items, query_tokens]`: the token row of each query, -1 for padding."""
        index = np.arange(query_tokens)
        return np.where(index < self.tokens[:, None], self.row[:, None] + index, -1)

    def take(self, index: Ints | slice) -> "QueryItems":
        """The items at `index`."""
        return QueryItems(
            sequence=self.sequence[index],
            position=self.position[index],
            tokens=self.tokens[index],
            row=self.row[index],
        )

    def __len__(self) -> int:
        return len(self.sequence)


@dataclass(frozen=True, kw_only=True)
class PairIndex:
    """The pairs of a group of items, tile by tile.

    `item [P]`; `tile_sizes [tiles]`: how many pairs each tile has, they belong to the first items;
    `head_rows [2 * P * kv_heads * blocks per tile]`: pool rows of keys, then of
    values; `visible [P, query_tokens, TILE]`: whether a query may see a key."""

    item: Ints
    tile_sizes: list[int]
    head_rows: Ints
    visible: npt.NDArray[np.bool_]


def split_items(batch: StepBatch, *, query_tokens: int) -> tuple[QueryItems, QueryItems]:
    """Items of one token (sequences that compute one), and items of up to `query_tokens`."""
    first = np.cumsum(batch.counts) - batch.counts
    (single,) = np.nonzero(batch.counts == 1)
    singles = QueryItems(
        sequence=single,
        position=batch.starts[single],
        tokens=np.ones(len(single), np.int64),
        row=first[single],
    )
    (many,) = np.nonzero(batch.counts > 1)
    items = -(-batch.counts[many] // query_tokens)
    sequence = np.repeat(many, items)
    skipped = (np.arange(len(sequence)) - np.repeat(np.cumsum(items) - items, items)) * query_tokens
    runs = QueryItems(
        sequence=sequence,
        position=batch.starts[sequence] + skipped,
        tokens=np.minimum(batch.counts[sequence] - skipped, query_tokens),
        row=first[sequence] + skipped,
    )
    return singles, runs


def groups(items: QueryItems, *, max_pairs: int) -> Iterator[QueryItems]:
    """Items by falling number of tiles, in groups of at most `max_pairs` pairs (one item at
    least)."""
    if not len(items):
        return
    items = items.take(np.argsort(-items.tiles, kind="stable"))
    tiles = items.tiles
    begin = 0
    while begin < len(items):
        fitting = int(np.searchsorted(np.cumsum(tiles[begin:]), max_pairs, side="right"))
        end = begin + max(fitting, 1)
        yield items.take(slice(begin, end))
        begin = end


def index_pairs(
    items: QueryItems,
    tables: Ints,
    *,
    query_tokens: int,
    block_tokens: int,
    kv_heads: int,
    rows_per_block: int,
) -> PairIndex:
    """List the pairs of sorted `items` and where `tables [sequences, W]` put keys and values."""
    tiles = items.tiles
    tile, item = np.nonzero(tiles[None, :] > np.arange(tiles[0])[:, None])
    blocks_per_tile = TILE // block_tokens
    columns = tile[:, None] * blocks_per_tile + np.arange(blocks_per_tile)
    blocks = tables[items.sequence[item][:, None], columns]
    kv = np.arange(2)[:, None, None, None] * kv_heads
    head_rows = (
        blocks[None, :, None, :] * rows_per_block + kv + np.arange(kv_heads)[None, None, :, None]
    )
    keys = tile[:, None] * TILE + np.arange(TILE)
    queries = items.position[item][:, None] + np.arange(query_tokens)
    return PairIndex(
        item=item,
        tile_sizes=np.bincount(tile).tolist(),
        head_rows=head_rows.reshape(-1),
        visible=keys[:, None, :] <= queries[:, :, None],
    )
