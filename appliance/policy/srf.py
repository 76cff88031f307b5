"""Shortest remaining first: what would be done soonest goes first.

After Schrage and Miller (Oper. Res. 14(4), 1966): it makes the mean latency the least and lets the
long ones wait. A request's time is that of its prompt and one decode step for each token of its
answer, whose length is the median of its class as learnt (`lengths = "predicted"`), or what the
client allows (`"max_tokens"`, the only reading of that field as a length). In a step the prompts
are ordered by the tokens they lack (with `"max_tokens"` those of the answer too), and it is the
longest that is preempted. Deadlines play no part."""

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from appliance.core.slots import OrderSlot, Policy
from appliance.core.types import Request
from appliance.core.view import NodeView, SeqView
from appliance.policy.dispatch_parts import slots
from appliance.policy.parts import urgent_batch
from appliance.policy.settings import read_settings

PROMPT = 1024
"""Tokens of the prompt that stands for all: its time is taken as so many times that of one."""


class SrfSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Where the length of an answer comes from."""

    lengths: Literal["predicted", "max_tokens"] = "predicted"


def order_predicted(queue: Sequence[Request], view: NodeView, now: float) -> Sequence[Request]:
    """The shortest first, by the lengths that its class has had."""
    del now
    if len(queue) < 2:
        return queue
    cost = view.cost
    per_token, step = cost.prefill_seconds(PROMPT) / PROMPT, cost.decode_step_seconds
    names = {request.slo.class_name for request in queue}
    answer = {name: step * cost.lengths.at(name, 0.5) for name in names}
    return sorted(
        queue, key=lambda each: each.prompt_tokens * per_token + answer[each.slo.class_name]
    )


def order_allowed(queue: Sequence[Request], view: NodeView, now: float) -> Sequence[Request]:
    """The shortest first, if every answer were as long as it may be."""
    del now
    if len(queue) < 2:
        return queue
    cost = view.cost
    per_token, step = cost.prefill_seconds(PROMPT) / PROMPT, cost.decode_step_seconds
    return sorted(queue, key=lambda each: each.prompt_tokens * per_token + each.max_tokens * step)


def _prompt_left(seq: SeqView) -> tuple[int, float]:
    return (seq.num_known - seq.num_computed, seq.request.arrived)


def _all_left(seq: SeqView) -> tuple[int, float]:
    left = seq.num_known - seq.num_computed + seq.request.max_tokens - seq.num_emitted
    return (left, seq.request.arrived)


def srf(settings: Mapping[str, object]) -> Policy:
    """The policy. Raises `PolicySettingsError` for a setting it does not have."""
    known = read_settings(SrfSettings, settings, policy="srf")
    predicted = known.lengths == "predicted"
    order: OrderSlot = order_predicted if predicted else order_allowed
    batch = urgent_batch(_prompt_left if predicted else _all_left)
    return Policy(name="srf", dispatch=slots(order=order), batch=batch)
