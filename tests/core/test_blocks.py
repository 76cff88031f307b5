"""BlockLedger: its promises one by one. Compared with a model in test_blocks_model.py."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
from tests.core.toy_worker import paged, window

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
