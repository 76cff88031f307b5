"""One file per published algorithm; pure. `POLICIES` is the table of their names."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from msgspec.structs import replace

from appliance.core.slots import Policy
from appliance.policy.all_mixed import all_mixed
from appliance.policy.edf import edf
from appliance.policy.fcfs import fcfs
from appliance.policy.fcfs_peak_kv import fcfs_peak_kv
from appliance.policy.hyperflexis import hyperflexis
from appliance.policy.least_loaded import least_loaded
from appliance.policy.llumnix import llumnix
from appliance.policy.role_control import role_controller
from appliance.policy.round_robin import round_robin
from appliance.policy.settings import PolicySettingsError, nearest
from appliance.policy.srf import srf
from appliance.policy.static_priority import static_priority
from appliance.policy.sticky_prefix import sticky_prefix

__all__ = ["POLICIES", "PolicyFactory", "PolicySettingsError", "make_policy"]

PolicyFactory = Callable[[Mapping[str, object]], Policy]

POLICIES: Mapping[str, PolicyFactory] = MappingProxyType(
    {
        "fcfs": fcfs,
        "round-robin": round_robin,
        "least-loaded": least_loaded,
        "static-priority": static_priority,
        "edf": edf,
        "srf": srf,
        "llumnix": llumnix,
        "sticky-prefix": sticky_prefix,
        "all-mixed": all_mixed,
        "fcfs-peak-kv": fcfs_peak_kv,
        "hyperflexis": hyperflexis,
    }
)


def make_policy(
    name: str, settings: Mapping[str, object], *, roles: Mapping[str, object] | None = None
) -> Policy:
    """The policy of that name. With `roles`, the settings of `appliance.policy.role_control`, the
    automatic controller decides about roles. Raises `PolicySettingsError` with the nearest known
    name or setting."""
    factory = POLICIES.get(name)
    if factory is None:
        raise PolicySettingsError(f"no policy {name!r}; {nearest(name, POLICIES)}")
    policy = factory(settings)
    if roles is None:
        return policy
    controller = role_controller(roles, chunk=policy.chunk)
    return replace(policy, dispatch=replace(policy.dispatch, roles=controller))
