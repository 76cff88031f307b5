"""One file per published algorithm; pure. `POLICIES` is the table of their names."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from msgspec.structs import replace

from appliance.core.slots import Policy
from appliance.policy.fcfs import fcfs
from appliance.policy.role_control import role_controller
from appliance.policy.settings import PolicySettingsError, nearest

__all__ = ["POLICIES", "PolicyFactory", "PolicySettingsError", "make_policy"]

PolicyFactory = Callable[[Mapping[str, object]], Policy]

POLICIES: Mapping[str, PolicyFactory] = MappingProxyType({"fcfs": fcfs})


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
    return replace(policy, dispatch=replace(policy.dispatch, roles=role_controller(roles)))
