"""Round robin: each request goes to the next worker in turn, whatever is there already.

The baseline of a plain router before several engines. The queue is first come, first served. A
worker that is full is passed over, since the node binds late; a real router would let the request
wait there, so this is the better half of the idea. Hand-offs to decode workers take turns too.
Reads nothing of a request."""

from collections.abc import Mapping

import msgspec

from appliance.core.slots import Policy
from appliance.core.types import Phase, Request, Role, WorkerId
from appliance.core.view import NodeView
from appliance.policy.dispatch_parts import slots
from appliance.policy.parts import fcfs_batch
from appliance.policy.settings import read_settings


class RoundRobinSettings(msgspec.Struct, frozen=True, kw_only=True):
    """None."""


class Turns:
    """The slot `place`. What it remembers: whose turn it was last, per phase."""

    def __init__(self) -> None:
        self._last: dict[Phase, WorkerId] = {}

    def __call__(
        self, view: NodeView, request: Request, phase: Phase, now: float
    ) -> WorkerId | None:
        """The next willing worker after the last one; of those meant for decoding, if any is."""
        willing = view.willing(request, now, phase)
        if phase is Phase.DECODE and len(willing) > 1:
            workers = view.workers
            willing = [each for each in willing if workers[each].role is Role.DECODE] or willing
        if not willing:
            return None
        last = self._last.get(phase, -1)
        chosen = min(willing, key=lambda each: (each <= last, each))
        self._last[phase] = chosen
        return chosen


def round_robin(settings: Mapping[str, object]) -> Policy:
    """The policy. Raises `PolicySettingsError` for a setting."""
    read_settings(RoundRobinSettings, settings, policy="round-robin")
    return Policy(name="round-robin", dispatch=slots(place=Turns()), batch=fcfs_batch())
