"""A request that was present at several worker deaths is put on trial (R27).

Suspects wait outside the queue and are tried one after the other on a reserved worker, to which
nothing else is given. A trial begins on a worker that is empty, or that holds only requests
acquitted before: an innocent suspect is *acquitted* once `trial_steps` steps have computed tokens
of it there, goes on where it is as any other request, and the next suspect may join it. So many
bystanders of a few deaths cost some steps each, not an answer each. The last suspect's acquittal
lifts the reservation.

A death during a trial convicts if it is *conclusive*: the suspect was alone, and on a worker that
had not died with it before (a broken device must not convict), or the trial was a strict one.
After an inconclusive death the suspect is tried strictly: alone, and if possible on a worker that
did not die with it. Who was acquitted and is present at one more death is a suspect again; each
further trial lasts `TRIAL_GROWTH` times as many steps, and the last of `max_trials` is strict and
goes on to the end of the answer. Hence a request is present at no more than `poison_deaths +
max_trials` counted deaths, and at `spared_deaths` of those that do not count
(`appliance.core.life_keeping`).

At most one worker is reserved, whatever the number of suspects; on a node with a single worker the
others wait meanwhile.
"""

from appliance.core.lifecycle import WorkerState
from appliance.core.messages import StepReported
from appliance.core.node_state import NodeState
from appliance.core.request_table import RequestRecord
from appliance.core.worker_table import WorkerSlot

TRIAL_GROWTH = 8
"""Each further trial of the same request takes so many times the steps of the one before."""


class Isolation:
    """Holds the reserved worker, brings suspects to it and acquits them."""

    def __init__(self, state: NodeState) -> None:
        self._state = state
        self._slot: WorkerSlot | None = None
        self._tried: RequestRecord | None = None
        """The suspect brought to the reserved worker last."""

    def step(self, now: float) -> None:
        """Reserve, release, or place the next suspect, whatever is due."""
        slot = self._slot
        if slot is None and not self._state.requests.suspects:
            return
        if slot is not None and slot.state is not WorkerState.READY:
            self._release()
            slot = None
        if self._tried is not None and self._tried.isolated:
            return  # the trial goes on
        self._tried = None
        chosen = self._choose(now)
        if chosen is None:
            self._release()
            return
        suspect, best = chosen
        if best is not slot:
            self._release()
            self._slot = best
            best.reserved = True
            best.touch()
            self._state.moves.call_off_incoming(best, now)
        if self._may_begin(suspect, best):
            self._state.assign(suspect, best, now, isolated=True)
            self._tried = suspect
            self._state.num_trials += 1

    def stepped(self, report: StepReported) -> None:
        """The reserved worker finished a step; acquit the suspect that was computed often
        enough."""
        record = self._tried
        if record is None or not record.isolated or record.request.id not in report.ids:
            return
        record.trial_steps += 1
        config = self._state.config
        lasts = config.trial_steps * TRIAL_GROWTH**record.trials
        if record.trials + 1 < config.max_trials and record.trial_steps >= lasts:
            record.trials += 1
            record.isolated = record.strict = record.suspected = False
            record.acquitted = True
            self._state.num_acquitted += 1

    def _choose(self, now: float) -> tuple[RequestRecord, WorkerSlot] | None:
        """The first suspect that can begin at once and the best worker for it; if there is none,
        the first that some ready worker can take, and the worker to keep free for it. Those to be
        tried strictly come first: they need an empty worker, which others would fill."""
        later: tuple[RequestRecord, WorkerSlot] | None = None
        waiting = self._state.requests.suspects.values()
        for suspect in sorted(waiting, key=self._is_strict, reverse=True):
            fit = self._state.able(suspect, now)
            if not fit:
                continue
            best = self._best(suspect, fit)
            if self._may_begin(suspect, best):
                return suspect, best
            later = later or (suspect, best)
        return later

    def _best(self, suspect: RequestRecord, fit: list[WorkerSlot]) -> WorkerSlot:
        """A worker that did not die with the suspect, one where it can begin at once, an empty
        one, the reserved one; in a strict trial in this order, otherwise beginning comes first."""
        witnesses = {worker for worker, _ in suspect.deaths}

        def key(slot: WorkerSlot) -> tuple[bool, bool, int, bool, int]:
            saw, waits = slot.id in witnesses, not self._may_begin(suspect, slot)
            first, second = (saw, waits) if self._is_strict(suspect) else (waits, saw)
            return (first, second, len(slot.assigned), slot is not self._slot, slot.id)

        return min(fit, key=key)

    def _is_strict(self, suspect: RequestRecord) -> bool:
        return suspect.strict or suspect.trials + 1 >= self._state.config.max_trials

    def _may_begin(self, suspect: RequestRecord, slot: WorkerSlot) -> bool:
        """Whether a trial can begin there now: nobody is there, or only the acquitted and a place
        in their batch, which a strict trial does not share."""
        here = slot.assigned
        if not here:
            return True
        if self._is_strict(suspect) or len(here) >= slot.max_num_seqs:
            return False
        return all(record.acquitted for record in here.values())

    def _release(self) -> None:
        if self._slot is not None:
            self._slot.reserved = False
            self._slot.touch()
            self._slot = None
