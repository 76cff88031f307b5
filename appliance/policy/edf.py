"""Earliest deadline first: by when the first token is due, at the node and in a step.

After Liu and Layland (J. ACM 20(1), 1973), plain: optimal while everything can be in time, and it
collapses when not, since what is late already stays the most urgent of all. A request without a
target for its first token counts by its end-to-end target, and one without either comes last. It
is the one with the latest deadline that is preempted. Weights, costs and lengths play no part."""

import math
from collections.abc import Mapping
from typing import Annotated

import msgspec

from appliance.core.slo import first_token_deadline
from appliance.core.slots import Policy
from appliance.core.types import Request
from appliance.core.view import SeqView
from appliance.policy.dispatch_parts import order_by, slots
from appliance.policy.parts import urgent_batch
from appliance.policy.settings import read_settings


class EdfSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The size of a chunk."""

    chunk: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Tokens of prompts in a step, at most; 0: what the step has room for."""


def deadline(request: Request) -> float:
    """When it is due, on the node's clock; infinite without a target."""
    first, e2e = first_token_deadline(request), request.slo.e2e
    if first is None:
        return math.inf if e2e is None else request.arrived + e2e
    return first


def _urgency(seq: SeqView) -> tuple[float, float]:
    request = seq.request
    return (deadline(request), request.arrived)


def edf(settings: Mapping[str, object]) -> Policy:
    """The policy. Raises `PolicySettingsError` for a setting it does not have."""
    known = read_settings(EdfSettings, settings, policy="edf")
    batch = urgent_batch(_urgency, chunk=known.chunk)
    return Policy(name="edf", dispatch=slots(order=order_by(deadline)), batch=batch)
