"""Exporter: the source's side of moves.

Where a sequence that is to go to another worker stands, beside its own state::

    announced   `Migrate` was heard; the target has not asked, nothing is said to it
    offered     the target asked: blocks are offered as they become complete
    stopping    planned no further (STOPPING); steps planned before still compute it
    held        stopped (HELD): everything is offered, its blocks are a lease

Until it stops nothing about its service here changes, so a move costs nothing if it fails, and
nobody ever waits for a full target. It stops only when all of its KV fits into the room that the
target has reserved, when all that was known at its admission (but the last token) is computed, and
when at least one token was emitted; with `live`, not before the target is nearly up to date.

Once stopped it belongs to the node: `Release` ends the lease, `Resume` makes it run again, and so
does nothing else. After its deadline the lease ends by itself and the sequence is gone.
"""

from collections.abc import Callable, Iterable

from appliance.core.blocks import BlockTable
from appliance.core.messages import Migrate, Preempted, Prefilled, Released, Report
from appliance.core.peer import Asked, Dropped, Offered, Taken, Withdrawn
from appliance.core.peer_mail import PeerMail
from appliance.core.sequence import LiveSequence, Queues, SeqState
from appliance.core.types import BlockId, MoveId, RequestId, WorkerId

FINAL_BLOCKS = 2
"""A live move stops its sequence when no more complete blocks than these are still to be copied."""


class Export:
    """One sequence on its way out."""

    __slots__ = (
        "asked",
        "deadline",
        "lease_seconds",
        "live",
        "move",
        "named",
        "offered",
        "room",
        "seq",
        "table",
        "taken",
        "target",
    )

    def __init__(self, command: Migrate, seq: LiveSequence) -> None:
        self.move = command.move
        self.target = command.target
        self.live = command.live
        self.lease_seconds = command.lease_seconds
        self.seq = seq
        self.table: BlockTable | None = None
        """The sequence's table since it has one: another one means that it was preempted."""
        self.asked = False
        self.offered = 0
        """Blocks that the target has or knows of."""
        self.taken = 0
        self.room = 0
        """Blocks that the target has reserved."""
        self.deadline: float | None = None
        """When its lease ends; None while it is not held."""
        self.named = 0
        """Of the leased blocks, those that were offered as findable."""


class Exporter:
    """All sequences of one Batcher that go to other workers. `reports` are sent by the Batcher."""

    def __init__(
        self,
        worker: WorkerId,
        queues: Queues,
        *,
        mail: PeerMail,
        reports: list[Report],
        checksum: Callable[[BlockId], int] | None,
    ) -> None:
        self._worker = worker
        self._queues = queues
        self._ledger = queues.ledger
        self._mail = mail
        self._reports = reports
        self._checksum = checksum
        self._open: dict[MoveId, Export] = {}
        """Announced, offered or stopping."""
        self._held: dict[MoveId, Export] = {}
        self._moves: dict[RequestId, MoveId] = {}
        """Of both."""

    @property
    def busy(self) -> bool:
        """Whether `settle` may have something to do."""
        return bool(self._open)

    @property
    def next_deadline(self) -> float | None:
        """When the next lease ends."""
        deadlines = (each.deadline for each in self._held.values() if each.deadline is not None)
        return min(deadlines, default=None) if self._held else None

    def of_move(self, move: MoveId) -> Export | None:
        """What is known of this move."""
        return self._open.get(move) or self._held.get(move)

    def of_request(self, request_id: RequestId) -> Export | None:
        """The move of this sequence."""
        move = self._moves.get(request_id)
        return None if move is None else self.of_move(move)

    def held(self) -> Iterable[LiveSequence]:
        """Sequences that have stopped (laws)."""
        return [each.seq for each in self._held.values()]

    # --- what the node says ---------------------------------------------------------------------

    def begin(self, command: Migrate, seq: LiveSequence) -> None:
        """Announce a live sequence that is not held and has no other move."""
        self._open[command.move] = Export(command, seq)
        self._moves[seq.id] = command.move
        for message in self._mail.early(command.target, command.move):
            if isinstance(message, Asked | Taken | Dropped):
                self._obey(self._open.get(command.move), message)

    def turn_away(self, command: Migrate, reason: str) -> None:
        """The command was refused: the target need not wait."""
        self._mail.early(command.target, command.move)
        self._mail.say(command.target, Withdrawn(move=command.move, reason=reason))

    def resume(self, move: MoveId) -> bool:
        """The move is off: the sequence goes on here. False: nothing is known of it."""
        export = self._open.get(move)
        if export is not None:
            self._keep_here(export)
            self._withdraw(export, "it goes on at the source")
            return True
        export = self._held.get(move)
        if export is None:
            return False
        self._forget(export)
        seq, lost = export.seq, export.seq.num_done
        self._queues.unhold(seq, self._ledger.reopen(seq.id, export.named))
        if seq.state is SeqState.WAITING:
            self._reports.append(
                Preempted(worker=self._worker, request_id=seq.id, lost_tokens=lost)
            )
        self._mail.say(export.target, Withdrawn(move=move, reason="it goes on at the source"))
        return True

    def release(self, move: MoveId) -> bool:
        """The target has everything. False: the sequence has not stopped."""
        export = self._held.get(move)
        if export is None:
            return move not in self._open
        self._end(export)
        return True

    def abort(self, request_id: RequestId) -> bool:
        """Forget a held sequence. False: it is not held."""
        export = self.of_request(request_id)
        if export is None or export.move not in self._held:
            return False
        self._end(export)
        self._mail.say(export.target, Withdrawn(move=export.move, reason="aborted"))
        return True

    def expire(self, now: float) -> None:
        """End the leases whose time is over."""
        for export in list(self._held.values()):
            if export.deadline is not None and export.deadline <= now:
                self._end(export)
                withdrawn = Withdrawn(move=export.move, reason="the lease has expired")
                self._mail.say(export.target, withdrawn)
                self._reports.append(
                    Released(
                        worker=self._worker,
                        move=export.move,
                        request_id=export.seq.id,
                        expired=True,
                    )
                )

    # --- what peers say -------------------------------------------------------------------------

    def hear(self, peer: WorkerId, message: Asked | Taken | Dropped, now: float) -> None:
        """The target speaks. What belongs to no move of it is kept if it can be early."""
        export = self._open.get(message.move)
        if export is not None and export.target == peer:
            self._obey(export, message)
        elif export is None and message.move not in self._held and not isinstance(message, Taken):
            self._mail.keep(peer, message, now)

    def _obey(self, export: Export | None, message: Asked | Taken | Dropped) -> None:
        if export is None:
            return
        match message:
            case Asked(num_blocks=num_blocks, room=room):
                export.asked = True
                export.offered = export.taken = num_blocks
                export.room = room
            case Taken(num_blocks=num_blocks, room=room):
                export.taken, export.room = num_blocks, room
            case Dropped():
                self._keep_here(export)
                self._forget(export)

    def lose(self, peer: WorkerId) -> None:
        """The target's process is gone: what has not stopped stays here; what has stopped waits
        for the node."""
        for export in [each for each in self._open.values() if each.target == peer]:
            self._keep_here(export)
            self._forget(export)

    # --- what time brings -----------------------------------------------------------------------

    def settle(self, now: float, about: MoveId | None = None) -> None:
        """Look at each sequence that has not stopped (or at that of one move): offer, stop, hold or
        withdraw it."""
        exports = list(self._open.values())
        if about is not None:
            exports = [self._open[about]] if about in self._open else []
        for export in exports:
            why = self._why_not(export)
            if why:
                self._withdraw(export, why)
            elif export.table is not None and export.asked:
                self._advance(export, export.table, now)

    def _why_not(self, export: Export) -> str:
        """Why this sequence cannot move any more; empty when it can."""
        seq = export.seq
        if seq.state is SeqState.ENDED:
            return "ended"
        if seq.state is SeqState.CANCELLED or self._queues.by_id.get(seq.id) is not seq:
            return "aborted"
        if seq.state is SeqState.PREEMPTED:
            return "preempted"
        if export.table is None:
            export.table = seq.table
        return "" if export.table is seq.table else "preempted"

    def _advance(self, export: Export, table: BlockTable, now: float) -> None:
        seq = export.seq
        if seq.state is SeqState.RUNNING and self._may_stop(export):
            self._queues.stop(seq)
        if seq.state is SeqState.STOPPING and not seq.num_outstanding:
            self._hold(export, table, now)
            return
        complete = seq.num_done // self._ledger.block_tokens
        if complete > export.offered:
            first = export.offered
            self._offer(export, table.blocks[0][first:complete])

    def _may_stop(self, export: Export) -> bool:
        seq, ledger = export.seq, self._ledger
        if not seq.num_emitted or seq.num_done + 1 < seq.target:
            return False
        if ledger.blocks_for(seq.num_computed) > export.room:
            return False
        missing = seq.num_done // ledger.block_tokens - export.taken
        return not export.live or missing <= FINAL_BLOCKS

    def _offer(
        self, export: Export, blocks: list[BlockId], *, stopped_at: float | None = None
    ) -> None:
        generation, checksum, seq = self._ledger.generation, self._checksum, export.seq
        final = stopped_at is not None
        offer = Offered(
            move=export.move,
            first=export.offered,
            blocks=tuple(blocks),
            generations=tuple([generation(0, block) for block in blocks]),
            num_tokens=seq.num_done,
            final=final,
            num_emitted=seq.num_emitted,
            cached_tokens=seq.cached_tokens or 0,
            stopped_at=stopped_at or 0.0,
            first_token_at=seq.first_token_at,
            emitted_before=seq.emitted_before,
            checksums=() if checksum is None else tuple([checksum(block) for block in blocks]),
        )
        export.offered += len(blocks)
        self._mail.say(export.target, offer)

    def _hold(self, export: Export, table: BlockTable, now: float) -> None:
        seq = export.seq
        export.deadline = now + export.lease_seconds
        export.named = table.num_named
        self._ledger.lease(seq.id, table, deadline=export.deadline)
        rest = table.blocks[0][export.offered : self._ledger.blocks_for(seq.num_done)]
        self._queues.hold(seq)
        del self._open[export.move]
        self._held[export.move] = export
        self._reports.append(
            Prefilled(
                worker=self._worker,
                move=export.move,
                request_id=seq.id,
                emitted_tokens=seq.num_emitted,
            )
        )
        self._offer(export, rest, stopped_at=now)

    # --- ends -----------------------------------------------------------------------------------

    def _keep_here(self, export: Export) -> None:
        if export.seq.state is SeqState.STOPPING:
            self._queues.unstop(export.seq)

    def _withdraw(self, export: Export, reason: str) -> None:
        self._forget(export)
        self._mail.say(export.target, Withdrawn(move=export.move, reason=reason))

    def _end(self, export: Export) -> None:
        """A held sequence is gone from here."""
        self._forget(export)
        self._queues.forget_held(export.seq)
        self._ledger.release(export.seq.id)

    def _forget(self, export: Export) -> None:
        self._open.pop(export.move, None)
        self._held.pop(export.move, None)
        del self._moves[export.seq.id]
