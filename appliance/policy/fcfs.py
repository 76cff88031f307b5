"""First come, first served: the plain baseline.

Node: requests are placed in the order of arrival, each at the worker with the least predicted
work. Worker: sequences in decode get their token, what is left of the step's budget goes to
prompts in the order of arrival; the latest arrival is preempted when memory is short. Deadlines
play no part."""

from collections.abc import Mapping
from typing import Annotated

import msgspec

from appliance.core.slots import BatchSlots, DispatchSlots, Policy
from appliance.policy.dispatch_parts import (
    admit_bounded,
    migrate_evenly,
    never_wake,
    order_fcfs,
    place_least_work,
)
from appliance.policy.parts import fill_fcfs, victim_latest
from appliance.policy.settings import read_settings

Bound = Annotated[int, msgspec.Meta(ge=0)]


class FcfsSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds on what waits at the node, beside the node's own; 0: no further bound."""

    max_waiting: Bound = 0
    max_waiting_tokens: Bound = 0
    rebalance_gap: Bound = 0
    """Answers that a worker must have more than another of its role before one is moved; 0:
    never."""


def fcfs(settings: Mapping[str, object]) -> Policy:
    """The policy. Raises `PolicySettingsError` for a setting it does not have."""
    known = read_settings(FcfsSettings, settings, policy="fcfs")
    admit = admit_bounded(max_requests=known.max_waiting, max_tokens=known.max_waiting_tokens)
    return Policy(
        name="fcfs",
        dispatch=DispatchSlots(
            admit=admit,
            order=order_fcfs,
            place=place_least_work,
            wakeup=never_wake,
            migrate=migrate_evenly(gap=known.rebalance_gap) if known.rebalance_gap else None,
        ),
        batch=BatchSlots(victim=victim_latest, fill=fill_fcfs),
    )
