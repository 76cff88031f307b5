"""Importer: the target's side of moves.

Where a sequence that comes from another worker stands::

    waiting     `Pull` was heard, there is no room yet; nothing is held
    reserved    blocks and a slot are reserved, the source was asked; what it offers is copied
    final       the source has stopped; the rest is copied, then the sequence *lands*: it is
                admitted with its KV and planned like any other
    leaving     given up, but copies into its blocks are under way; they come back when those end

Room is reserved like for an admission: beside what running sequences will need, and not past
somebody who waits longer and found no room. It then grows with what the source offers, as far as
memory allows. Until the source has stopped, a reservation is taken back before anybody is preempted
(`give_way`), so full workers that send each other sequences cannot stand still: nothing waits for a
reservation but the move itself. A final one needs nothing more and always comes to an end.

Whatever was copied and verified becomes findable in the cache, also if the move fails later.
"""

from bisect import insort
from collections import deque
from collections.abc import Iterable, Sequence

from appliance.core.blocks import BlockTable
from appliance.core.messages import Aborted, KvPulled, Pull, PullFailed, Report
from appliance.core.peer import Asked, CopyDone, CopyJob, Dropped, Offered, Taken, Withdrawn
from appliance.core.peer_mail import PeerMail
from appliance.core.sequence import LiveSequence, Queues
from appliance.core.slo import due, slack
from appliance.core.types import BlockHash, BlockId, MoveId, Request, RequestId, WorkerId

ROOM_AHEAD = 2
"""Blocks to reserve beyond the complete ones that were offered: the one that the source writes, and
one more, so that the source need not wait for room while it decodes on."""


class Import:
    """One sequence on its way in."""

    __slots__ = (
        "answer_abort",
        "final",
        "hashes",
        "jobs",
        "leaving",
        "most_blocks",
        "move",
        "num_bytes",
        "num_hits",
        "path",
        "pending",
        "seq",
        "source",
        "table",
        "taken",
        "told",
    )

    def __init__(self, command: Pull, seq: LiveSequence, most_blocks: int) -> None:
        self.move = command.move
        self.source = command.source
        self.seq = seq
        self.most_blocks = most_blocks
        """What it can ever need."""
        self.table: BlockTable | None = None
        """None while it waits for room."""
        self.num_hits = 0
        """Leading blocks that were in the cache here."""
        self.pending: deque[tuple[BlockId, int, int | None]] = deque()
        """Offered and in no copy job: block at the source, generation, checksum."""
        self.jobs: deque[int] = deque()
        """Copies under way, oldest first: leading blocks that are here when it is done."""
        self.taken = 0
        """Leading blocks that are here."""
        self.told = (0, 0)
        """What the source knows: taken, and room."""
        self.final: Offered | None = None
        self.hashes: Sequence[BlockHash] = command.request.prefix_hashes
        self.leaving = ""
        """Why it is given up."""
        self.answer_abort = False
        self.num_bytes = 0
        self.path = "cache"

    @property
    def issued(self) -> int:
        """Leading blocks that are here or being copied."""
        return self.jobs[-1] if self.jobs else self.taken

    @property
    def offered(self) -> int:
        """Leading blocks that are here, being copied, or offered."""
        return self.issued + len(self.pending)


class Importer:
    """All sequences of one Batcher that come from other workers. `reports` are sent by the
    Batcher."""

    def __init__(
        self, worker: WorkerId, queues: Queues, *, mail: PeerMail, reports: list[Report]
    ) -> None:
        self._worker = worker
        self._queues = queues
        self._ledger = queues.ledger
        self._mail = mail
        self._reports = reports
        self._imports: dict[MoveId, Import] = {}
        self._moves: dict[RequestId, MoveId] = {}
        self._waiting: list[Import] = []
        """Those without a table, in the order of the queue."""
        self._lacking = False
        """Some of those that have a table could use more room."""
        self._jobs: list[CopyJob] = []

    @property
    def busy(self) -> bool:
        """Whether anything is on its way."""
        return bool(self._imports)

    @property
    def leaving(self) -> bool:
        """Blocks of some that were given up come back when their copies are done."""
        return any(each.leaving for each in self._imports.values())

    @property
    def copying(self) -> bool:
        """Whether a copy is under way."""
        return any(each.jobs for each in self._imports.values())

    @property
    def num_reserved(self) -> int:
        """Slots that they keep (laws)."""
        return sum(each.table is not None and not each.leaving for each in self._imports.values())

    def tables(self) -> list[BlockTable]:
        """Blocks that they hold."""
        return [each.table for each in self._imports.values() if each.table is not None]

    def of_request(self, request_id: RequestId) -> Import | None:
        """The move that brings this sequence."""
        move = self._moves.get(request_id)
        return None if move is None else self._imports[move]

    def of_move(self, move: MoveId) -> Import | None:
        """What is known of this move."""
        return self._imports.get(move)

    def drain_copies(self) -> list[CopyJob]:
        """Copies to be made, since the last call."""
        if not self._jobs:
            return []
        jobs, self._jobs = self._jobs, []
        return jobs

    # --- what the node says ---------------------------------------------------------------------

    def begin(self, command: Pull, seq: LiveSequence) -> None:
        """Wait for room for a sequence that is not here in any way."""
        most = self._ledger.blocks_for(seq.limit - 1)
        each = Import(command, seq, most)
        self._imports[each.move] = each
        self._moves[seq.id] = each.move
        insort(self._waiting, each, key=lambda other: other.seq.order)
        for message in self._mail.early(command.source, command.move):
            if isinstance(message, Withdrawn):
                self._withdrawn(each, message)
                return

    def turn_away(self, command: Pull, reason: str) -> None:
        """The command was refused: the source need not wait."""
        self._mail.early(command.source, command.move)
        self._mail.say(command.source, Dropped(move=command.move, reason=reason))

    def abort(self, request_id: RequestId) -> bool:
        """Give it up; `Aborted` is reported as soon as its blocks are free. False: unknown."""
        each = self.of_request(request_id)
        if each is None:
            return False
        each.answer_abort = True
        if not each.leaving:
            self._drop(each, "aborted")
        return True

    # --- what peers and copies say --------------------------------------------------------------

    def hear(
        self,
        peer: WorkerId,
        message: Offered | Withdrawn,
        now: float,
        *,
        hashes: Sequence[BlockHash],
    ) -> None:
        """The source speaks. `hashes`: with a final offer, names of all full blocks of known
        tokens."""
        each = self._imports.get(message.move)
        if each is None:
            if isinstance(message, Withdrawn):
                self._mail.keep(peer, message, now)
            return
        if each.source != peer or each.leaving:
            return
        match message:
            case Withdrawn():
                self._withdrawn(each, message)
            case Offered():
                self._take_offer(each, message, hashes)

    def _withdrawn(self, each: Import, message: Withdrawn) -> None:
        self._drop(each, f"the source has withdrawn: {message.reason}", tell=False)

    def _take_offer(self, each: Import, offer: Offered, hashes: Sequence[BlockHash]) -> None:
        wrong = self._whats_wrong(each, offer, hashes)
        if wrong:
            self._drop(each, wrong)
            return
        checksums: Iterable[int | None] = offer.checksums or [None] * len(offer.blocks)
        each.pending.extend(zip(offer.blocks, offer.generations, checksums, strict=True))
        if offer.final:
            each.final = offer
            if hashes:
                each.hashes = hashes

    def _whats_wrong(self, each: Import, offer: Offered, hashes: Sequence[BlockHash]) -> str:
        ledger, prompt = self._ledger, each.seq.request.prompt_tokens
        if each.table is None or each.final is not None or offer.first != each.offered:
            return f"an offer of blocks {offer.first}.. came, not of {each.offered}.."
        end = offer.first + len(offer.blocks)
        if len(offer.generations) != len(offer.blocks) or end > each.most_blocks:
            return f"an offer of {len(offer.blocks)} blocks up to {end} does not fit its request"
        if not offer.final:
            return ""
        known = prompt + offer.num_emitted
        if not (known > offer.num_tokens >= each.num_hits * ledger.block_tokens):
            return f"KV of {offer.num_tokens} tokens came for {known} known ones"
        if known >= each.seq.limit or offer.num_emitted < each.seq.num_emitted:
            return f"{offer.num_emitted} tokens were emitted, which cannot be"
        if end != ledger.blocks_for(offer.num_tokens):
            return f"{end} blocks came for KV of {offer.num_tokens} tokens"
        if len(hashes) > known // ledger.block_tokens:
            return f"{len(hashes)} names came for {known} tokens"
        return ""

    def copied(self, done: CopyDone) -> bool:
        """The oldest copy of this move has ended. False: none was under way."""
        each = self._imports.get(done.move)
        if each is None or not each.jobs:
            return False
        here = each.jobs.popleft()
        if done.failed and not each.leaving:
            self._drop(each, done.failed)
        elif each.leaving:
            self._finish_leaving(each)
        elif each.table is not None:
            each.taken = here
            each.num_bytes += done.num_bytes
            each.path = done.path
            full = here
            if each.final is not None:
                full = min(here, each.final.num_tokens // self._ledger.block_tokens)
            self._ledger.register(each.table, each.hashes, full)
        return True

    def lose(self, peer: WorkerId) -> None:
        """The source's process is gone: its memory is not, so what has been offered for good is
        still copied."""
        for each in [each for each in self._imports.values() if each.source == peer]:
            if each.final is None and not each.leaving:
                self._drop(each, "the source is gone", tell=False)

    # --- what time brings -----------------------------------------------------------------------

    def settle(self, now: float, about: MoveId | None = None) -> None:
        """Reserve, grow, copy, land; whatever has become possible, or (if nobody waits for room) of
        one move."""
        imports = list(self._imports.values())
        if about is None or self._waiting or self._lacking:
            self._lacking = False
        else:
            imports = [self._imports[about]] if about in self._imports else []
        for each in list(self._waiting):
            if not self._reserve(each):
                break
        promised: list[int] | None = None
        for each in imports:
            if each.table is None or each.leaving:
                continue
            want = min(each.most_blocks, each.offered + ROOM_AHEAD)
            if each.final is not None:
                want = each.offered
            if each.table.num_blocks < want:
                promised = promised or self._queues.promised()
                self._grow(each.table, want, 0 if each.final else promised[0])
                self._lacking = self._lacking or each.table.num_blocks < want
            if each.pending and each.table.num_blocks > each.issued:
                self._copy(each, each.table, now)
            if each.final is None:
                self._tell(each, each.table)
            elif not each.jobs:
                self._arrive(each, each.table, each.final, now)

    def _reserve(self, each: Import) -> bool:
        queues, ledger, seq = self._queues, self._ledger, each.seq
        if queues.free_slots <= 0:
            return False
        if queues.head_refused and queues.waiting and queues.waiting[0].order < seq.order:
            return False
        hits = ledger.lookup(seq.hashes, (seq.num_known - 1) // ledger.block_tokens)
        blocks = min(each.most_blocks, ledger.blocks_for(seq.num_known) + ROOM_AHEAD - 1)
        if not ledger.admits(seq.hashes, hits, num_blocks=blocks, spare=queues.promised()):
            return False
        table = each.table = ledger.open(seq.hashes, hits)
        ledger.grow(table, blocks - hits)
        queues.num_reserved += 1
        self._waiting.remove(each)
        each.num_hits = each.taken = hits
        each.told = (hits, blocks)
        self._mail.say(each.source, Asked(move=each.move, num_blocks=hits, room=blocks))
        return True

    def _grow(self, table: BlockTable, want: int, keep: int) -> None:
        some = min(want - table.num_blocks, self._ledger.num_free - keep)
        if some > 0:
            self._ledger.grow(table, some)

    def _copy(self, each: Import, table: BlockTable, now: float) -> None:
        first = each.issued
        count = min(len(each.pending), table.num_blocks - first)
        parts = [each.pending.popleft() for _ in range(count)]
        emitted = each.seq.num_emitted if each.final is None else each.final.num_emitted
        self._jobs.append(
            CopyJob(
                move=each.move,
                peer=each.source,
                sources=tuple([block for block, _, _ in parts]),
                targets=tuple(table.blocks[0][first : first + count]),
                generations=tuple([generation for _, generation, _ in parts]),
                checksums=tuple([check for _, _, check in parts if check is not None]),
                slack=self._slack(each.seq.request, emitted, now),
            )
        )
        each.jobs.append(first + count)

    def _slack(self, request: Request, emitted: int, now: float) -> float | None:
        """Seconds until the next token is due; its real first token is not known here."""
        deadline = due(request.slo, emitted, arrived=request.arrived, first_token_at=None)
        return slack(deadline, now)

    def _tell(self, each: Import, table: BlockTable) -> None:
        state = (each.taken, table.num_blocks)
        if state != each.told:
            each.told = state
            message = Taken(move=each.move, num_blocks=each.taken, room=table.num_blocks)
            self._mail.say(each.source, message)

    def _arrive(self, each: Import, table: BlockTable, final: Offered, now: float) -> None:
        """Everything is copied that could be: land, or give up if the rest found no room."""
        if each.pending:
            self._drop(each, f"there is no room for {len(each.pending)} more blocks")
            return
        seq, ledger = each.seq, self._ledger
        seq.num_emitted = final.num_emitted
        seq.num_known = seq.request.prompt_tokens + final.num_emitted
        seq.hashes = list(each.hashes)
        seq.cached_tokens = final.cached_tokens
        seq.first_token_at = now if final.first_token_at is None else final.first_token_at
        seq.emitted_before = final.emitted_before
        ledger.register(table, seq.hashes, final.num_tokens // ledger.block_tokens)
        self._forget(each)
        self._queues.num_reserved -= 1
        self._queues.land(seq, table, final.num_tokens)
        self._reports.append(
            KvPulled(
                worker=self._worker,
                move=each.move,
                request_id=seq.id,
                source=each.source,
                emitted_tokens=final.num_emitted,
                num_tokens=final.num_tokens - each.num_hits * ledger.block_tokens,
                num_bytes=each.num_bytes,
                seconds=max(0.0, now - final.stopped_at),
                path=each.path,
            )
        )

    # --- ends -----------------------------------------------------------------------------------

    def give_way(self) -> bool:
        """Take back the latest reservation whose source has not stopped. False: there is none. Its
        slot is free now, its blocks are as soon as no copy into them is under way."""
        for each in reversed(self._imports.values()):
            if each.table is not None and each.final is None and not each.leaving:
                self._drop(each, "its room was needed")
                return True
        return False

    def _drop(self, each: Import, reason: str, *, tell: bool = True) -> None:
        """Give it up; its blocks are free now or when its copies are done."""
        each.leaving = reason
        each.pending.clear()
        if tell:
            self._mail.say(each.source, Dropped(move=each.move, reason=reason))
        if each.table is not None:
            self._queues.num_reserved -= 1
        for job in [job for job in self._jobs if job.move == each.move]:
            self._jobs.remove(job)
            each.jobs.pop()
        self._finish_leaving(each)

    def _finish_leaving(self, each: Import) -> None:
        if each.jobs:
            return
        if each.table is not None:
            self._ledger.close(each.table)
            each.table = None
        self._forget(each)
        request_id = each.seq.id
        if each.answer_abort:
            self._reports.append(Aborted(worker=self._worker, request_id=request_id))
            return
        self._reports.append(
            PullFailed(
                worker=self._worker,
                move=each.move,
                request_id=request_id,
                source=each.source,
                reason=each.leaving,
            )
        )

    def _forget(self, each: Import) -> None:
        del self._imports[each.move]
        del self._moves[each.seq.id]
        if each in self._waiting:
            self._waiting.remove(each)
