"""The node as policies see it (`appliance.core.view.NodeView`): read off the books, changes
nothing."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from appliance.core.lifecycle import RequestState
from appliance.core.types import BlockHash, Phase, Request, RequestId, WorkerId
from appliance.core.view import (
    CostView,
    PrefixPlan,
    PromptView,
    QueueChanges,
    RunningView,
    Targets,
    Traffic,
    WorkerView,
)

if TYPE_CHECKING:
    from appliance.core.node_state import NodeState

TYPICAL_PROMPT = 1000
"""Tokens; of such a prompt is what one token takes."""


class DispatcherView:
    """Looks into a `NodeState`."""

    def __init__(self, state: "NodeState") -> None:
        self._state = state
        self._workers: Mapping[WorkerId, WorkerView] = MappingProxyType({})

    @property
    def workers(self) -> Mapping[WorkerId, WorkerView]:
        """Every configured worker, dead ones too; the same mapping until something changes."""
        slots = self._state.slots
        for slot in slots.values():
            if slot.seen is None:
                cost = self._state.cost
                views = {id_: each.seen or each.view(cost) for id_, each in slots.items()}
                self._workers = MappingProxyType(views)
                break
        return self._workers

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

    @property
    def traffic(self) -> Traffic:
        """Sums over the node's life."""
        totals = self._state.totals
        return Traffic(
            arrived=totals.arrived,
            prompt_tokens=totals.prompt_tokens,
            finished=totals.finished,
            emitted_tokens=totals.emitted_tokens,
            met=totals.met,
            missed=totals.missed,
            demoted=totals.demoted,
            refused=totals.refused,
            expected_tokens=totals.expected_tokens,
            prefilled_tokens=totals.prefilled_tokens,
            instance_seconds=totals.instance_seconds,
        )

    @property
    def targets(self) -> Targets:
        """The tightest budgets of the live requests; looks at each of them."""
        slos = [record.request.slo for record in self._state.requests.records()]
        return Targets(
            ttft=min((slo.ttft for slo in slos if slo.ttft is not None), default=None),
            tpot=min((slo.tpot for slo in slos if slo.tpot is not None), default=None),
        )

    @property
    def num_spares(self) -> int:
        """Workers that could still be started."""
        return len(self._state.spares)

    def overdue(self, now: float) -> int:
        """Waiting requests whose prompt cannot be computed in time any more."""
        state, late = self._state, 0
        each = state.cost.prefill_seconds(TYPICAL_PROMPT) / TYPICAL_PROMPT
        for request in state.requests.queue.requests():
            if request.slo.ttft is None:
                continue
            if now + each * request.prompt_tokens > request.arrived + request.slo.ttft:
                record = state.requests.get(request.id)
                late += record is not None and record.first_token_at is None
        return late

    def cached_blocks(self, worker: WorkerId, hashes: Sequence[BlockHash]) -> int:
        """How many leading blocks of `hashes` that worker is believed to hold."""
        slot = self._state.slots.get(worker)
        return 0 if slot is None else slot.cached_blocks(hashes)

    def prefix_plan(self, worker: WorkerId, hashes: Sequence[BlockHash]) -> PrefixPlan:
        """What of a prompt with these blocks that worker has or could copy."""
        slot = self._state.slots.get(worker)
        return PrefixPlan() if slot is None else self._state.prefix_plan(slot, hashes)

    def willing(
        self, request: Request, now: float, phase: Phase = Phase.PREFILL
    ) -> Sequence[WorkerId]:
        """Workers that may get this request now."""
        record = self._state.requests.get(request.id)
        if record is None:
            return ()
        if phase is Phase.DECODE:
            return [slot.id for slot in self._state.moves.targets(record, now)]
        if record.state is not RequestState.WAITING:
            return ()
        offered, slots = self._state.offer
        if offered is not record:
            slots = self._state.willing(record, now)
        return [slot.id for slot in slots]

    def links(self, worker: WorkerId) -> Mapping[WorkerId, float]:
        """Peers that this worker can copy from, with bytes per second."""
        return MappingProxyType(self._state.links.get(worker, {}))

    def prompts(self, worker: WorkerId) -> Sequence[PromptView]:
        """What of prefill is assigned to that worker, oldest first."""
        slot = self._state.slots.get(worker)
        if slot is None or not slot.tally.prompts:
            return ()
        return [
            PromptView(
                request=record.request,
                tokens=record.pending,
                heard=record.reports_before != slot.num_loads,
                demoted=record.demoted,
            )
            for record in slot.tally.prompts.values()
        ]

    def queue_changes(self, since: int) -> QueueChanges:
        """What came into the queue and what left it after the mark `since`."""
        return self._state.requests.queue.changes(since)

    def emitted(self, request: RequestId) -> int:
        """Tokens of this live request that were sent."""
        record = self._state.requests.get(request)
        return 0 if record is None else record.emitted

    def is_demoted(self, request: RequestId) -> bool:
        """Whether the targets of this live request were given up."""
        record = self._state.requests.get(request)
        return record is not None and record.demoted

    def running(self, worker: WorkerId) -> Sequence[RunningView]:
        """What is assigned to that worker, oldest assignment first."""
        slot = self._state.slots.get(worker)
        records = () if slot is None else slot.assigned.values()
        decoding = (RequestState.DECODING, RequestState.MIGRATING)
        return [
            RunningView(
                request=record.request,
                emitted=record.emitted,
                decoding=record.state in decoding,
                moving=record.move is not None,
                demoted=record.demoted,
                first_token_at=record.first_token_at,
            )
            for record in records
        ]
