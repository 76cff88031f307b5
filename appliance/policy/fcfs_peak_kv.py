"""First come, first served, with the KV memory of the longest answer reserved beforehand.

After Yu et al., Orca (OSDI 2022), section 4.2: a request begins only when `prompt + max_tokens`
fits beside the same of all that run, so that nothing is ever preempted, and batches are as small as
clients are careless about `max_tokens` (which it reads, as no other rival does). Each request goes
to the worker with the least predicted work and waits there for its turn."""

from collections.abc import Mapping

import msgspec

from appliance.core.slots import BatchSlots, Policy
from appliance.policy.dispatch_parts import slots
from appliance.policy.parts import fill_reserving, victim_latest
from appliance.policy.settings import read_settings


class FcfsPeakKvSettings(msgspec.Struct, frozen=True, kw_only=True):
    """None."""


def fcfs_peak_kv(settings: Mapping[str, object]) -> Policy:
    """The policy. Raises `PolicySettingsError` for a setting."""
    read_settings(FcfsPeakKvSettings, settings, policy="fcfs-peak-kv")
    batch = BatchSlots(victim=victim_latest, fill=fill_reserving)
    return Policy(name="fcfs-peak-kv", dispatch=slots(), batch=batch)
