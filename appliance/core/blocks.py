"""BlockLedger: who holds which KV block of one worker, and which blocks can be found by content.

A sequence's KV lives in equal blocks, listed in a table per *cache group*: index `i` stands for
tokens `i * block_tokens ...` in every group, so all tables of a sequence are equally long. A
"paged" group keeps every block; a "window" group gives a block back once no later token can see
it and writes `NO_BLOCK` in its place.

A block becomes findable when its KV is computed *and* the hash of its content is known; the hash
chains over the parent, so whoever knows the hash of block `i` agrees on every token up to its end.
Sequences that begin alike share findable blocks by reference count. What is shared is complete and
never written again. A block that nobody owns stays findable until it is the least recently used one
and somebody needs it; of one chain the last blocks go first, since a chain without its head is of
no use to anyone.

The ledger is pure and knows numbers only. It trusts its caller with two things: that KV is computed
when it says so, and that a table is closed only when no planned step can touch it any more.
"""

from collections.abc import Mapping, Sequence

from appliance.core.host_tier import HostTier
from appliance.core.peer import IndexChanges, Inherited
from appliance.core.pool import GroupCounts, Pool
from appliance.core.types import BlockHash, BlockId, CacheGroupSpec, Record, RequestId

NO_BLOCK: BlockId = -1
"""Stands in a window group's table where a block was given back, or was never taken."""


class LedgerError(Exception):
    """The ledger was asked for what its rules forbid: a defect of the caller."""


class OutOfBlocks(LedgerError):
    """Some cache group has fewer free blocks than asked for; nothing was changed."""


class UnsupportedCacheGroup(Exception):
    """A cache group that this ledger does not keep, named with what to do."""


class BlockTable:
    """The blocks of one sequence, owned through the ledger that made it."""

    __slots__ = ("blocks", "firsts", "num_blocks", "num_named")

    def __init__(self, num_groups: int) -> None:
        self.blocks: tuple[list[BlockId], ...] = tuple([] for _ in range(num_groups))
        """Per group, one entry per index; `NO_BLOCK` where the group holds none."""
        self.firsts = [0] * num_groups
        """Per group, the first index that holds a block."""
        self.num_blocks = 0
        """Length of every list in `blocks`."""
        self.num_named = 0
        """Leading blocks whose content was offered as findable (or was found)."""


class Lease(Record, frozen=True, kw_only=True):
    """Blocks pinned for a peer on behalf of a request, until released or past `deadline`
    (seconds)."""

    blocks: tuple[tuple[BlockId, ...], ...]
    deadline: float | None = None


def _check(groups: Sequence[CacheGroupSpec]) -> None:
    if not groups:
        raise UnsupportedCacheGroup("a worker needs at least one cache group")
    for spec in groups:
        if spec.kind not in ("paged", "window"):
            raise UnsupportedCacheGroup(
                f"cache group {spec.name!r}: kind {spec.kind!r} is not kept; use 'paged' or "
                "'window'"
            )
        if spec.kind == "window" and (spec.window is None or spec.window < 1):
            raise UnsupportedCacheGroup(
                f"cache group {spec.name!r}: kind 'window' needs window >= 1, got {spec.window}"
            )
        if spec.num_blocks < 1 or spec.block_tokens < 1:
            raise UnsupportedCacheGroup(
                f"cache group {spec.name!r}: num_blocks {spec.num_blocks} and block_tokens "
                f"{spec.block_tokens} must be at least 1"
            )
        if spec.block_tokens != groups[0].block_tokens:
            raise UnsupportedCacheGroup(
                f"cache group {spec.name!r}: block_tokens {spec.block_tokens} differs from "
                f"{groups[0].block_tokens} of {groups[0].name!r}; give all groups the same"
            )


def _usable(
    inherited: Inherited, groups: Sequence[CacheGroupSpec], *, prefix_cache: bool
) -> Inherited:
    sizes = {len(inherited.generations), len(inherited.names)}
    if len(groups) != 1 or groups[0].kind != "paged" or sizes != {groups[0].num_blocks}:
        raise LedgerError(
            f"inherited {sizes} blocks for {[spec.num_blocks for spec in groups]} of kinds "
            f"{[spec.kind for spec in groups]}: only one paged group of the same size is inherited"
        )
    if prefix_cache:
        return inherited
    nothing = (0,) * len(inherited.names)
    return Inherited(generations=inherited.generations, names=nothing)


class BlockLedger:
    """The blocks of one worker. Raises `UnsupportedCacheGroup` for groups it does not keep.

    With `prefix_cache` off nothing becomes findable. `inherited` says what a predecessor left in
    the pool of the one paged group (`LedgerError` if there are other groups, or other blocks).
    `pools` is read by the laws; nobody else moves a block but through the methods here."""

    def __init__(
        self,
        groups: Sequence[CacheGroupSpec],
        *,
        prefix_cache: bool = True,
        inherited: Inherited | None = None,
        tier: HostTier | None = None,
    ) -> None:
        """`tier` takes what is evicted."""
        _check(groups)
        if inherited is not None:
            inherited = _usable(inherited, groups, prefix_cache=prefix_cache)
        self.pools = tuple(Pool(spec, inherited) for spec in groups)
        self.block_tokens = groups[0].block_tokens
        self.prefix_cache = prefix_cache
        self._windows = tuple(pool for pool in self.pools if pool.window is not None)
        self._paged = tuple(pool for pool in self.pools if pool.window is None)
        self._advertised = (self._paged or self.pools)[0]
        self._leases: dict[RequestId, Lease] = {}
        self.tier = tier
        if tier is not None:
            if not self.is_paged or not prefix_cache:
                raise UnsupportedCacheGroup(
                    "a host tier (kv.host_memory) keeps the prefix cache of one paged cache group; "
                    f"here are {[(spec.name, spec.kind) for spec in groups]} with the prefix cache "
                    f"{'on' if prefix_cache else 'off'}: write kv.host_memory = 0"
                )
            self.pools[0].tier = tier

    # --- accounts -------------------------------------------------------------------------------

    @property
    def num_free(self) -> int:
        """Blocks that every group can give now (cached ones included): the scarcest group's."""
        if len(self.pools) == 1:
            return self.pools[0].num_free
        return min(pool.num_free for pool in self.pools)

    @property
    def num_total(self) -> int:
        """Blocks of the group with the fewest."""
        return min(pool.spec.num_blocks for pool in self.pools)

    @property
    def is_paged(self) -> bool:
        """Whether there is one cache group, and a paged one: only then can blocks be copied."""
        return len(self.pools) == 1 and not self._windows

    @property
    def has_windows(self) -> bool:
        """Whether `slide` ever does anything."""
        return bool(self._windows)

    def counts(self) -> GroupCounts:
        """The account of all groups together; free + held + leased = total."""
        if len(self.pools) == 1:
            return self.pools[0].counts()
        each = [pool.counts() for pool in self.pools]
        return GroupCounts(
            total=sum(count.total for count in each),
            free=sum(count.free for count in each),
            cached=sum(count.cached for count in each),
            held=sum(count.held for count in each),
            leased=sum(count.leased for count in each),
        )

    def generation(self, group: int, block: BlockId) -> int:
        """How often this block was taken for new content. A reader that saw the same number
        before and after its copy has copied one content."""
        return self.pools[group].generation[block]

    def drain_changes(self) -> tuple[tuple[BlockHash, ...], tuple[BlockHash, ...]]:
        """Hashes that became findable and that ceased to be since the last call, net, in order.
        With several groups the first paged one speaks (a hint for placement, not a promise)."""
        changes = self._advertised.changes
        if not changes:
            return (), ()
        added = tuple(content for content, present in changes.items() if present)
        removed = tuple(content for content, present in changes.items() if not present)
        changes.clear()
        return added, removed

    def drain_index(self) -> IndexChanges:
        """What the shared index of the pool must say since the last call (of several groups, the
        first paged one's)."""
        return self._advertised.drain_index()

    # --- what would be needed -------------------------------------------------------------------

    def blocks_for(self, num_tokens: int) -> int:
        """Table length that holds `num_tokens` tokens."""
        return -(-num_tokens // self.block_tokens)

    def lacking(self, num_tokens: int) -> tuple[CacheGroupSpec, int] | None:
        """The first group whose whole pool cannot carry one sequence of `num_tokens` tokens, and
        the number of blocks that it would need; None when the sequence fits alone."""
        for pool in self.pools:
            needed = pool.most_needed(self.blocks_for(num_tokens))
            if needed > pool.spec.num_blocks:
                return pool.spec, needed
        return None

    def growth(self, have: int, want: int) -> tuple[int, ...]:
        """Blocks that each group still needs to bring a table from length `have` to `want`."""
        return tuple(pool.most_needed(max(0, want - have)) for pool in self.pools)

    def admits(
        self,
        hashes: Sequence[BlockHash],
        num_hits: int,
        *,
        num_blocks: int,
        spare: Sequence[int],
    ) -> bool:
        """Whether a sequence of `num_blocks` blocks, `num_hits` of them found, can be begun and
        still leave `spare[g]` blocks free in each group."""
        for pool, keep in zip(self.pools, spare, strict=True):
            begin = pool.first_needed(num_hits * self.block_tokens)
            block_of, owners, pins = pool.block_of, pool.owners, pool.pins
            idle = 0
            for index in range(begin, num_hits):
                block = block_of[hashes[index]]
                idle += not owners[block] and not pins[block]
            cost = idle + num_blocks - num_hits
            if pool.window is not None:
                cost = min(cost, pool.most_needed(num_blocks))
            if cost + keep > pool.num_free:
                return False
        return True

    def would_free(self, table: BlockTable) -> int:
        """Blocks that every group would get back if this table were closed now."""
        return min(
            sum(pool.owners[block] == 1 and not pool.pins[block] for block in blocks[first:])
            for pool, blocks, first in zip(self.pools, table.blocks, table.firsts, strict=True)
        )

    # --- a sequence's blocks --------------------------------------------------------------------

    def lookup(self, hashes: Sequence[BlockHash], limit: int) -> int:
        """How many leading blocks of `hashes` (at most `limit`) need not be computed: all of them
        are findable in each paged group, and in a window group those that the next token sees."""
        if not self.prefix_cache:
            return 0
        limit = min(limit, len(hashes))
        for pool in self._paged:
            block_of = pool.block_of
            for index in range(limit):
                if hashes[index] not in block_of:
                    limit = index
                    break
        if not self._windows:
            return limit
        best = 0
        runs = [0] * len(self._windows)
        for index in range(limit):
            tokens = (index + 1) * self.block_tokens
            served = True
            for which, pool in enumerate(self._windows):
                runs[which] = runs[which] + 1 if hashes[index] in pool.block_of else 0
                served = served and runs[which] > index - pool.first_needed(tokens)
            if served:
                best = index + 1
        return best

    def open(self, hashes: Sequence[BlockHash], num_hits: int) -> BlockTable:
        """A table that begins with the first `num_hits` blocks of `hashes`, which `lookup`
        found."""
        table = BlockTable(len(self.pools))
        table.num_blocks = table.num_named = num_hits
        for group, pool in enumerate(self.pools):
            begin = pool.first_needed(num_hits * self.block_tokens)
            blocks = table.blocks[group]
            blocks.extend([NO_BLOCK] * begin)
            table.firsts[group] = begin
            for index in range(begin, num_hits):
                block = pool.block_of[hashes[index]]
                pool.own(block)
                blocks.append(block)
        return table

    def grow(self, table: BlockTable, num_blocks: int) -> None:
        """Append `num_blocks` blocks for new content in every group. Raises `OutOfBlocks`."""
        if num_blocks > self.num_free:
            raise OutOfBlocks(f"asked for {num_blocks} blocks, {self.num_free} are free")
        for pool, blocks in zip(self.pools, table.blocks, strict=True):
            for _ in range(num_blocks):
                blocks.append(pool.take())
        table.num_blocks += num_blocks

    def register(self, table: BlockTable, hashes: Sequence[BlockHash], num_complete: int) -> None:
        """The first `num_complete` blocks of this table are computed; those whose hash is known
        become findable (the earlier of two blocks of one content does)."""
        end = min(num_complete, len(hashes))
        if not self.prefix_cache or end <= table.num_named:
            return
        for pool, blocks in zip(self.pools, table.blocks, strict=True):
            for index in range(table.num_named, end):
                block = blocks[index]
                if block != NO_BLOCK:
                    pool.name(block, hashes[index])
        table.num_named = end

    def slide(self, table: BlockTable, num_tokens: int) -> None:
        """All tokens before `num_tokens` are computed and no planned step starts earlier: window
        groups give back what no later token sees."""
        if not self._windows:
            return
        for group, pool in enumerate(self.pools):
            if pool.window is None:
                continue
            blocks = table.blocks[group]
            end = min(pool.first_needed(num_tokens), table.num_blocks)
            for index in range(table.firsts[group], end):
                pool.disown(blocks[index])
                blocks[index] = NO_BLOCK
            table.firsts[group] = max(end, table.firsts[group])

    def close(self, table: BlockTable) -> None:
        """Give all blocks of this table back, last first, so that a chain is evicted from its
        end."""
        for pool, blocks, first in zip(self.pools, table.blocks, table.firsts, strict=True):
            for index in range(len(blocks) - 1, first - 1, -1):
                pool.disown(blocks[index])
            blocks.clear()
        table.num_blocks = table.num_named = 0
        table.firsts = [0] * len(self.pools)

    # --- leases ---------------------------------------------------------------------------------

    @property
    def leases(self) -> Mapping[RequestId, Lease]:
        """What is pinned, by request."""
        return self._leases

    def lease(
        self, request_id: RequestId, table: BlockTable, *, deadline: float | None = None
    ) -> None:
        """Pin the blocks of an open table for a peer: they stay when the table is closed."""
        if request_id in self._leases:
            raise LedgerError(f"request {request_id} has a lease already")
        pinned = tuple(
            tuple(blocks[first:]) for blocks, first in zip(table.blocks, table.firsts, strict=True)
        )
        for pool, blocks in zip(self.pools, pinned, strict=True):
            for block in blocks:
                pool.pin(block)
        self._leases[request_id] = Lease(blocks=pinned, deadline=deadline)

    def reopen(self, request_id: RequestId, num_named: int) -> BlockTable:
        """End a lease and give its blocks back as the table they were, of which the first
        `num_named` were offered as findable. Raises `LedgerError` when there is none."""
        lease = self._leases.get(request_id)
        if lease is None:
            raise LedgerError(f"request {request_id} has no lease")
        table = BlockTable(len(self.pools))
        table.num_named = num_named
        table.num_blocks = len(lease.blocks[0])
        for pool, blocks, leased in zip(self.pools, table.blocks, lease.blocks, strict=True):
            if pool.window is not None:
                raise LedgerError(f"a lease of cache group {pool.spec.name!r} is no whole table")
            for block in leased:
                pool.own(block)
            blocks.extend(leased)
        self.release(request_id)
        return table

    def release(self, request_id: RequestId) -> None:
        """End a lease. Raises `LedgerError` when there is none."""
        lease = self._leases.pop(request_id, None)
        if lease is None:
            raise LedgerError(f"request {request_id} has no lease")
        for pool, blocks in zip(self.pools, lease.blocks, strict=True):
            for block in reversed(blocks):
                pool.unpin(block)

    def next_deadline(self) -> float | None:
        """When the next lease runs out."""
        return min(
            (lease.deadline for lease in self._leases.values() if lease.deadline is not None),
            default=None,
        )

    def expired(self, now: float) -> tuple[RequestId, ...]:
        """Requests whose lease has run out; the caller releases them and says so."""
        return tuple(
            request_id
            for request_id, lease in self._leases.items()
            if lease.deadline is not None and lease.deadline <= now
        )
