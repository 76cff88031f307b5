"""BlockLedger: compared with a slow, obvious model; and its promises one by one."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from appliance.core.blocks import (
    NO_BLOCK,
    BlockLedger,
    BlockTable,
    LedgerError,
    OutOfBlocks,
    UnsupportedCacheGroup,
)
from appliance.core.invariants import (
    GenerationWatch,
    LawBroken,
    law_4_blocks_add_up,
    law_4_owners_are_tables,
    law_11_shared_by_content_only,
)
from appliance.core.types import CacheGroupSpec, RequestId
from tests.core.toy_worker import block_hashes, contents_of, paged, window

SIZE = 4


def fill(ledger: BlockLedger, hashes: list[int]) -> BlockTable:
    """A table of as many blocks as hashes, complete and findable."""
    table = ledger.open(hashes, 0)
    ledger.grow(table, len(hashes))
    ledger.register(table, hashes, len(hashes))
    return table


# --- promises -------------------------------------------------------------------------------------


def test_blocks_of_a_common_beginning_are_shared_and_counted_once() -> None:
    ledger = BlockLedger([paged(8)])
    first = fill(ledger, [10, 11, 12])
    assert ledger.lookup([10, 11, 99], 3) == 2
    second = ledger.open([10, 11, 99], 2)
    ledger.grow(second, 1)
    assert second.blocks[0][:2] == first.blocks[0][:2]
    assert second.blocks[0][2] != first.blocks[0][2]
    counts = ledger.counts()
    assert (counts.held, counts.free, counts.cached) == (4, 4, 0)
    ledger.close(first)
    counts = ledger.counts()
    assert (counts.held, counts.free, counts.cached) == (3, 5, 1)


def test_lookup_finds_whole_leading_blocks_up_to_the_limit() -> None:
    ledger = BlockLedger([paged(8)])
    fill(ledger, [1, 2, 3])
    assert ledger.lookup([1, 2, 3, 4], 4) == 3
    assert ledger.lookup([1, 2, 3], 2) == 2
    assert ledger.lookup([1, 9, 3], 3) == 1
    assert ledger.lookup([9, 2, 3], 3) == 0
    assert ledger.lookup([], 3) == 0


def test_only_computed_blocks_with_a_known_hash_are_findable() -> None:
    ledger = BlockLedger([paged(8)])
    table = ledger.open([1, 2, 3], 0)
    ledger.grow(table, 3)
    assert ledger.lookup([1, 2, 3], 3) == 0
    ledger.register(table, [1, 2, 3], 1)
    assert ledger.lookup([1, 2, 3], 3) == 1
    ledger.register(table, [1], 3)
    assert ledger.lookup([1, 2, 3], 3) == 1
    ledger.register(table, [1, 2, 3], 3)
    assert ledger.lookup([1, 2, 3], 3) == 3


def test_without_prefix_cache_nothing_is_findable_and_closed_blocks_are_free() -> None:
    ledger = BlockLedger([paged(4)], prefix_cache=False)
    table = fill(ledger, [1, 2])
    assert ledger.lookup([1, 2], 2) == 0
    ledger.close(table)
    assert ledger.counts().cached == 0
    assert ledger.counts().free == 4
    assert ledger.drain_changes() == ((), ())


def test_of_two_blocks_with_one_content_the_first_stays_findable_the_second_private() -> None:
    ledger = BlockLedger([paged(8)])
    first = ledger.open([1], 0)
    second = ledger.open([1], 0)
    ledger.grow(first, 1)
    ledger.grow(second, 1)
    ledger.register(first, [1], 1)
    ledger.register(second, [1], 1)
    assert ledger.open([1], 1).blocks == first.blocks
    ledger.close(second)
    assert ledger.counts().cached == 0, "the private one is plainly free"
    assert ledger.drain_changes() == ((1,), ())


def test_eviction_takes_the_least_recently_used_chain_from_its_end() -> None:
    ledger = BlockLedger([paged(6)])
    old, new = fill(ledger, [1, 2, 3]), fill(ledger, [7, 8, 9])
    ledger.close(old)
    ledger.close(new)
    needy = ledger.open([], 0)
    found = []
    for _ in range(6):
        found.append((ledger.lookup([1, 2, 3], 3), ledger.lookup([7, 8, 9], 3)))
        ledger.grow(needy, 1)
    assert found == [(3, 3), (2, 3), (1, 3), (0, 3), (0, 2), (0, 1)]


def test_a_hit_makes_a_chain_recent_again() -> None:
    ledger = BlockLedger([paged(4)])
    old, new = fill(ledger, [1, 2]), fill(ledger, [7, 8])
    ledger.close(old)
    ledger.close(new)
    ledger.close(ledger.open([1, 2], 2))
    needy = ledger.open([], 0)
    ledger.grow(needy, 2)
    assert ledger.lookup([1, 2], 2) == 2
    assert ledger.lookup([7, 8], 2) == 0


def test_R13_a_reused_block_has_a_new_generation() -> None:
    ledger = BlockLedger([paged(1)])
    seen = set()
    for content in range(5):
        table = fill(ledger, [content])
        seen.add(ledger.generation(0, table.blocks[0][0]))
        ledger.close(table)
    assert len(seen) == 5
    generation = ledger.generation(0, 0)
    ledger.open([4], 1)
    assert ledger.generation(0, 0) == generation, "found content is not reuse"


def test_growth_is_all_or_nothing_in_every_group() -> None:
    ledger = BlockLedger([paged(4), window(2, tokens=4)])
    table = ledger.open([], 0)
    with pytest.raises(OutOfBlocks, match="asked for 3 blocks, 2 are free"):
        ledger.grow(table, 3)
    assert ledger.counts().held == 0
    ledger.grow(table, 2)
    assert [len(blocks) for blocks in table.blocks] == [2, 2]


def test_a_window_group_gives_back_what_no_later_token_sees() -> None:
    ledger = BlockLedger([paged(9), window(9, tokens=5)])
    table = ledger.open([], 0)
    ledger.grow(table, 4)
    ledger.slide(table, 8)  # token 8 sees 4 .. 8
    assert [block == NO_BLOCK for block in table.blocks[1]] == [True, False, False, False]
    ledger.slide(table, 11)  # token 11 sees 7 .. 11
    assert [block == NO_BLOCK for block in table.blocks[1]] == [True, False, False, False]
    ledger.slide(table, 12)  # token 12 sees 8 .. 12
    assert [block == NO_BLOCK for block in table.blocks[1]] == [True, True, False, False]
    assert NO_BLOCK not in table.blocks[0]
    ledger.close(table)
    assert ledger.counts().free == 18


def test_with_two_groups_a_hit_is_what_both_can_serve() -> None:
    ledger = BlockLedger([paged(9), window(4, tokens=5)])
    hashes = [1, 2, 3]
    table = ledger.open([], 0)
    for index in range(3):
        ledger.grow(table, 1)
        ledger.register(table, hashes, index + 1)
        ledger.slide(table, 4 * (index + 1))
    assert ledger.lookup(hashes, 3) == 3
    shared = ledger.open(hashes, 3)
    assert shared.blocks[1][:2] == [NO_BLOCK, NO_BLOCK], "only the last window is taken over"
    ledger.close(shared)
    ledger.close(table)
    needy = ledger.open([], 0)
    ledger.grow(needy, 2)  # evicts window blocks of indexes 0 and 1, which were given back first
    assert ledger.lookup(hashes, 3) == 3
    assert ledger.lookup(hashes, 1) == 0, "token 4 would see index 0, which is gone"
    ledger.grow(needy, 2)
    assert ledger.lookup(hashes, 3) == 0


@given(st.integers(1, 20), st.integers(1, 5), st.integers(1, 60))
def test_most_needed_is_what_some_token_really_sees(tokens: int, size: int, length: int) -> None:
    ledger = BlockLedger([window(1000, tokens=tokens, block_tokens=size)])
    pool = ledger.pools[0]
    seen = [
        {position // size for position in range(max(0, at - tokens + 1), at + 1)}
        for at in range(tokens + 4 * size)
    ]
    assert pool.most_needed(1000) == max(len(blocks) for blocks in seen)
    assert pool.first_needed(length) == max(0, length - tokens + 1) // size
    assert pool.most_needed(1) == 1


def test_leased_blocks_stay_until_released() -> None:
    ledger = BlockLedger([paged(4)])
    table = fill(ledger, [1, 2])
    ledger.lease(RequestId(7), table, deadline=5.0)
    assert ledger.counts().held == 2
    ledger.close(table)
    counts = ledger.counts()
    assert (counts.free, counts.held, counts.leased) == (2, 0, 2)
    assert ledger.lookup([1, 2], 2) == 2, "they can still be shared here"
    assert ledger.next_deadline() == 5.0
    assert ledger.expired(4.9) == ()
    assert ledger.expired(5.0) == (7,)
    ledger.release(RequestId(7))
    assert ledger.counts().leased == 0
    assert ledger.counts().cached == 2
    assert ledger.next_deadline() is None
    with pytest.raises(LedgerError, match="request 7 has no lease"):
        ledger.release(RequestId(7))


def test_a_second_lease_for_a_request_is_a_defect() -> None:
    ledger = BlockLedger([paged(4)])
    table = fill(ledger, [1])
    ledger.lease(RequestId(1), table)
    with pytest.raises(LedgerError, match="has a lease already"):
        ledger.lease(RequestId(1), table)


def test_changes_are_net_and_said_once() -> None:
    ledger = BlockLedger([paged(2)])
    table = fill(ledger, [1, 2])
    assert ledger.drain_changes() == ((1, 2), ())
    assert ledger.drain_changes() == ((), ())
    ledger.close(table)
    table = fill(ledger, [3])  # evicts 2
    ledger.close(table)
    ledger.close(fill(ledger, [5, 6]))  # evicts 1 and 3
    ledger.close(fill(ledger, [1]))  # 1 is back: nothing to say about it
    added, removed = ledger.drain_changes()
    assert set(added) == {5}
    assert set(removed) == {2}


def test_what_would_come_back_is_what_nobody_shares() -> None:
    ledger = BlockLedger([paged(8)])
    table = fill(ledger, [1, 2, 3])
    other = ledger.open([1, 2], 2)
    assert ledger.would_free(table) == 1
    assert ledger.would_free(other) == 0


def test_admission_counts_idle_hits_new_blocks_and_what_others_need() -> None:
    ledger = BlockLedger([paged(8)])
    ledger.close(fill(ledger, [1, 2]))
    held = fill(ledger, [7, 8])
    assert ledger.admits([1, 2], 2, num_blocks=6, spare=[0])
    assert not ledger.admits([1, 2], 2, num_blocks=7, spare=[0])
    assert not ledger.admits([1, 2], 2, num_blocks=6, spare=[1])
    assert ledger.admits([7, 8], 2, num_blocks=8, spare=[0]), "hits in use cost nothing"
    assert held.num_blocks == 2


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"kind": "state"}, "kind 'state' is not kept; use 'paged' or 'window'"),
        ({"kind": "window"}, "needs window >= 1, got None"),
        ({"num_blocks": 0}, "num_blocks 0"),
        ({"block_tokens": 8}, "block_tokens 8 differs from 4 of 'kv'"),
    ],
)
def test_groups_that_are_not_kept_are_refused_by_name(spec: dict[str, object], words: str) -> None:
    facts = {"name": "other", "num_blocks": 4, "block_tokens": 4} | spec
    with pytest.raises(UnsupportedCacheGroup, match="cache group 'other'.*" + words):
        BlockLedger([paged(4), CacheGroupSpec(**facts)])  # type: ignore[arg-type]


def test_a_worker_without_groups_is_refused() -> None:
    with pytest.raises(UnsupportedCacheGroup, match="at least one cache group"):
        BlockLedger([])


# --- the laws notice ------------------------------------------------------------------------------


def test_law_4_notices_a_leak_and_a_block_in_two_places() -> None:
    ledger = BlockLedger([paged(4)])
    table = fill(ledger, [1])
    law_4_blocks_add_up(ledger)
    with pytest.raises(LawBroken, match="law 4: block 0: owners are not tables"):
        law_4_owners_are_tables(ledger, [])
    ledger.pools[0].free.append(table.blocks[0][0])
    with pytest.raises(LawBroken, match="law 4"):
        law_4_blocks_add_up(ledger)


def test_law_11_notices_a_block_shared_without_content_and_a_silent_reuse() -> None:
    ledger = BlockLedger([paged(4)])
    one, two = ledger.open([], 0), ledger.open([], 0)
    ledger.grow(one, 1)
    two.blocks[0].append(one.blocks[0][0])
    with pytest.raises(LawBroken, match="law 11"):
        law_11_shared_by_content_only(ledger, [one, two])
    watch = GenerationWatch(ledger)
    ledger.grow(one, 1)
    ledger.pools[0].generation[one.blocks[0][1]] -= 1
    with pytest.raises(LawBroken, match="law 11"):
        watch.check()


# --- a slow, obvious model ------------------------------------------------------------------------


@dataclass
class ModelTable:
    """The same table as the model keeps it: contents instead of counters."""

    real: BlockTable
    hashes: list[int]
    groups: list[list[int | None]]
    computed: int = 0


@dataclass
class ModelLedger:
    """Per group: who holds what as plain lists; nothing is counted before it is asked for."""

    specs: list[CacheGroupSpec]
    named: list[dict[int, int]] = field(default_factory=list)
    """Per group, block -> content."""
    idle: list[list[int]] = field(default_factory=list)
    """Per group, findable blocks that nobody holds, the next to be evicted first."""
    tables: list[ModelTable] = field(default_factory=list)
    leases: dict[int, list[list[int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.named = [{} for _ in self.specs]
        self.idle = [[] for _ in self.specs]

    def holders(self, group: int, block: int) -> int:
        return sum(table.groups[group].count(block) for table in self.tables)

    def pinned(self, group: int, block: int) -> int:
        return sum(blocks[group].count(block) for blocks in self.leases.values())

    def account(self, group: int) -> tuple[int, int, int, int]:
        """free, cached, held, leased"""
        everyone = range(self.specs[group].num_blocks)
        held = [b for b in everyone if self.holders(group, b)]
        leased = [b for b in everyone if self.pinned(group, b) and b not in held]
        free = len(everyone) - len(held) - len(leased)
        return free, len(self.idle[group]), len(held), len(leased)

    def first(self, group: int, tokens: int) -> int:
        span = self.specs[group].window
        return 0 if span is None else max(0, tokens - span + 1) // SIZE

    def lookup(self, hashes: list[int]) -> int:
        for hits in range(len(hashes), 0, -1):
            if all(
                content in self.named[group].values()
                for group in range(len(self.specs))
                for content in hashes[self.first(group, hits * SIZE) : hits]
            ):
                return hits
        return 0

    def leave(self, group: int, block: int) -> None:
        """A holder or a lease has let go of this block."""
        if self.holders(group, block) or self.pinned(group, block):
            return
        if block in self.named[group]:
            self.idle[group].append(block)

    def take(self, group: int, block: int) -> None:
        """The ledger has taken this block for new content: was it the right one?"""
        assert not self.holders(group, block)
        assert not self.pinned(group, block)
        free = [
            b
            for b in range(self.specs[group].num_blocks)
            if not self.holders(group, b)
            and not self.pinned(group, b)
            and b not in self.idle[group]
        ]
        if free:
            assert block in free, "a cached block was evicted while a free one was there"
        else:
            assert block == self.idle[group].pop(0), "not the least recently used"
            del self.named[group][block]


CHAINS = [block_hashes(contents_of([first] * 40), SIZE) for first in range(3)]
CHAINS += [CHAINS[0][:2] + block_hashes(contents_of([9] * 40), SIZE)[2:]]


class LedgerMachine(RuleBasedStateMachine):
    """Every operation on both; lookups, accounts, changes and eviction must agree."""

    @initialize(
        blocks=st.integers(3, 9), span=st.none() | st.integers(1, 9), more=st.integers(3, 9)
    )
    def begin(self, blocks: int, span: int | None, more: int) -> None:
        groups = [paged(blocks)] + ([window(more, tokens=span)] if span else [])
        self.ledger = BlockLedger(groups)
        self.model = ModelLedger(list(groups))
        self.watch = GenerationWatch(self.ledger)
        self.next_lease = 0
        self.findable: set[int] = set()

    def _table(self, pick: int) -> ModelTable | None:
        return self.model.tables[pick % len(self.model.tables)] if self.model.tables else None

    @rule(chain=st.sampled_from(CHAINS), length=st.integers(0, 6))
    def open(self, chain: list[int], length: int) -> None:
        hits = self.ledger.lookup(chain, length)
        assert hits == self.model.lookup(chain[:length])
        table = ModelTable(self.ledger.open(chain, hits), chain, [], hits)
        for group in range(len(self.model.specs)):
            begin = self.model.first(group, hits * SIZE)
            found = {c: b for b, c in self.model.named[group].items()}
            blocks: list[int | None] = [None] * begin
            blocks += [found[content] for content in chain[begin:hits]]
            self.model.idle[group] = [b for b in self.model.idle[group] if b not in blocks]
            table.groups.append(blocks)
        self.model.tables.append(table)

    @rule(pick=st.integers(0, 99), number=st.integers(1, 3))
    def grow(self, pick: int, number: int) -> None:
        table = self._table(pick)
        if table is None or len(table.groups[0]) + number > 10:
            return
        groups = range(len(self.model.specs))
        enough = all(self.model.account(group)[0] >= number for group in groups)
        if not enough:
            with pytest.raises(OutOfBlocks):
                self.ledger.grow(table.real, number)
            return
        self.ledger.grow(table.real, number)
        for group in groups:
            for block in table.real.blocks[group][-number:]:
                self.model.take(group, block)
                table.groups[group].append(block)

    @rule(pick=st.integers(0, 99), number=st.integers(1, 4))
    def compute(self, pick: int, number: int) -> None:
        """KV of some more blocks is there: register, then slide."""
        table = self._table(pick)
        if table is None:
            return
        table.computed = min(table.computed + number, len(table.groups[0]))
        self.ledger.register(table.real, table.hashes, table.computed)
        self.ledger.slide(table.real, table.computed * SIZE)
        for group, blocks in enumerate(table.groups):
            for index in range(table.computed):
                block, content = blocks[index], table.hashes[index]
                known = self.model.named[group]
                if block is not None and block not in known and content not in known.values():
                    known[block] = content
            for index in range(min(self.model.first(group, table.computed * SIZE), len(blocks))):
                block, blocks[index] = blocks[index], None
                if block is not None:
                    self.model.leave(group, block)

    @rule(pick=st.integers(0, 99))
    def close(self, pick: int) -> None:
        table = self._table(pick)
        if table is None:
            return
        self.ledger.close(table.real)
        self.model.tables.remove(table)
        for group, blocks in enumerate(table.groups):
            for block in reversed(blocks):
                if block is not None:
                    self.model.leave(group, block)

    @rule(pick=st.integers(0, 99))
    def lease(self, pick: int) -> None:
        table = self._table(pick)
        if table is None:
            return
        self.next_lease += 1
        self.ledger.lease(RequestId(self.next_lease), table.real)
        pinned = [[b for b in blocks if b is not None] for blocks in table.groups]
        self.model.leases[self.next_lease] = pinned

    @rule(pick=st.integers(0, 99))
    def release(self, pick: int) -> None:
        if not self.model.leases:
            return
        request_id = sorted(self.model.leases)[pick % len(self.model.leases)]
        self.ledger.release(RequestId(request_id))
        for group, blocks in enumerate(self.model.leases.pop(request_id)):
            for block in reversed(blocks):
                self.model.leave(group, block)

    @rule()
    def drain(self) -> None:
        added, removed = self.ledger.drain_changes()
        assert not self.findable & set(added)
        assert self.findable >= set(removed)
        self.findable = (self.findable | set(added)) - set(removed)
        assert self.findable == set(self.model.named[0].values())

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "ledger"):
            return
        law_4_blocks_add_up(self.ledger)
        tables = [table.real for table in self.model.tables]
        law_4_owners_are_tables(self.ledger, tables)
        law_11_shared_by_content_only(self.ledger, tables)
        self.watch.check()
        for group, pool in enumerate(self.ledger.pools):
            counts = pool.counts()
            told = (counts.free, counts.cached, counts.held, counts.leased)
            assert told == self.model.account(group)
            assert list(pool.cached) == self.model.idle[group]
            assert {b: c for b, c in enumerate(pool.hash_of) if c is not None} == (
                self.model.named[group]
            )


LedgerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLedgerAgreesWithModel = LedgerMachine.TestCase


class ManyMoreExamples(LedgerMachine):
    """The same, longer."""


ManyMoreExamples.TestCase.settings = settings(
    max_examples=2000, stateful_step_count=80, deadline=None
)
TestLedgerAgreesWithModelAtLength = pytest.mark.slow(
    pytest.mark.timeout(3600)(ManyMoreExamples.TestCase)
)
