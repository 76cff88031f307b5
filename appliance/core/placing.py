"""Offering the waiting requests to the policy, while some worker may take one."""

from appliance.core.audit import Audit
from appliance.core.node_state import NodeState
from appliance.core.slots import DispatchSlots, PolicyMistake
from appliance.core.types import Phase, Role


class Placer:
    """Places what waits."""

    def __init__(self, state: NodeState, *, policy: DispatchSlots, audit: Audit) -> None:
        self._state = state
        self._policy = policy
        self._audit = audit

    def step(self, now: float) -> None:
        """Offer the waiting requests to the policy in its order while some worker is open. Raises
        `PolicyMistake` for an impossible answer."""
        state = self._state
        if not len(state.requests.queue) or not state.any_open():
            return
        view, place = state.view, self._policy.place
        for request in self._policy.order(state.requests.queue.requests(), view, now):
            record = state.requests.get(request.id)
            if record is None or not state.requests.is_queued(record):
                raise PolicyMistake(f"order: request {request.id} is not in the queue")
            willing = state.willing(record, now)
            if not willing:
                continue
            state.offer = record, willing
            try:
                chosen = place(view, request, Phase.PREFILL, now)
            finally:
                state.offer = None, []
            if chosen is None:
                continue
            slot = state.slots.get(chosen)
            if slot not in willing:
                raise PolicyMistake(
                    f"place: worker {chosen} may not get request {request.id}; willing: "
                    f"{[each.id for each in willing]}"
                )
            state.assign(record, slot, now)
            if slot.role is Role.DECODE:
                words = "no ready worker for prompts"
                self._audit.fallback("prefill", now, workers=(slot.id,), trigger=words)
            else:
                self._audit.over("prefill")
            if not state.any_open():
                return
