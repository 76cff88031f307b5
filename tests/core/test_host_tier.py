"""What a pool gives up is kept within a bound and comes back as it was."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.core.batcher import Batcher
from appliance.core.blocks import BlockLedger, BlockTable, UnsupportedCacheGroup
from appliance.core.host_tier import HostTier, Spill
from appliance.core.messages import HOST_TIER, Abort, Aborted, Assign, PrefixPulled, Report
from appliance.core.peer import FetchDone
from appliance.core.types import BatcherConfig, Request, RequestId
from tests.core.toy_worker import FCFS, WORKER, paged, window


def test_the_least_recently_used_slot_is_given_away() -> None:
    tier = HostTier(2)
    assert [tier.spill(7, 11), tier.spill(8, 12)] == [0, 1]
    assert tier.spill(9, 11) == 0, "kept already: it is only used again"
    assert tier.spill(9, 13) == 1
    assert tier.drain_spills() == (
        Spill(block=7, slot=0, content=11, generation=1),
        Spill(block=9, slot=1, content=13, generation=2),
    )
    assert tier.drain_spills() == ()
    assert (tier.find([11, 13, 12]), tier.find([12])) == (2, 0)
    assert tier.drain_changes() == ((11, 13), ())
    tier.spill(1, 14)
    assert tier.drain_changes() == ((14,), (11,))
    assert tier.drain_changes() == ((), ())


def test_what_is_held_stays_and_the_evicted_block_is_lost() -> None:
    tier = HostTier(2)
    tier.spill(0, 11)
    tier.spill(1, 12)
    tier.hold([11])
    tier.hold([11, 12])
    assert tier.spill(2, 13) is None
    tier.release([11, 12])
    assert tier.spill(2, 13) == 1
    tier.release([11])
    assert tier.spill(3, 14) == 0
    assert tier.held == {}


def test_of_a_chain_that_was_read_the_end_goes_first() -> None:
    tier = HostTier(3)
    for content in (11, 12, 13):
        tier.spill(content, content)
    tier.hold([11, 12, 13])
    tier.release([11, 12, 13])
    tier.spill(0, 14)
    assert tier.find([11, 12, 13]) == 2


def test_it_is_refused_by_name_where_it_cannot_be() -> None:
    with pytest.raises(ValueError, match="at least 1 block"):
        HostTier(0)
    for groups in ([paged(4), window(4, tokens=3)], [window(4, tokens=3)]):
        with pytest.raises(UnsupportedCacheGroup, match="one paged cache group"):
            BlockLedger(groups, tier=HostTier(4))
    with pytest.raises(UnsupportedCacheGroup, match="prefix cache off"):
        BlockLedger([paged(4)], prefix_cache=False, tier=HostTier(4))


def assign(batcher: Batcher) -> list[Report]:
    request = Request(
        id=RequestId(1), arrived=0.0, prompt_tokens=9, max_tokens=3, prefix_hashes=(21, 22)
    )
    command = Assign(worker=WORKER, request=request, pull_from=HOST_TIER, pull_blocks=2)
    return batcher.handle(command, 0.0)


def tiered() -> tuple[Batcher, HostTier]:
    tier = HostTier(4)
    config = BatcherConfig(max_model_len=16)
    return Batcher(WORKER, config, groups=[paged(4)], policy=FCFS, tier=tier), tier


def test_what_the_tier_has_lost_is_computed() -> None:
    batcher, _ = tiered()
    report = assign(batcher)[0]
    assert isinstance(report, PrefixPulled)
    assert (report.wanted, report.num_blocks) == (2, 0)
    assert report.reason == "it is not in host memory any more"
    assert batcher.drain_fetches() == []
    assert batcher.next_step(0.0) is not None


@pytest.mark.parametrize("aborted", [False, True])
def test_what_is_fetched_is_held_until_the_copy_ends(aborted: bool) -> None:
    batcher, tier = tiered()
    tier.spill(0, 21)
    assign(batcher)
    (job,) = batcher.drain_fetches()
    assert (job.peer, job.hashes, len(job.targets)) == (HOST_TIER, (21,), 1)
    assert tier.held == {21: 1}
    if aborted:
        said = batcher.handle(Abort(worker=WORKER, request_id=RequestId(1)), 0.0)
        assert not [each for each in said if isinstance(each, Aborted)]
        assert tier.held == {21: 1}
    done = FetchDone(
        request_id=RequestId(1), num_blocks=1, num_bytes=64, seconds=0.1, path="host memory"
    )
    reports = batcher.fetched(done, 1.0)
    assert isinstance(reports[0], Aborted if aborted else PrefixPulled)
    assert tier.held == {}
    assert tier.find([21]) == 1


class Toy:
    """A ledger with a tier over memories in which each block holds the name of its content."""

    def __init__(self, num_blocks: int, num_slots: int) -> None:
        self.tier = HostTier(num_slots)
        self.ledger = BlockLedger([paged(num_blocks)], tier=self.tier)
        self.pool = [0] * num_blocks
        self.slots = [0] * num_slots
        self.seen: set[int] = set()
        self.reads: list[tuple[BlockTable, list[int], int, list[int]]] = []
        """Fetches under way: table, names, hits, slots."""

    def flush(self) -> None:
        for spill in self.tier.drain_spills():
            self.slots[spill.slot] = self.pool[spill.block]
            assert self.slots[spill.slot] == spill.content
        added, removed = self.tier.drain_changes()
        assert not self.seen & set(added)
        assert set(removed) <= self.seen
        self.seen = (self.seen - set(removed)) | set(added)

    def compute(self, names: list[int]) -> None:
        """A prompt comes, is computed, and ends."""
        hits = self.ledger.lookup(names, len(names))
        if not self.ledger.admits(names, hits, num_blocks=len(names), spare=[0]):
            return
        table = self.ledger.open(names, hits)
        self.ledger.grow(table, len(names) - hits)
        self.flush()
        for block, name in list(zip(table.blocks[0], names, strict=True))[hits:]:
            self.pool[block] = name
        self._close(table, names)

    def fetch(self, names: list[int]) -> None:
        hits = self.ledger.lookup(names, len(names))
        names = names[: hits + self.tier.find(names[hits:])]
        wanted = names[hits:]
        if not wanted or not self.ledger.admits(names, hits, num_blocks=len(names), spare=[0]):
            return
        self.tier.hold(wanted)
        slots = [self.tier.slot_of[name] for name in wanted]
        table = self.ledger.open(names, hits)
        self.ledger.grow(table, len(wanted))
        self.flush()
        self.reads.append((table, names, hits, slots))

    def arrive(self) -> None:
        table, names, hits, slots = self.reads.pop(0)
        wanted = names[hits:]
        came = [self.slots[slot] for slot in slots]
        assert came == wanted, "a slot was reused while it was read"
        for block, content in zip(table.blocks[0][hits:], came, strict=True):
            self.pool[block] = content
        self.tier.release(wanted)
        self._close(table, names)

    def _close(self, table: BlockTable, names: list[int]) -> None:
        self.ledger.register(table, names, len(names))
        self.ledger.close(table)

    def check(self) -> None:
        kept = self.tier.slot_of
        assert len(kept) <= self.tier.num_blocks
        assert len(set(kept.values())) == len(kept)
        assert {name: self.slots[slot] for name, slot in kept.items()} == {
            name: name for name in kept
        }
        assert set(kept) == self.seen
        held = [name for _, names, hits, _ in self.reads for name in names[hits:]]
        assert self.tier.held == {name: held.count(name) for name in held}


@settings(deadline=None, max_examples=150)
@given(
    sizes=st.tuples(st.integers(2, 8), st.integers(1, 8)),
    ops=st.lists(
        st.tuples(st.sampled_from("ccfa"), st.integers(1, 5), st.integers(1, 6)), max_size=60
    ),
)
def test_what_comes_back_is_what_was_evicted(
    sizes: tuple[int, int], ops: list[tuple[str, int, int]]
) -> None:
    toy = Toy(*sizes)
    for op, chain, length in ops:
        names = [100 * chain + index for index in range(length)]
        match op:
            case "c":
                toy.compute(names)
            case "f":
                toy.fetch(names)
            case _ if toy.reads:
                toy.arrive()
        toy.check()
    while toy.reads:
        toy.arrive()
        toy.check()
    assert toy.tier.held == {}
