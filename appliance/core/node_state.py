"""What the Dispatcher knows, and the few moves that may change it.

Deciding lives elsewhere (`dispatcher`, `life_keeping`, `isolation`, policies); every change of
where a request is goes through the methods here and in `MoveBook`, so that tables, slots and what
was said cannot disagree."""

from collections.abc import Sequence

from appliance.core.cost import CostModel
from appliance.core.lifecycle import RequestState, WorkerState
from appliance.core.messages import HOST_TIER, Abort, Assign, Ended, Output
from appliance.core.move_book import MoveBook
from appliance.core.node_config import DispatcherConfig
from appliance.core.node_view import DispatcherView
from appliance.core.request_table import RequestRecord, RequestTable
from appliance.core.slo import verdict
from appliance.core.stamps import times_of
from appliance.core.types import (
    BlockHash,
    ErrorKind,
    FinishReason,
    Request,
    Role,
    WorkerId,
    WorkerSpec,
)
from appliance.core.view import PrefixPlan
from appliance.core.worker_table import WorkerSlot


class Totals:
    """What came and went since the node began."""

    def __init__(self) -> None:
        self.arrived = 0
        self.prompt_tokens = 0
        self.finished = 0
        self.emitted_tokens = 0
        self.met = 0
        self.missed = 0
        self.demoted = 0
        self.refused = 0
        self.expected_tokens = 0.0
        self.prefilled_tokens = 0
        self.instance_seconds = 0.0

    def count_arrival(self, request: Request, cost: CostModel) -> None:
        """A request was accepted."""
        self.arrived += 1
        self.prompt_tokens += request.prompt_tokens
        self.expected_tokens += cost.lengths.at(request.slo.class_name, MEAN_QUANTILE)

    def count_end(self, record: RequestRecord, now: float) -> None:
        """An answer is complete."""
        self.finished += 1
        self.emitted_tokens += record.emitted
        slo = record.request.slo
        if not slo.has_targets:
            return
        how = verdict(
            slo,
            arrived=record.request.arrived,
            first_token_at=record.first_token_at,
            ended_at=now,
            num_tokens=record.emitted,
        )
        if how.met:
            self.met += 1
        else:
            self.missed += 1


MEAN_QUANTILE = 0.67
"""Where the mean of a log-normal length lies whose logarithm has a standard deviation of 0.9."""
HOST_BYTES_PER_SECOND = 10e9
"""Of a copy from a worker's host tier while no link says how fast memory is."""


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
        self.spares = list(config.spares)
        """Workers that may still be started."""
        self._charged: float | None = None
        """Until when the workers' time has been counted."""
        self.requests = RequestTable()
        self.view = DispatcherView(self)
        self.offer: tuple[RequestRecord | None, list[WorkerSlot]] = (None, [])
        """The request that the policy is just being asked to place, and who is willing."""
        self.out: list[Output] = []
        """Said since the present message began."""
        self.is_draining = False
        self.links: dict[WorkerId, dict[WorkerId, float]] = {}
        """Who can copy from whom (bytes per second): target, then source."""
        self.totals = Totals()
        self.moves = MoveBook(self)
        self.has_roles = False
        """Whether any worker has, or takes, another role than mixed, or is on standby or about to
        be. While it is False nothing has to move."""
        self.note_roles()
        self.num_trials = 0
        """Trials of suspects begun (`appliance.core.isolation`)."""
        self.num_acquitted = 0
        """Trials that ended in an acquittal."""

    @property
    def is_abandoned(self) -> bool:
        """No worker is left that could ever serve again by itself."""
        return all(slot.state is WorkerState.QUARANTINED for slot in self.slots.values())

    def charge(self, now: float) -> None:
        """Count the time since the last call for every worker that costs something."""
        self.totals.instance_seconds = self.charged(now)
        self._charged = now

    def charged(self, now: float) -> float:
        """What the workers have cost until now."""
        passed = 0.0 if self._charged is None else max(0.0, now - self._charged)
        number, gone = len(self.slots), WorkerState.QUARANTINED
        for slot in self.slots.values():
            if slot.parked or slot.state is gone:
                number -= not slot.costs
        return self.totals.instance_seconds + passed * number

    def note_roles(self) -> None:
        """Whoever changes a role, or who is on standby, calls this."""
        self.has_roles = any(
            slot.role is not Role.MIXED or slot.next_role is not None or slot.parked
            for slot in self.slots.values()
        )

    def any_open(self) -> bool:
        """Whether some worker may get a new request. Cheap: asked after every report."""
        ahead, steps = self.config.queue_ahead, self.config.prefill_ahead
        if not self.has_roles:
            return any(slot.is_open(ahead, steps) for slot in self.slots.values())
        others: list[WorkerSlot] = []
        largest: float | None = None
        for slot in self.slots.values():
            if slot.state is not WorkerState.READY or slot.reserved:
                continue
            is_open = slot.is_open(ahead, steps)
            if slot.prefers_prefill:
                if is_open:
                    return True
                largest = max(largest or 0.0, slot.capacity)
            elif is_open:
                others.append(slot)
        return any(largest is None or slot.capacity > largest for slot in others)

    def willing(self, record: RequestRecord, now: float) -> list[WorkerSlot]:
        """Workers that may get this waiting request now. A sequence of an n > 1 group sees only its
        leader's worker while that one may take it: they share the prompt's blocks there. Workers
        whose role is decode are not asked while a ready one that is large enough is there for
        prompts."""
        config = self.config
        ahead, steps, longest = config.queue_ahead, config.prefill_ahead, config.max_model_len
        group = record.request.group
        if group is not None and group != record.request.id:
            leader = self.requests.get(group)
            if leader is not None and leader.worker is not None:
                slot = self.slots[leader.worker]
                fits = slot.prefers_prefill and slot.takes(record, now, max_model_len=longest)
                if fits and slot.is_open(ahead, steps):
                    return [slot]
        if not self.has_roles:
            return [
                slot
                for slot in self.slots.values()
                if slot.is_open(ahead, steps) and slot.takes(record, now, max_model_len=longest)
            ]
        fit = [
            slot
            for slot in self.slots.values()
            if slot.state is WorkerState.READY
            and not slot.reserved
            and slot.fits(record.request, longest)
        ]
        meant = [slot for slot in fit if slot.prefers_prefill]
        return [
            slot
            for slot in meant or fit
            if slot.is_open(ahead, steps) and slot.takes(record, now, max_model_len=longest)
        ]

    def prefix_plan(self, slot: WorkerSlot, hashes: Sequence[BlockHash]) -> PrefixPlan:
        """What of a prompt with these blocks `slot` has, and where to copy more from if that is
        cheaper than to compute it: a peer, or its own host tier."""
        local = slot.cached_blocks(hashes)
        config, cost = self.config, self.cost
        peers = self.links.get(slot.id)
        if not (peers or slot.tier) or not config.block_bytes or local == len(hashes):
            return PrefixPlan(local_blocks=local)
        sources: list[tuple[WorkerId, int, float]] = []
        if slot.tier:
            speed = self.copy_speed(slot, HOST_TIER) or HOST_BYTES_PER_SECOND
            sources.append((HOST_TIER, slot.tier_blocks(hashes, local), speed))
        if peers and config.prefix_pull:
            sources += [
                (peer, self.slots[peer].cached_blocks(hashes), speed)
                for peer, speed in peers.items()
            ]
        best: tuple[float, WorkerId, int, float] | None = None
        for peer, blocks, speed in sources:
            if blocks <= local:
                continue
            copy = cost.copy_seconds((blocks - local) * config.block_bytes, speed)
            saved = cost.prefill_seconds((blocks - local) * slot.block_tokens) - copy
            if copy < config.pull_gain * (saved + copy) and (best is None or saved > best[0]):
                best = saved, peer, blocks, copy
        if best is None:
            return PrefixPlan(local_blocks=local)
        _, peer, blocks, copy = best
        return PrefixPlan(local_blocks=local, pull_from=peer, pull_blocks=blocks, copy_seconds=copy)

    def copy_speed(self, slot: WorkerSlot, source: WorkerId) -> float | None:
        """Bytes per second from `source` to this worker; None where there is no link. Its own host
        tier is as fast as its fastest link, of which each is a copy from memory too."""
        peers = self.links.get(slot.id, {})
        if source == HOST_TIER:
            return max(peers.values(), default=HOST_BYTES_PER_SECOND)
        return peers.get(source)

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
        prefix = self.prefix_plan(slot, record.request.prefix_hashes)
        pending = slot.missing_tokens(record, prefix.num_blocks)
        self.requests.stop_waiting(record)
        self.requests.move(record, RequestState.ASSIGNED, now, worker=slot.id)
        record.isolated = isolated
        record.trial_steps = 0
        record.reports_before = slot.num_loads
        record.pending = pending
        slot.seat(record)
        slot.pending_tokens += pending
        slot.tally.prompts[record.request.id] = record
        slot.given = True
        self.out.append(
            Assign(
                worker=slot.id,
                request=record.request,
                emitted_tokens=record.emitted,
                pull_from=prefix.pull_from,
                pull_blocks=prefix.pull_blocks,
            )
        )

    def settle(self, record: RequestRecord) -> None:
        """Its prefill at its worker is done (or void): it no longer counts as pending."""
        if record.pending and record.worker is not None:
            slot = self.slots[record.worker]
            slot.pending_tokens -= record.pending
            record.pending = 0
            del slot.tally.prompts[record.request.id]
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
        """Ask its worker to forget the request, and the other one if it moves; it ends when all
        have said so."""
        worker = record.worker
        if worker is None:
            raise ValueError(f"nothing to abort; {record.story()}")
        self.settle(record)
        self.slots[worker].tally.end_decode(record)
        record.cancel_kind = kind
        self.moves.drop(record)
        self.requests.move(record, RequestState.CANCELLING, now, worker=worker)
        self.out.append(Abort(worker=worker, request_id=record.request.id))

    def demote(self, record: RequestRecord) -> None:
        """Give up its targets: it is served as best effort from now on."""
        if record.demoted:
            return
        if record.worker is not None:
            self.slots[record.worker].tally.leave(record)
            self.slots[record.worker].touch()
        if record.move is not None and not record.move.stopped:
            self.slots[record.move.target].tally.leave(record)
            self.slots[record.move.target].touch()
        record.demoted = True
        self.totals.demoted += 1

    def finish(
        self, record: RequestRecord, now: float, *, reason: FinishReason, cached_tokens: int
    ) -> None:
        """The answer is complete."""
        self.totals.count_end(record, now)
        self.cost.lengths.observe(record.request.slo.class_name, record.emitted)
        times = times_of(
            record.history, arrived=record.request.arrived, ended=now, demoted=record.demoted
        )
        self._remove(record, now)
        self.out.append(
            Ended(
                request_id=record.request.id,
                reason=reason,
                cached_tokens=cached_tokens,
                times=times,
            )
        )

    def fail(
        self,
        record: RequestRecord,
        now: float,
        *,
        kind: ErrorKind,
        message: str,
        retry_after: float | None = None,
    ) -> None:
        """End with a typed error and words for the client."""
        self._remove(record, now)
        self.out.append(
            Ended(
                request_id=record.request.id, error=kind, message=message, retry_after=retry_after
            )
        )

    def confirm_cancelled(self, record: RequestRecord, now: float) -> None:
        """The worker of a CANCELLING request has forgotten it; it ends unless another one has
        not."""
        if not record.leaving:
            self.end_cancelled(record, now)
            return
        other = self.slots[min(record.leaving)]
        self.left(record, other)
        self._leave(record)
        record.worker = other.id
        other.seat(record)

    def end_cancelled(self, record: RequestRecord, now: float) -> None:
        """End a CANCELLING request."""
        kind = record.cancel_kind or ErrorKind.CANCELLED
        self.fail(record, now, kind=kind, message="the request was cancelled")

    def left(self, record: RequestRecord, slot: WorkerSlot) -> None:
        """A worker that was told to forget a request has done so."""
        record.leaving.discard(slot.id)
        slot.leaving.pop(record.request.id, None)

    def _remove(self, record: RequestRecord, now: float) -> None:
        if record.state is RequestState.WAITING:
            self.requests.stop_waiting(record)
        else:
            self._leave(record)
        self.requests.move(record, RequestState.ENDED, now)
        for worker in record.leaving:
            del self.slots[worker].leaving[record.request.id]
        record.leaving.clear()

    def _leave(self, record: RequestRecord) -> None:
        if record.worker is None:
            return
        self.moves.drop(record)
        self.settle(record)
        slot = self.slots[record.worker]
        slot.unseat(record)
        record.isolated = False
        record.resumed = None
