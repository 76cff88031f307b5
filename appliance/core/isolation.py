"""A request that was present at several worker deaths runs alone once (R27).

Suspects wait outside the queue and are tried one after the other. A worker is reserved: nothing
new is placed there, what it has is finished, then the suspect runs there alone. The other workers
serve on. If the reserved worker dies under the suspect, the suspect is guilty and ends with a
typed error (`appliance.core.life_keeping`); if it ends in any other way it was innocent. The
reserved worker is, if possible, one that did not die with this suspect, so that a broken worker
cannot convict it; among those the least busy one.

At most one worker is reserved, whatever the number of suspects; on a node with a single worker the
others wait meanwhile.
"""

from appliance.core.lifecycle import WorkerState
from appliance.core.node_state import NodeState
from appliance.core.request_table import RequestRecord
from appliance.core.worker_table import WorkerSlot


class Isolation:
    """Holds the reserved worker and brings suspects to it."""

    def __init__(self, state: NodeState) -> None:
        self._state = state
        self._slot: WorkerSlot | None = None

    def step(self, now: float) -> None:
        """Reserve, release, or place the next suspect, whatever is due."""
        if self._slot is None and not self._state.requests.suspects:
            return
        slot = self._slot
        if slot is not None and slot.state is not WorkerState.READY:
            self._release()
            slot = None
        if slot is not None and slot.assigned:
            return  # still emptying, or the suspect runs there
        chosen = self._choose(slot, now)
        if chosen is None:
            self._release()
            return
        suspect, best = chosen
        if best is not slot:
            self._release()
            self._slot = best
            best.reserved = True
            best.touch()
        if not best.assigned:
            self._state.assign(suspect, best, now, isolated=True)

    def _choose(
        self, held: WorkerSlot | None, now: float
    ) -> tuple[RequestRecord, WorkerSlot] | None:
        """The first suspect that some ready worker can take, and the best worker for it; `held`,
        empty by now, is as good as any that did not see this suspect's deaths."""
        for suspect in self._state.requests.suspects.values():
            witnesses = {worker for worker, _ in suspect.deaths}
            fit = self._state.able(suspect, now)
            if fit:
                best = min(
                    fit,
                    key=lambda slot: (
                        slot.id in witnesses,
                        len(slot.assigned),
                        slot is not held,
                        slot.id,
                    ),
                )
                return suspect, best
        return None

    def _release(self) -> None:
        if self._slot is not None:
            self._slot.reserved = False
            self._slot.touch()
            self._slot = None
