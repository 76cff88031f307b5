"""What the Dispatcher knows, and the few moves that may change it.

Deciding lives elsewhere (`dispatcher`, `life_keeping`, `isolation`, policies); every change of
where a request is goes through the methods here, so that tables, slots and what was said cannot
disagree."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from appliance.core.cost import CostModel
from appliance.core.lifecycle import RequestState, WorkerState
from appliance.core.messages import Abort, Assign, Ended, Output
from appliance.core.request_table import RequestRecord, RequestTable
from appliance.core.types import (
    BlockHash,
    ErrorKind,
    FinishReason,
    Record,
    Request,
    WorkerId,
    WorkerSpec,
)
from appliance.core.view import CostView, WorkerView
from appliance.core.worker_table import WorkerSlot


class DispatcherConfig(Record, frozen=True, kw_only=True):
    """Bounds and times of a Dispatcher; seconds, requests, tokens."""

    max_model_len: int
    max_queue: int = 1024
    """Requests that may wait unplaced before new ones are turned away."""
    max_queue_tokens: int = 1_000_000
    """Prompt tokens that may wait; one request may always wait alone."""
    queue_ahead: int = 4
    """Requests placed at a worker beyond what it can run, so that it never idles for a round
    trip."""
    respawn_backoff: float = 0.1
    """Pause before the first respawn; doubled with every further death in a row."""
    respawn_backoff_max: float = 10.0
    quarantine_deaths: int = 3
    """Deaths in a row, without serving healthily between, that end the respawning."""
    healthy_seconds: float = 10.0
    """An incarnation that still finishes steps (or idles) this long after it came up was
    healthy."""
    poison_deaths: int = 2
    """Deaths at which a request must have been present to be suspected."""
    trial_steps: int = 4
    """Steps with tokens of a suspect after which its first trial acquits it."""
    max_trials: int = 3
    """Trials of one request; the last goes on to the end of its answer."""
    spared_deaths: int = 2
    """Deaths of workers that had not answered its assignment, which a request is not blamed for."""
    max_refusals: int = 8
    """Refusals by workers after which a request ends with the last refusal's error."""
    refusal_pause: float = 0.05
    """A worker that refused a request may be asked again after this pause even if nothing changed;
    doubled with every refusal."""
    retry_after_min: float = 1.0
    retry_after_max: float = 60.0


class DispatcherView:
    """The node as policies see it (`appliance.core.view.NodeView`)."""

    def __init__(self, state: "NodeState") -> None:
        self._state = state

    @property
    def workers(self) -> Mapping[WorkerId, WorkerView]:
        """Every configured worker, dead ones too."""
        state = self._state
        return MappingProxyType({slot.id: slot.view(state.cost) for slot in state.slots.values()})

    @property
    def num_waiting(self) -> int:
        """Requests accepted and not placed."""
        return len(self._state.requests.queue) + len(self._state.requests.suspects)

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens of the queue."""
        return self._state.requests.queue.tokens

    @property
    def cost(self) -> CostView:
        """What work costs here."""
        return self._state.cost

    def cached_blocks(self, worker: WorkerId, hashes: Sequence[BlockHash]) -> int:
        """How many leading blocks of `hashes` that worker is believed to hold."""
        slot = self._state.slots.get(worker)
        return 0 if slot is None else slot.cached_blocks(hashes)

    def willing(self, request: Request, now: float) -> Sequence[WorkerId]:
        """Workers that may get this waiting request now."""
        record = self._state.requests.get(request.id)
        if record is None:
            return ()
        return [slot.id for slot in self._state.willing(record, now)]


class NodeState:
    """Requests, workers, what was said in the present call, and the moves between them."""

    def __init__(
        self, config: DispatcherConfig, *, workers: Sequence[WorkerSpec], cost: CostModel
    ) -> None:
        self.config = config
        self.cost = cost
        self.slots: dict[WorkerId, WorkerSlot] = {spec.id: WorkerSlot(spec) for spec in workers}
        if not self.slots or len(self.slots) != len(workers):
            raise ValueError(f"workers: want one or more with distinct ids, got {workers!r}")
        self.requests = RequestTable()
        self.view = DispatcherView(self)
        self.out: list[Output] = []
        """Said since the present message began."""
        self.is_draining = False
        self.num_trials = 0
        """Trials of suspects begun (`appliance.core.isolation`)."""
        self.num_acquitted = 0
        """Trials that ended in an acquittal."""

    @property
    def is_abandoned(self) -> bool:
        """No worker is left that could ever serve again by itself."""
        return all(slot.state is WorkerState.QUARANTINED for slot in self.slots.values())

    def any_open(self) -> bool:
        """Whether some worker may get new work. Cheap: asked after every report."""
        ahead = self.config.queue_ahead
        return any(slot.is_open(ahead) for slot in self.slots.values())

    def willing(self, record: RequestRecord, now: float) -> list[WorkerSlot]:
        """Workers that may get this request now. A sequence of an n > 1 group sees only its
        leader's worker while that one may take it: they share the prompt's blocks there."""
        ahead, longest = self.config.queue_ahead, self.config.max_model_len
        group = record.request.group
        if group is not None and group != record.request.id:
            leader = self.requests.get(group)
            if leader is not None and leader.worker is not None:
                slot = self.slots[leader.worker]
                if slot.is_open(ahead) and slot.takes(record, now, max_model_len=longest):
                    return [slot]
        return [
            slot
            for slot in self.slots.values()
            if slot.is_open(ahead) and slot.takes(record, now, max_model_len=longest)
        ]

    def able(self, suspect: RequestRecord, now: float) -> list[WorkerSlot]:
        """Ready workers, full ones too, that a suspect may be brought to."""
        longest = self.config.max_model_len
        return [
            slot
            for slot in self.slots.values()
            if slot.state is WorkerState.READY and slot.takes(suspect, now, max_model_len=longest)
        ]

    def assign(
        self, record: RequestRecord, slot: WorkerSlot, now: float, *, isolated: bool = False
    ) -> None:
        """Place a waiting request; it goes on after what was sent to the client before."""
        pending = slot.missing_tokens(record)
        self.requests.stop_waiting(record)
        self.requests.move(record, RequestState.ASSIGNED, now, worker=slot.id)
        record.isolated = isolated
        record.trial_steps = 0
        record.reports_before = slot.num_loads
        record.pending = pending
        slot.assigned[record.request.id] = record
        slot.pending_tokens += pending
        slot.given = True
        slot.touch()
        self.out.append(
            Assign(worker=slot.id, request=record.request, emitted_tokens=record.emitted)
        )

    def settle(self, record: RequestRecord) -> None:
        """Its prefill at its worker is done (or void): it no longer counts as pending."""
        if record.pending and record.worker is not None:
            slot = self.slots[record.worker]
            slot.pending_tokens -= record.pending
            record.pending = 0
            slot.touch()

    def requeue(
        self, record: RequestRecord, now: float, *, avoid_until: float | None = None
    ) -> None:
        """Take a request off its worker; it waits to be placed again. With `avoid_until` the worker
        refused it, and is not offered again before that time or a change there."""
        worker = record.worker
        self._leave(record)
        if worker is not None and avoid_until is not None:
            record.avoid[worker] = (self.slots[worker].changes, avoid_until)
        self.requests.wait(record, now, suspect=record.suspected)

    def cancel(self, record: RequestRecord, now: float, *, kind: ErrorKind) -> None:
        """Ask the worker to forget the request; it ends when the worker says so."""
        worker = record.worker
        if worker is None:
            raise ValueError(f"nothing to abort; {record.story()}")
        self.settle(record)
        record.cancel_kind = kind
        self.requests.move(record, RequestState.CANCELLING, now, worker=worker)
        self.out.append(Abort(worker=worker, request_id=record.request.id))

    def finish(
        self, record: RequestRecord, now: float, *, reason: FinishReason, cached_tokens: int
    ) -> None:
        """The answer is complete."""
        self._remove(record, now)
        self.out.append(
            Ended(request_id=record.request.id, reason=reason, cached_tokens=cached_tokens)
        )

    def fail(self, record: RequestRecord, now: float, *, kind: ErrorKind, message: str) -> None:
        """End with a typed error and words for the client."""
        self._remove(record, now)
        self.out.append(Ended(request_id=record.request.id, error=kind, message=message))

    def end_cancelled(self, record: RequestRecord, now: float) -> None:
        """The worker has forgotten a CANCELLING request."""
        kind = record.cancel_kind or ErrorKind.CANCELLED
        self.fail(record, now, kind=kind, message="the request was cancelled")

    def _remove(self, record: RequestRecord, now: float) -> None:
        if record.state is RequestState.WAITING:
            self.requests.stop_waiting(record)
        else:
            self._leave(record)
        self.requests.move(record, RequestState.ENDED, now)

    def _leave(self, record: RequestRecord) -> None:
        if record.worker is None:
            return
        self.settle(record)
        slot = self.slots[record.worker]
        del slot.assigned[record.request.id]
        slot.changes += 1
        slot.touch()
        record.isolated = False
