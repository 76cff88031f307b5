"""Attention of one group of query items: all buffers and views of a step, made once, used per
layer.

The arithmetic and its fixed order are explained in `attention`. Everything here is float32,
whatever the pool holds. Shapes: I items, P pairs, H KV heads, Q query tokens per item, G query
heads per KV head, R rows of a product (at least Q * G, the rest are zero queries), D head
dimension.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from appliance.worker.attention_plan import TILE, PairIndex, QueryItems
from appliance.worker.kv_pool import KvPool


class Scratch:
    """Buffers that grow to the largest request and are then reused: fresh pages cost more than a
    copy into old ones."""

    def __init__(self) -> None:
        self._flat: dict[str, torch.Tensor] = {}

    def take(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A contiguous tensor of that shape; it holds what was left there, at first zeros."""
        needed = math.prod(shape)
        flat = self._flat.get(name)
        if flat is None or flat.numel() < needed:
            flat = self._flat[name] = torch.zeros(needed, dtype=dtype)
        return flat[:needed].view(shape)


@dataclass(frozen=True, kw_only=True)
class GroupSizes:
    """What the groups of one kind (single tokens, prompt runs) have in common."""

    query_tokens: int
    heads_per_group: int
    rows: int
    """R: as many rows per product as the probe found equal bits with."""
    scale: float
    """Factor of the scores, so that probabilities are powers of two."""

    @property
    def live(self) -> int:
        """Rows that hold real query heads, Q * G."""
        return self.query_tokens * self.heads_per_group


class Group:
    """The pairs of one group of items in one step."""

    def __init__(
        self,
        sizes: GroupSizes,
        items: QueryItems,
        index: PairIndex,
        *,
        pool: KvPool,
        scratch: Scratch,
        output: torch.Tensor,
    ) -> None:
        """`output [I * Q, heads * D]` receives the results, item by item."""
        self._sizes = sizes
        self._pool = pool
        num_items, num_pairs = len(items), len(index.item)
        self._by_pair = (num_pairs, pool.num_kv_heads, sizes.rows)
        self._plan_queries(items, index, scratch)
        self._plan_context(index, scratch)
        self._plan_tiles(index, scratch)
        split = (num_items, sizes.query_tokens, pool.num_kv_heads, sizes.heads_per_group)
        self._output = output.view(*split, pool.head_dim)
        unsplit = (num_items, pool.num_kv_heads, sizes.query_tokens, sizes.heads_per_group)
        weighted = self._tiles_weighted[0][:, :, : sizes.live]
        self._numerator = weighted.view(*unsplit, pool.head_dim).transpose(1, 2)
        total = self._tiles_sums[0][:, :, : sizes.live]
        self._denominator = total.view(*unsplit, 1).transpose(1, 2)

    def _plan_queries(self, items: QueryItems, index: PairIndex, scratch: Scratch) -> None:
        sizes, (pairs, heads, rows) = self._sizes, self._by_pair
        dim, tokens = self._pool.head_dim, sizes.query_tokens
        # Padding repeats an item's last token: finite, and dropped at the end.
        offsets = np.minimum(np.arange(tokens), items.tokens[:, None] - 1)
        self._query_rows = torch.from_numpy((items.row[:, None] + offsets).reshape(-1))
        # One buffer per R: rows past Q * G are never written and stay zero.
        queries = scratch.take(f"queries {rows}", len(items), heads, rows, dim)
        self._items = queries.view(len(items), -1)
        live = queries[:, :, : sizes.live]
        self._live = live.view(len(items), heads, tokens, sizes.heads_per_group, dim)
        self._from_rows = (len(items), tokens, heads, sizes.heads_per_group, dim)
        self._pair_item = None
        if pairs > len(items):
            self._pair_item = torch.from_numpy(index.item)
            queries = scratch.take("pair queries", pairs, heads, rows, dim)
        self._pairs = queries.view(pairs, -1)
        self._queries = queries.view(pairs * heads, rows, dim)

    def _plan_context(self, index: PairIndex, scratch: Scratch) -> None:
        pool, (pairs, heads, _) = self._pool, self._by_pair
        self._head_rows = torch.from_numpy(index.head_rows)
        row = pool.block_tokens * pool.head_dim
        self._gathered = scratch.take("gathered", len(index.head_rows), row, dtype=pool.dtype)
        self._context = self._gathered
        if pool.dtype != torch.float32:
            self._context = scratch.take("context", len(index.head_rows), row)
        keys, values = self._context.view(2, pairs * heads, TILE, pool.head_dim)
        self._keys, self._values = keys.transpose(1, 2), values

    def _plan_tiles(self, index: PairIndex, scratch: Scratch) -> None:
        sizes, (pairs, heads, rows) = self._sizes, self._by_pair
        self._scores = scratch.take("scores", pairs * heads, rows, TILE)
        split = (pairs, heads, sizes.query_tokens, sizes.heads_per_group, TILE)
        self._live_scores = self._scores[:, : sizes.live].view(split)
        # 0 where a query may see a key, -inf where not: added, so visible scores keep their bits.
        hidden = np.where(index.visible, np.float32(0), np.float32("-inf"))
        self._hidden = torch.from_numpy(hidden).view(pairs, 1, sizes.query_tokens, 1, TILE)
        self._maxima = scratch.take("maxima", pairs * heads, rows)
        self._sums = scratch.take("sums", pairs * heads, rows)
        self._weighted = scratch.take("weighted", pairs * heads, rows, self._pool.head_dim)
        tiles = index.tile_sizes
        self._tiles_maxima = self._maxima.view(self._by_pair).split(tiles)
        self._tiles_sums = self._sums.view(self._by_pair).split(tiles)
        self._tiles_weighted = self._weighted.view(*self._by_pair, -1).split(tiles)

    def attend(self, layer: int, queries: torch.Tensor) -> None:
        """Compute the group's rows of `output` from `queries [M, heads * D]` and the pool's
        `layer`."""
        self._gather(layer, queries)
        scores = self._scores
        torch.baddbmm(
            scores, self._queries, self._keys, beta=0, alpha=self._sizes.scale, out=scores
        )
        self._live_scores.add_(self._hidden)
        torch.amax(scores, -1, out=self._maxima)
        if self._pair_item is not None:
            self._share_maxima(self._pair_item)
        scores.sub_(self._maxima.unsqueeze(-1)).exp2_()
        torch.sum(scores, -1, out=self._sums)
        torch.bmm(scores, self._values, out=self._weighted)
        _accumulate(self._tiles_weighted)
        _accumulate(self._tiles_sums)
        torch.div(self._numerator, self._denominator, out=self._output)

    def _gather(self, layer: int, queries: torch.Tensor) -> None:
        torch.index_select(self._pool.head_rows(layer), 0, self._head_rows, out=self._gathered)
        if self._context is not self._gathered:
            self._context.copy_(self._gathered)
        rows = queries.index_select(0, self._query_rows)
        self._live.copy_(rows.view(self._from_rows).transpose(1, 2))
        if self._pair_item is not None:
            torch.index_select(self._items, 0, self._pair_item, out=self._pairs)

    def _share_maxima(self, pair_item: torch.Tensor) -> None:
        """Give every pair the maximum over all tiles of its item."""
        best = self._tiles_maxima[0].clone()
        for tile in self._tiles_maxima[1:]:
            first = best[: tile.shape[0]]
            torch.maximum(first, tile, out=first)
        torch.index_select(best, 0, pair_item, out=self._maxima.view(self._by_pair))


def _accumulate(tiles: tuple[torch.Tensor, ...]) -> None:
    """Add the later tiles into the first, in order. Tile t belongs to the first items."""
    for tile in tiles[1:]:
        tiles[0][: tile.shape[0]].add_(tile)
