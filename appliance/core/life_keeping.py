"""Keeping workers alive: start, respawn with back-off, quarantine, and what becomes of their
requests.

* A dead worker is started again after `respawn_backoff`, doubled with every further *bad* death in
  a row. `quarantine_deaths` bad deaths in a row end that: the worker stays down, the others serve
  on.
* A row of bad deaths is cut by an incarnation that *served healthily*: its last proof of health, a
  finished step or an idle heartbeat, came `healthy_seconds` or more after it was up. An incarnation
  that got work and never finished a step was not healthy, however long it idled before.
* A death is not the worker's fault, and not bad, while a suspect is on trial there. When a suspect
  is convicted, the earlier deaths it was present at are struck from the rows of the workers it
  killed.
* A request was *present* at a death if the worker had said anything of its load since it was given
  the request: a worker does so before it computes it. A worker that was dead already is no sign
  against what was sent to it, up to `spared_deaths` times per request.
* A dead worker's requests wait again, before those that were never placed, and go on elsewhere
  after the tokens already sent. One that was being cancelled is gone with the worker.
* A request that the dead worker was only copying goes on at its source. Copying is no computing,
  so such a death is forgiven like that of a worker which had said nothing, and as often; then it
  counts as any other. A source that had stopped computing a request has no part in it any more: its
  death counts for nobody whose KV it only kept.

`docs/adr/0005-dispatcher-life-keeping.md` gives the reasons.
"""

from appliance.core.lifecycle import RequestState, WorkerState
from appliance.core.messages import (
    Heartbeat,
    Park,
    Quarantine,
    SetRole,
    StartWorker,
    WorkerDown,
    WorkerUp,
)
from appliance.core.node_state import NodeState
from appliance.core.request_table import RequestRecord
from appliance.core.types import ErrorKind
from appliance.core.worker_table import WorkerSlot


class LifeKeeper:
    """Decides when workers start and what their death means. State lives in the slots."""

    def __init__(self, state: NodeState) -> None:
        self._state = state
        self.next_start: float | None = 0.0
        """The earliest `start_at` of all workers."""
        self.pools_changed = False
        """A worker came up or was quarantined since somebody last put this to False."""

    def start_due(self, now: float) -> None:
        """Say `StartWorker` for every worker whose time has come. A node that only drains and has
        nothing left to finish starts none."""
        if self.next_start is None or now < self.next_start:
            return
        if self._state.is_draining and not len(self._state.requests):
            self.next_start = None
            return
        for slot in self._state.slots.values():
            if slot.start_at is not None and now >= slot.start_at:
                self._start(slot)
        self.plan()

    def worker_up(self, slot: WorkerSlot, report: WorkerUp, now: float) -> bool:
        """The incarnation that was started serves, in the role that the node has for it, or goes on
        standby; any other one is not ours (False)."""
        if slot.state is not WorkerState.STARTING or report.epoch != slot.epoch:
            return False
        slot.up(report, now)
        self.pools_changed = True
        if report.role is not slot.role:
            slot.role_epoch += 1
            role = SetRole(worker=slot.id, role=slot.role, epoch=slot.role_epoch)
            self._state.out.append(role)
        if slot.parked:
            slot.go(WorkerState.PARKED)
            self._state.out.append(Park(worker=slot.id))
        return True

    def heartbeat(self, slot: WorkerSlot, report: Heartbeat, now: float) -> None:
        """An idle heartbeat is a proof of health; a load is taken over."""
        if report.in_step is None:
            slot.proved_at = now
        if report.load is not None:
            slot.note_load(report.load, now)

    def worker_down(self, slot: WorkerSlot, report: WorkerDown, now: float) -> bool:
        """Free its requests, then respawn or quarantine it. Ignored (False) for another
        incarnation."""
        down = slot.state in (WorkerState.DEAD, WorkerState.QUARANTINED)
        if down or report.epoch != slot.epoch:
            return False
        self._lose_moves(slot, now)
        healthy = self._was_healthy(slot)
        lost = sorted(slot.assigned.values(), key=lambda record: record.order)
        to_blame = any(record.isolated for record in lost)
        for record in lost:
            self._lose(record, slot, now, alone=len(lost) == 1)
        slot.down()
        self._state.links.pop(slot.id, None)
        for links in self._state.links.values():
            links.pop(slot.id, None)
        words = slot.last_words
        slot.last_cause = f"{words} ({report.cause})" if words else report.cause
        if not to_blame:
            if healthy:
                slot.bad_epochs.clear()
            slot.bad_epochs.append(slot.epoch)
        self._respawn_or_quarantine(slot, now)
        return True

    def _was_healthy(self, slot: WorkerSlot) -> bool:
        if slot.up_at is None or slot.proved_at is None or (slot.given and not slot.stepped):
            return False
        return slot.proved_at - slot.up_at >= self._state.config.healthy_seconds

    def _lose_moves(self, slot: WorkerSlot, now: float) -> None:
        """What it was copying goes on at the sources; suspects among them are taken off."""
        config = self._state.config
        for record in self._state.moves.copied_by(slot):
            if record.spared < config.spared_deaths:
                record.spared += 1
            else:
                self._blame(record, slot)
        for record in self._state.moves.lose(slot, now):
            if record.suspected:
                self._state.moves.recall(record, now)

    def _blame(self, record: RequestRecord, slot: WorkerSlot) -> None:
        record.acquitted = False
        record.deaths.append((slot.id, slot.epoch))
        record.suspected = len(record.deaths) >= self._state.config.poison_deaths

    def _lose(self, record: RequestRecord, slot: WorkerSlot, now: float, *, alone: bool) -> None:
        config = self._state.config
        if record.state is RequestState.CANCELLING:
            self._state.confirm_cancelled(record, now)
            return
        unheard = slot.num_loads == record.reports_before
        if unheard and record.spared < config.spared_deaths:
            record.spared += 1
            self._state.requeue(record, now)
            return
        if record.isolated and self._is_conclusive(record, slot, alone=alone):
            self._convict(record)
            words = f"{len(record.deaths) + 1} workers died while they served this request"
            self._state.fail(record, now, kind=ErrorKind.POISON, message=words)
            return
        if record.isolated:
            record.trials += 1
            record.strict = True
        self._blame(record, slot)
        self._state.requeue(record, now)

    def _is_conclusive(self, record: RequestRecord, slot: WorkerSlot, *, alone: bool) -> bool:
        """Whether a death during the trial of `record` was the request's: nobody else was there,
        and either it was a strict trial or this worker is not one that keeps dying with it while
        another has not been tried."""
        config = self._state.config
        if not alone:
            return False
        if record.strict or record.trials + 1 >= config.max_trials:
            return True
        witnesses = {worker for worker, _ in record.deaths}
        return slot.id not in witnesses or all(
            other.id in witnesses or other.state is WorkerState.QUARANTINED
            for other in self._state.slots.values()
        )

    def _convict(self, record: RequestRecord) -> None:
        for worker, epoch in record.deaths:
            rows = self._state.slots[worker].bad_epochs
            if epoch in rows:
                rows.remove(epoch)

    def _respawn_or_quarantine(self, slot: WorkerSlot, now: float) -> None:
        config = self._state.config
        row = len(slot.bad_epochs)
        if row >= config.quarantine_deaths:
            slot.go(WorkerState.QUARANTINED)
            self.pools_changed = True
            words = f"{row} deaths in a row, the last: {slot.last_cause}"
            self._state.out.append(Quarantine(worker=slot.id, reason=words))
        else:
            pause = config.respawn_backoff * 2 ** max(0, row - 1)
            slot.start_at = now + min(pause, config.respawn_backoff_max)
        self.plan()

    def _start(self, slot: WorkerSlot) -> None:
        slot.start_at = None
        slot.epoch += 1
        slot.last_words = ""
        if slot.state is not WorkerState.STARTING:
            slot.go(WorkerState.STARTING)
        self._state.out.append(StartWorker(worker=slot.id, epoch=slot.epoch))

    def plan(self) -> None:
        """Somebody's `start_at` has changed."""
        times = [slot.start_at for slot in self._state.slots.values() if slot.start_at is not None]
        self.next_start = min(times, default=None)
