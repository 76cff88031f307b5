"""Static priority: classes of requests in a fixed order, first come, first served within each.

What inference servers offer as priority scheduling. The request's own `priority` decides (the
smaller number first, 0 where none was sent), then the weight of its class (the larger first). At
the node it orders the queue, in a step the prompts, and it is the last in this order that is
preempted. Deadlines play no part, and under a long overload of the first classes the last ones
starve."""

from collections.abc import Mapping

import msgspec

from appliance.core.slots import Policy
from appliance.core.types import Request
from appliance.core.view import SeqView
from appliance.policy.dispatch_parts import order_by, slots
from appliance.policy.parts import urgent_batch
from appliance.policy.settings import read_settings


class StaticPrioritySettings(msgspec.Struct, frozen=True, kw_only=True):
    """None."""


def rank(request: Request) -> tuple[int, float]:
    """The least goes first."""
    return (request.priority, -request.slo.weight)


def _urgency(seq: SeqView) -> tuple[int, float, float]:
    request = seq.request
    return (*rank(request), request.arrived)


def static_priority(settings: Mapping[str, object]) -> Policy:
    """The policy. Raises `PolicySettingsError` for a setting."""
    read_settings(StaticPrioritySettings, settings, policy="static-priority")
    return Policy(
        name="static-priority",
        dispatch=slots(order=order_by(rank)),
        batch=urgent_batch(_urgency),
        uses_priority=True,
    )
