"""Free blocks per request: dispatch to the worker with the most, and move answers off the worker
with the least.

After Sun et al., Llumnix (OSDI 2024), sections 4.4 and 4.5. The *freeness* of a worker is the KV
memory that nobody uses or waits for, over the number of its requests: how many tokens each of them
could still get. Prompts that are not computed yet count as use already (virtual usage), so a worker
with a queue looks as full as it will be. A new request goes to the freest worker; every `interval`
the least free one, if its answers have less than `out_below` tokens of room, gives one to the
freest, if that has `gap` tokens more: the answer of the least class weight, of equal ones the
shortest. What leaves a worker that is to be parked or changes its role moves by the mechanism.
Deadlines play no part."""

from collections.abc import Mapping, Sequence
from typing import Annotated

import msgspec

from appliance.core.lifecycle import WorkerState
from appliance.core.slots import Migration, Policy
from appliance.core.types import Phase, Role
from appliance.core.view import NodeView, RunningView, WorkerView
from appliance.policy.dispatch_parts import place_least, slots
from appliance.policy.parts import fcfs_batch
from appliance.policy.settings import read_settings

Tokens = Annotated[float, msgspec.Meta(ge=0)]


class LlumnixSettings(msgspec.Struct, frozen=True, kw_only=True):
    """When an answer moves; tokens of room for each answer, seconds."""

    migrate: bool = True
    out_below: Tokens = 512.0
    gap: Tokens = 256.0
    interval: Annotated[float, msgspec.Meta(ge=0)] = 0.05


def freeness(worker: WorkerView) -> float:
    """Tokens that each request there could still get; negative with more waiting than fits."""
    free = worker.load.blocks_free * worker.block_tokens - worker.pending_tokens
    return free / max(1, worker.assigned + worker.incoming)


class Rebalancer:
    """The slot `migrate`. What it remembers: when it looked last."""

    def __init__(self, settings: LlumnixSettings) -> None:
        self._settings = settings
        self._again = float("-inf")

    def __call__(self, view: NodeView, now: float) -> Sequence[Migration]:
        """One answer from the least free worker to the freest, or none."""
        if now < self._again:
            return ()
        self._again = now + self._settings.interval
        ready = [
            each
            for each in view.workers.values()
            if each.state is WorkerState.READY and each.role is not Role.PREFILL
        ]
        if len(ready) < 2 or any(each.incoming for each in ready):
            return ()
        free = {each.id: freeness(each) for each in ready}
        source = min(ready, key=lambda each: (free[each.id], each.id))
        target = max(ready, key=lambda each: (free[each.id], -each.id))
        room = free[source.id]
        if room >= self._settings.out_below or free[target.id] - room < self._settings.gap:
            return ()
        movable = (each for each in view.running(source.id) if each.decoding and not each.moving)
        for each in sorted(movable, key=_loss):
            if target.id in view.willing(each.request, now, Phase.DECODE):
                return (Migration(id=each.request.id, target=target.id),)
        return ()


def _loss(running: RunningView) -> tuple[float, int]:
    """What moving it costs; the least first."""
    request = running.request
    return (request.slo.weight, request.prompt_tokens + running.emitted)


def _used(worker: WorkerView) -> float:
    return -freeness(worker)


def llumnix(settings: Mapping[str, object]) -> Policy:
    """The policy. Raises `PolicySettingsError` for a setting it does not have."""
    known = read_settings(LlumnixSettings, settings, policy="llumnix")
    migrate = Rebalancer(known) if known.migrate else None
    dispatch = slots(place=place_least(_used), migrate=migrate)
    return Policy(name="llumnix", dispatch=dispatch, batch=fcfs_batch())
