"""A pool that outlives its worker: what the index must say, and what a successor makes of it."""

import pytest

from appliance.core.batcher import Batcher
from appliance.core.blocks import BlockLedger, LedgerError
from appliance.core.messages import Assign, CacheChanged
from appliance.core.peer import IndexChanges, Inherited
from appliance.core.types import BatcherConfig, Request, RequestId
from tests.core.toy_worker import FCFS, WORKER, paged, window


def test_the_index_hears_of_taken_blocks_before_named_ones() -> None:
    ledger = BlockLedger([paged(4)])
    table = ledger.open([], 0)
    ledger.grow(table, 2)
    ledger.register(table, [11, 12], 1)
    first, second = table.blocks[0]
    assert ledger.drain_index() == IndexChanges(
        taken=((first, 1), (second, 1)), named=((first, 11),)
    )
    assert ledger.drain_index() == IndexChanges(taken=(), named=())


def test_a_name_that_is_gone_before_it_was_told_is_not_told() -> None:
    ledger = BlockLedger([paged(1)])
    table = ledger.open([], 0)
    ledger.grow(table, 1)
    ledger.register(table, [11], 1)
    ledger.close(table)
    table = ledger.open([], 0)
    ledger.grow(table, 1)
    assert ledger.drain_index() == IndexChanges(taken=((0, 2),), named=())


def test_named_blocks_are_inherited_as_cached_and_generations_go_on() -> None:
    inherited = Inherited(generations=(5, 6, 7), names=(0, 22, 21))
    ledger = BlockLedger([paged(3)], inherited=inherited)
    counts = ledger.counts()
    assert (counts.free, counts.cached) == (3, 2)
    assert ledger.lookup([21, 22], 2) == 2
    assert ledger.drain_changes() == ((22, 21), ())
    assert ledger.drain_index() == IndexChanges(taken=(), named=())
    table = ledger.open([], 0)
    ledger.grow(table, 2)
    assert table.blocks[0] == [0, 1], "the free one first, then the first of those that have a name"
    assert [ledger.generation(0, block) for block in (0, 1, 2)] == [6, 7, 7]


def test_of_two_blocks_of_one_name_one_is_kept_and_the_other_is_voided() -> None:
    inherited = Inherited(generations=(5, 6), names=(21, 21))
    ledger = BlockLedger([paged(2)], inherited=inherited)
    assert ledger.counts().cached == 1
    assert ledger.drain_index() == IndexChanges(taken=((1, 7),), named=())


def test_without_a_prefix_cache_only_generations_are_inherited() -> None:
    inherited = Inherited(generations=(5, 6), names=(21, 22))
    ledger = BlockLedger([paged(2)], prefix_cache=False, inherited=inherited)
    assert ledger.counts().cached == 0
    assert ledger.generation(0, 1) == 6


def test_only_one_paged_group_of_the_same_size_inherits() -> None:
    inherited = Inherited(generations=(5, 6), names=(21, 22))
    for groups in ([paged(3)], [paged(2), window(9, tokens=3)]):
        with pytest.raises(LedgerError, match="inherited"):
            BlockLedger(groups, inherited=inherited)


def test_a_successor_announces_what_it_found_and_serves_it() -> None:
    inherited = Inherited(generations=(5, 6, 7, 8), names=(21, 22, 0, 0))
    config = BatcherConfig(max_model_len=16)
    batcher = Batcher(WORKER, config, groups=[paged(4)], policy=FCFS, inherited=inherited)
    assert batcher.announce() == [CacheChanged(worker=WORKER, added=(21, 22))]
    assert batcher.announce() == []
    request = Request(
        id=RequestId(1), arrived=0.0, prompt_tokens=9, max_tokens=3, prefix_hashes=(21, 22)
    )
    batcher.handle(Assign(worker=WORKER, request=request), 0.0)
    plan = batcher.next_step(0.0)
    assert plan is not None
    assert (plan.work[0].start, plan.work[0].num_tokens) == (8, 1)


def test_a_lease_is_given_back_as_the_table_it_was() -> None:
    ledger = BlockLedger([paged(4)])
    table = ledger.open([], 0)
    ledger.grow(table, 3)
    ledger.register(table, [11], 1)
    blocks = list(table.blocks[0])
    ledger.lease(RequestId(1), table)
    ledger.close(table)
    assert ledger.counts().leased == 3
    again = ledger.reopen(RequestId(1), 1)
    assert (again.blocks[0], again.num_blocks, again.num_named) == (blocks, 3, 1)
    assert (ledger.counts().leased, ledger.counts().held) == (0, 3)
    with pytest.raises(LedgerError, match="has no lease"):
        ledger.reopen(RequestId(1), 1)
