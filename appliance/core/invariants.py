"""The laws of one worker, checked against its Batcher and ledger.

Used by tests after every call and by `--validate` after every step. Numbers are those of
`docs/invariants.md`; 0 is the agreement of the Batcher's own books. The node's laws are in
`appliance.core.invariants_node`. Nothing here is fast: each law counts again what the mechanism
keeps up to date.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from appliance.core.batcher import Batcher
from appliance.core.blocks import NO_BLOCK, BlockLedger, BlockTable
from appliance.core.messages import (
    Abort,
    Aborted,
    Assign,
    Command,
    KvPulled,
    Prefilled,
    Pull,
    PullFailed,
    Refused,
    Released,
    Report,
    Resume,
    StepReported,
)
from appliance.core.pool import Pool
from appliance.core.sequence import OVER, LiveSequence, SeqState
from appliance.core.types import BlockId, RequestId, StepPlan


class LawBroken(Exception):
    """A law does not hold; `law` is its number."""

    def __init__(self, law: int, words: str) -> None:
        super().__init__(f"law {law}: {words}")
        self.law = law


def _want(law: int, holds: object, words: str) -> None:
    if not holds:
        raise LawBroken(law, words)


# --- ledger ---------------------------------------------------------------------------------------


def _place(pool: Pool, block: BlockId, free: Counter[BlockId]) -> str:
    places = [
        *["free"] * free[block],
        *["cached"] * (block in pool.cached),
        *["held"] * (pool.owners[block] > 0),
        *["leased"] * (pool.owners[block] == 0 and pool.pins[block] > 0),
    ]
    _want(4, len(places) == 1, f"block {block} of {pool.spec.name!r} is in {places}, not in one")
    return places[0]


def law_4_blocks_add_up(ledger: BlockLedger) -> None:
    """free + held + leased = total, each block in exactly one place, and the account says so."""
    for pool in ledger.pools:
        free = Counter(pool.free)
        found = Counter(_place(pool, block, free) for block in range(pool.spec.num_blocks))
        counts = pool.counts()
        told = {"held": counts.held, "leased": counts.leased, "cached": counts.cached}
        for place, number in told.items():
            _want(4, found[place] == number, f"{number} blocks said {place}, {found[place]} are")
        total = counts.free + counts.held + counts.leased
        _want(4, total == counts.total, f"free + held + leased = {total} of {counts.total}")
        for block, content in enumerate(pool.hash_of):
            if content is not None:
                _want(4, pool.block_of[content] == block, f"block {block} is not found by its hash")
                _want(4, free[block] == 0, f"block {block} has a hash and is on the free list")
        named = sum(content is not None for content in pool.hash_of)
        _want(4, named == len(pool.block_of), "a hash finds a block that does not bear it")


def law_4_owners_are_tables(ledger: BlockLedger, tables: Sequence[BlockTable]) -> None:
    """A block is owned exactly as often as it stands in tables, and pinned as often as in
    leases."""
    for group, pool in enumerate(ledger.pools):
        owned = Counter(
            block for table in tables for block in table.blocks[group] if block != NO_BLOCK
        )
        pinned = Counter(b for lease in ledger.leases.values() for b in lease.blocks[group])
        for block in range(pool.spec.num_blocks):
            _want(4, pool.owners[block] == owned[block], f"block {block}: owners are not tables")
            _want(4, pool.pins[block] == pinned[block], f"block {block}: pins are not leases")


def law_11_shared_by_content_only(ledger: BlockLedger, tables: Sequence[BlockTable]) -> None:
    """Two tables hold the same block only at the same index, complete, and under one hash."""
    for group, pool in enumerate(ledger.pools):
        seen: dict[BlockId, int] = {}
        for table in tables:
            for index, block in enumerate(table.blocks[group]):
                if block == NO_BLOCK:
                    continue
                if block in seen:
                    words = f"block {block} of {pool.spec.name!r} is in two tables"
                    _want(11, pool.hash_of[block] is not None, f"{words} without a hash")
                    _want(11, seen[block] == index, f"{words} at {seen[block]} and {index}")
                    _want(11, index < table.num_named, f"{words} and not complete in one")
                seen[block] = index


class GenerationWatch:
    """Law 11: a block's generation never goes back, and a block that is taken anew gets a new
    one."""

    def __init__(self, ledger: BlockLedger) -> None:
        self._ledger = ledger
        self._seen = [list(pool.generation) for pool in ledger.pools]
        self._idle = [set(pool.free) for pool in ledger.pools]
        self._named = [list(pool.hash_of) for pool in ledger.pools]

    def check(self) -> None:
        """Compare with the last call."""
        for group, pool in enumerate(self._ledger.pools):
            free = set(pool.free)
            for block, (old, new) in enumerate(
                zip(self._seen[group], pool.generation, strict=True)
            ):
                _want(11, new >= old, f"generation of block {block} went from {old} to {new}")
                used_anew = block in self._idle[group] and block not in free
                _want(11, new > old or not used_anew, f"block {block} was reused as {old}")
                named = self._named[group][block]
                renamed = named is not None and named != pool.hash_of[block]
                _want(11, new > old or not renamed, f"block {block} changed content as {old}")
            self._seen[group] = list(pool.generation)
            self._idle[group] = free
            self._named[group] = list(pool.hash_of)


# --- batcher --------------------------------------------------------------------------------------


def _tables(batcher: Batcher) -> list[BlockTable]:
    running = [seq.table for seq in batcher.queues.running if seq.table is not None]
    return [*running, *batcher.importer.tables(), *batcher.fetcher.tables()]


def _check_sequence(seq: LiveSequence, *, admitted: bool) -> None:
    story = seq.story()
    _want(0, admitted == (seq.table is not None), f"blocks and place differ; {story}")
    if not admitted:
        _want(0, seq.num_done == seq.num_outstanding == 0, f"waits with a past; {story}")
        return
    known = seq.request.prompt_tokens + seq.num_emitted
    _want(0, seq.num_done <= seq.num_computed <= seq.capacity, story)
    if seq.table is not None:
        complete = seq.table.num_named * (seq.capacity // max(1, seq.table.num_blocks))
        _want(11, complete <= seq.num_done, f"blocks are found before they are computed; {story}")
    if seq.state not in OVER:
        _want(0, known <= seq.num_known <= seq.limit, story)
        _want(0, seq.num_outstanding or seq.num_known == known, f"counts a ghost; {story}")
        _want(0, seq.num_outstanding or seq.num_done == seq.num_computed, story)


def _check_moves(batcher: Batcher, held: Sequence[LiveSequence]) -> None:
    """What goes to other workers and comes from them."""
    queues = batcher.queues
    _want(0, len(held) == queues.num_held, "num_held is not their number")
    exported = {seq.id for seq in batcher.exporter.held()}
    _want(0, exported == {seq.id for seq in held}, f"held are {held}, leases of {exported}")
    _want(0, exported <= set(batcher.ledger.leases), "somebody is held without a lease")
    for seq in held:
        _want(0, seq.table is None and not seq.num_outstanding, seq.story())
        known = seq.request.prompt_tokens + seq.num_emitted
        _want(0, seq.num_done == seq.num_computed < seq.num_known == known, seq.story())
    stopping = sum(seq.state is SeqState.STOPPING for seq in queues.running)
    _want(0, stopping == queues.num_stopping, "num_stopping is not their number")
    reserved = batcher.importer.num_reserved
    _want(0, reserved == queues.num_reserved, f"{queues.num_reserved} slots for {reserved}")


def law_0_books_agree(batcher: Batcher) -> None:
    """Every sequence is in one place, every sum is the sum of its parts, and what a planned step
    touches is still held."""
    queues = batcher.queues
    blocked = [seq for seq in queues.by_id.values() if seq.state is SeqState.BLOCKED]
    held = [seq for seq in queues.by_id.values() if seq.state is SeqState.HELD]
    everyone = [*queues.waiting, *queues.running, *blocked, *held]
    _want(0, {seq.id for seq in everyone} == set(queues.by_id), "queues and ids differ")
    _want(0, len(everyone) == len(queues.by_id), "a sequence is in two places")
    _want(0, len(blocked) == queues.num_blocked, "num_blocked is not their number")
    for seq in blocked:
        if batcher.fetcher.of_request(seq.id) is not None:
            _want(0, seq.leader is None, f"waits for two things; {seq.story()}")
            continue
        _want(0, seq.leader is not None and seq in seq.leader.followers, seq.story())
        _want(0, seq.leader is not None and batcher.is_live(seq.leader.id), "waits for a ghost")
    _check_moves(batcher, held)
    for seq in queues.waiting:
        _want(0, seq.state is SeqState.WAITING, seq.story())
    orders = [seq.order for seq in queues.waiting]
    _want(0, orders == sorted(orders), "the queue is out of order")
    for seq in everyone:
        if seq.state is not SeqState.HELD:
            _check_sequence(seq, admitted=seq in queues.running)
    stale = {seq.id for seq in queues.running if seq.state is not SeqState.RUNNING}
    _want(0, stale == queues.stale, f"stale says {queues.stale}, found {stale}")
    stuck = [seq.story() for seq in queues.running if seq.id in stale and not seq.num_outstanding]
    _want(0, not stuck, f"nothing will free {stuck}")
    over = [seq for seq in queues.running if seq.state in OVER]
    _want(0, len(over) == queues.num_over, "num_over is not their number")
    backlog = sum(seq.backlog for seq in everyone if seq.state not in (*OVER, SeqState.HELD))
    _want(0, backlog == queues.backlog_tokens, f"backlog {queues.backlog_tokens}, is {backlog}")
    running = len(queues.running) - len(stale) + queues.num_stopping + queues.num_reserved
    _want(0, running <= batcher.config.max_num_seqs, f"{running} sequences run")
    for seq in batcher.planned_sequences():
        _want(0, seq.table is not None, f"a planned step lost its blocks; {seq.story()}")
    outstanding = batcher.num_outstanding
    _want(0, outstanding <= batcher.config.depth + 1, f"{outstanding} plans are outstanding")


def law_8_work_conserving(batcher: Batcher, plan: StepPlan | None) -> None:
    """Given what `next_step` just answered: with work and nothing outstanding there is a plan,
    unless blocks are leased or being copied (both come to an end by themselves)."""
    idle = plan is None and batcher.num_outstanding == 0
    lent = batcher.ledger.leases or batcher.importer.copying or batcher.fetcher.busy
    _want(8, not (idle and batcher.has_work() and not lent), "idle with runnable work")


class BatchWatch:
    """All laws of one Batcher that hold between any two of its calls."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher
        self._generations = GenerationWatch(batcher.ledger)

    def check(self) -> None:
        """Raise `LawBroken` if one does not hold now."""
        batcher = self._batcher
        tables = _tables(batcher)
        law_0_books_agree(batcher)
        law_4_blocks_add_up(batcher.ledger)
        law_4_owners_are_tables(batcher.ledger, tables)
        law_11_shared_by_content_only(batcher.ledger, tables)
        self._generations.check()


class EndsOnce:
    """Law 1 at one worker: every `Assign` ends with exactly one of finished, `Aborted`, `Released`,
    `Refused`; every `Pull` goes on as an assigned one (`KvPulled`) or ends with one of
    `PullFailed`, `Aborted`, `Refused`; every `Abort` is answered; nothing is said about a sequence
    that has ended, or that has stopped for another worker (`Prefilled`) and was not resumed. An
    `Abort` that crosses the end is answered by an `Aborted` of its own."""

    def __init__(self) -> None:
        self._live: set[RequestId] = set()
        self._coming: set[RequestId] = set()
        self._stopped: set[RequestId] = set()
        self._aborts: set[RequestId] = set()

    @property
    def open(self) -> frozenset[RequestId]:
        """Sequences and aborts that have not been answered."""
        return frozenset(self._live | self._coming | self._aborts)

    @property
    def stopped(self) -> frozenset[RequestId]:
        """Of those, sequences that wait for the node."""
        return frozenset(self._stopped)

    def hear(self, command: Command) -> None:
        """A command is about to be handled."""
        match command:
            case Assign(request=request) | Pull(request=request):
                present = self._live | self._coming
                _want(1, request.id not in present, f"request {request.id} assigned twice")
                where = self._live if isinstance(command, Assign) else self._coming
                where.add(request.id)
            case Abort(request_id=request_id):
                self._aborts.add(request_id)
            case Resume(request_id=request_id):
                self._stopped.discard(request_id)
            case _:
                pass

    def see(self, reports: Iterable[Report]) -> None:
        """Reports came, in this order."""
        for report in reports:
            match report:
                case StepReported(ids=ids, finished=finished):
                    strange = set(ids) - (self._live - self._stopped)
                    _want(1, not strange, f"tokens of {strange}, which do not run")
                    for end in finished:
                        self._end(end.id, "finished")
                case Refused(command="Assign", request_id=int(request_id)):
                    self._end(RequestId(request_id), "refused")
                case Refused(command="Pull", request_id=int(request_id)):
                    self._come(RequestId(request_id), "refused")
                case PullFailed(request_id=request_id):
                    self._come(request_id, "not pulled")
                case KvPulled(request_id=request_id):
                    self._come(request_id, "pulled")
                    self._live.add(request_id)
                case Prefilled(request_id=request_id):
                    _want(1, request_id in self._live, f"{request_id} stopped, but is not live")
                    self._stopped.add(request_id)
                case Released(request_id=request_id):
                    self._live.discard(request_id)
                    self._stopped.discard(request_id)
                case Aborted(request_id=request_id):
                    _want(1, request_id in self._aborts, f"{request_id} aborted unasked")
                    for where in (self._aborts, self._live, self._coming, self._stopped):
                        where.discard(request_id)
                case _:
                    pass

    def _end(self, request_id: RequestId, how: str) -> None:
        _want(1, request_id in self._live, f"request {request_id} {how}, but is not live")
        self._live.discard(request_id)

    def _come(self, request_id: RequestId, how: str) -> None:
        _want(1, request_id in self._coming, f"request {request_id} {how}, but is not coming")
        self._coming.discard(request_id)
