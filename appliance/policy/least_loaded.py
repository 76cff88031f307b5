"""Least loaded: each request goes to the worker with the fewest requests (or tokens) at the moment.

The baseline of a load-balancing router (least outstanding requests). The queue is first come, first
served; what a request will cost, and what of its prompt is cached where, plays no part."""

from collections.abc import Mapping
from typing import Literal

import msgspec

from appliance.core.slots import Policy
from appliance.core.view import WorkerView
from appliance.policy.dispatch_parts import place_least, slots
from appliance.policy.parts import fcfs_batch
from appliance.policy.settings import read_settings


class LeastLoadedSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What counts as load."""

    measure: Literal["requests", "tokens"] = "requests"
    """Requests that are there or on the way; or tokens: KV held, and prompts to be computed."""


def num_requests(worker: WorkerView) -> float:
    """Requests that are there or on the way."""
    return worker.assigned + worker.incoming


def num_tokens(worker: WorkerView) -> float:
    """Tokens of KV that live sequences hold, and of prompts to be computed."""
    return worker.load.blocks_held * worker.block_tokens + worker.pending_tokens


def least_loaded(settings: Mapping[str, object]) -> Policy:
    """The policy. Raises `PolicySettingsError` for a setting it does not have."""
    known = read_settings(LeastLoadedSettings, settings, policy="least-loaded")
    load = num_requests if known.measure == "requests" else num_tokens
    return Policy(name="least-loaded", dispatch=slots(place=place_least(load)), batch=fcfs_batch())
