"""Where a request is while it moves from one worker to another, and the few changes that may happen
to that.

A *move* (`appliance.core.request_table.Move`) has three moments::

    begin      Pull to the target, Migrate to the source; the request is the source's
    hand_over  the source has stopped and keeps the KV on a lease; the request is the target's
    land       the target has the KV and goes on; Release to the source

and ends early by `call_off` (before the source has stopped), `take_back` (after it) or `drop` (the
request itself ends or waits again). Whoever is left with something of a sequence that is not its
own is told: the source `Resume` or `Abort`, the target `Abort`. A worker that was told to forget a
live request is not given it again before it has said `Aborted`: what it says until then is of the
past."""

from typing import TYPE_CHECKING

from appliance.core.lifecycle import RequestState, WorkerState
from appliance.core.messages import Abort, Migrate, Pull, Release, Resume
from appliance.core.request_table import Move, RequestRecord
from appliance.core.types import MoveId
from appliance.core.worker_table import SERVING, WorkerSlot

if TYPE_CHECKING:
    from appliance.core.node_state import NodeState


COMPUTED = -1
"""As `reports_before`: the worker has computed the request, or is about to, as it says."""


class MoveBook:
    """Moves as part of a `NodeState`."""

    def __init__(self, state: "NodeState") -> None:
        self._state = state
        self._last_move = 0

    def targets(self, record: RequestRecord, now: float) -> list[WorkerSlot]:
        """Workers that may pull this request now from the one where it is. None for a suspect, nor
        for one that moves, has just failed to, or has one token left to get. Off a worker that is
        to be parked it may go to those for prompts too if no other is there."""
        source = None if record.worker is None else self._state.slots[record.worker]
        if source is None or source.moves_after > now or not self._may_move(record, now):
            return []
        longest = self._state.config.max_model_len
        fit = [
            slot
            for slot in self._state.slots.values()
            if slot.state is WorkerState.READY
            and slot is not source
            and not slot.reserved
            and slot.moves_after <= now
            and source.id in self._state.links.get(slot.id, ())
            and slot.takes(record, now, max_model_len=longest)
        ]
        meant = [slot for slot in fit if slot.prefers_decode]
        if not meant and source.parked:
            meant = fit
        return [slot for slot in meant if slot.has_room(record)]

    @staticmethod
    def _may_move(record: RequestRecord, now: float) -> bool:
        return (
            record.move is None
            and not record.suspected
            and record.move_after <= now
            and record.request.max_tokens - record.emitted > 1
            and record.state in (RequestState.ASSIGNED, RequestState.DECODING)
        )

    def begin(self, record: RequestRecord, target: WorkerSlot, now: float, *, live: bool) -> None:
        """Let `target` pull a request from where it is. Until its source has stopped it is that
        one's."""
        if record.worker is None:
            raise ValueError(f"it is at no worker; {record.story()}")
        source = self._state.slots[record.worker]
        self._last_move += 1
        move = record.move = Move(
            MoveId(self._last_move),
            source.id,
            target=target.id,
            live=live,
            blocks=target.blocks_of(record),
            began=now,
        )
        target.expect(record, move.blocks)
        if record.state is RequestState.DECODING:
            self._state.requests.move(record, RequestState.MIGRATING, now, worker=source.id)
        self._state.out.append(
            Pull(
                worker=target.id,
                move=move.id,
                request=record.request,
                source=source.id,
                emitted_tokens=record.emitted,
            )
        )
        self._state.out.append(
            Migrate(
                worker=source.id,
                move=move.id,
                request_id=record.request.id,
                target=target.id,
                live=live,
                lease_seconds=self._state.config.lease_seconds,
            )
        )

    def hand_over(self, record: RequestRecord, move: Move, now: float) -> None:
        """The source has stopped and keeps the KV: from now on the request is the target's."""
        source, target = self._state.slots[move.source], self._state.slots[move.target]
        move.stopped = move.leased = True
        self._state.settle(record)
        source.unseat(record)
        source.leased[record.request.id] = move.id
        self._not_incoming(record, move)
        target.seat(record)
        target.given = True
        self._state.requests.move(record, RequestState.HANDING_OFF, now, worker=target.id)

    def land(self, record: RequestRecord, move: Move, now: float) -> None:
        """The target has the KV and goes on; the source may free it."""
        record.move = None
        record.resumed = None
        record.moves_failed = 0
        record.reports_before = COMPUTED
        self._state.slots[move.source].moved_out += 1
        self._state.slots[move.target].tally.begin_decode(record)
        self._state.requests.move(record, RequestState.DECODING, now, worker=move.target)
        if move.leased:
            self._state.out.append(
                Release(worker=move.source, move=move.id, request_id=record.request.id)
            )

    def call_off(
        self, record: RequestRecord, now: float, *, held: bool, pause: bool = True
    ) -> None:
        """End a move whose source has not stopped, as far as is known: it goes on there. `held`:
        the target still has a part of it, and is told to forget it. With `pause` the move has
        failed, and the next one waits a little."""
        move = record.move
        if move is None or move.stopped:
            raise ValueError(f"no move to call off; {record.story()}")
        record.move = None
        self._not_incoming(record, move)
        if held:
            self.forget_at(record, self._state.slots[move.target])
        if record.state is RequestState.MIGRATING:
            self._state.requests.move(record, RequestState.DECODING, now, worker=move.source)
        self._resume(record, move, now, pause=pause)

    def take_back(self, record: RequestRecord, now: float) -> None:
        """The target of a stopped move cannot go on with it, and holds nothing: it goes on at the
        source, from the lease; without one it waits again."""
        move = record.move
        if move is None or not move.stopped:
            raise ValueError(f"no move to take back; {record.story()}")
        source = self._state.slots[move.source]
        if not move.leased or source.reserved or record.suspected:
            self._state.requeue(record, now)
            return
        record.move = None
        self._state.slots[move.target].unseat(record)
        source.leased.pop(record.request.id, None)
        source.seat(record)
        source.tally.begin_decode(record)
        record.reports_before = COMPUTED
        self._state.requests.move(record, RequestState.DECODING, now, worker=source.id)
        self._resume(record, move, now, pause=True)

    def _resume(self, record: RequestRecord, move: Move, now: float, *, pause: bool) -> None:
        config = self._state.config
        record.resumed = move.id
        if pause:
            seconds = min(config.move_pause * 2**record.moves_failed, config.move_pause_max)
            record.moves_failed += 1
            record.move_after = now + seconds
        self._state.out.append(
            Resume(worker=move.source, move=move.id, request_id=record.request.id)
        )

    def _not_incoming(self, record: RequestRecord, move: Move) -> None:
        self._state.slots[move.target].unexpect(record, move.blocks)

    def drop(self, record: RequestRecord) -> None:
        """The request ends or waits again: the other worker of its move forgets it."""
        move = record.move
        if move is None:
            return
        record.move = None
        if not move.stopped:
            self._not_incoming(record, move)
            self.forget_at(record, self._state.slots[move.target])
        elif move.leased:
            source = self._state.slots[move.source]
            source.leased.pop(record.request.id, None)
            source.touch()
            self.forget_at(record, source)

    def call_off_incoming(self, slot: WorkerSlot, now: float) -> None:
        """What only begins to come to this worker goes on where it is."""
        for record in list(slot.incoming.values()):
            self.call_off(record, now, held=True, pause=False)

    def lose(self, slot: WorkerSlot, now: float) -> list[RequestRecord]:
        """This worker died: what was said of it as a source, a target, or one that should forget.
        Returns the requests it was pulling; each goes on at its source, or waits again without
        one."""
        for record in list(slot.leaving.values()):
            self._state.left(record, slot)
        for request_id, move_id in slot.leased.items():
            kept = self._state.requests.get(request_id)
            if kept is not None and kept.move is not None and kept.move.id == move_id:
                kept.move.leased = False
        slot.leased.clear()
        copied = self.copied_by(slot)
        for record in copied:
            if record.move is not None and record.move.stopped:
                self.take_back(record, now)
            else:
                self.call_off(record, now, held=False)
        return copied

    def copied_by(self, slot: WorkerSlot) -> list[RequestRecord]:
        """Requests that this worker pulls, their source stopped or not."""
        stopped = [
            record
            for record in slot.assigned.values()
            if record.move is not None and record.move.stopped
        ]
        return [*slot.incoming.values(), *stopped]

    def recall(self, record: RequestRecord, now: float) -> None:
        """Take a request off a worker that serves it well; it waits to be placed again."""
        if record.worker is None:
            return
        slot = self._state.slots[record.worker]
        self._state.requeue(record, now)
        self.forget_at(record, slot)

    def forget_at(self, record: RequestRecord, slot: WorkerSlot) -> None:
        """This worker must forget the request, which lives on."""
        if slot.state in SERVING:
            record.leaving.add(slot.id)
            slot.leaving[record.request.id] = record
            self._state.out.append(Abort(worker=slot.id, request_id=record.request.id))
