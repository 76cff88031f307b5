"""All mixed: every worker does both phases, and prompts come in chunks small enough not to hold up
the decodes.

After Agrawal et al., Sarathi-Serve (OSDI 2024): stall-free batching with a fixed number of prompt
tokens in a step, the same whatever the budgets of those who decode. First come, first served, each
request at the worker with the least predicted work."""

from collections.abc import Mapping
from typing import Annotated

import msgspec

from appliance.core.slots import BatchSlots, Policy
from appliance.policy.dispatch_parts import slots
from appliance.policy.parts import fill_chunked, victim_latest
from appliance.policy.settings import read_settings


class AllMixedSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The size of a chunk."""

    chunk: Annotated[int, msgspec.Meta(ge=1)] = 512
    """Tokens of prompts in a step, at most."""


def all_mixed(settings: Mapping[str, object]) -> Policy:
    """The policy. Raises `PolicySettingsError` for a setting it does not have."""
    known = read_settings(AllMixedSettings, settings, policy="all-mixed")
    batch = BatchSlots(victim=victim_latest, fill=fill_chunked(chunk=known.chunk))
    return Policy(name="all-mixed", dispatch=slots(), batch=batch, chunk=known.chunk)
