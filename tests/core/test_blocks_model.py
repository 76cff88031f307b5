"""BlockLedger compared with a slow, obvious model: every operation on both."""

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from appliance.core.blocks import (
    BlockLedger,
    BlockTable,
    OutOfBlocks,
)
from appliance.core.invariants import (
    GenerationWatch,
    law_4_blocks_add_up,
    law_4_owners_are_tables,
    law_11_shared_by_content_only,
)
from appliance.core.types import CacheGroupSpec, RequestId
from tests.core.toy_worker import block_hashes, contents_of, paged, window

SIZE = 4


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
        """KV of some more blocks is there: register, then slide. What was a duplicate when it was
        computed stays private, even if the other one is evicted later."""
        table = self._table(pick)
        if table is None:
            return
        before = table.computed
        table.computed = min(table.computed + number, len(table.groups[0]))
        self.ledger.register(table.real, table.hashes, table.computed)
        self.ledger.slide(table.real, table.computed * SIZE)
        for group, blocks in enumerate(table.groups):
            for index in range(before, table.computed):
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


LedgerMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestLedgerAgreesWithModel = LedgerMachine.TestCase


class ManyMoreExamples(LedgerMachine):
    """The same, longer."""


ManyMoreExamples.TestCase.settings = settings(
    max_examples=2000, stateful_step_count=80, deadline=None
)
TestLedgerAgreesWithModelAtLength = pytest.mark.slow(
    pytest.mark.timeout(3600)(ManyMoreExamples.TestCase)
)
