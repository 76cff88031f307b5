"""One file per published algorithm; pure. `POLICIES` is the table of their names."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from appliance.core.slots import Policy
from appliance.policy.fcfs import fcfs
from appliance.policy.settings import PolicySettingsError, nearest

__all__ = ["POLICIES", "PolicyFactory", "PolicySettingsError", "make_policy"]

PolicyFactory = Callable[[Mapping[str, object]], Policy]

POLICIES: Mapping[str, PolicyFactory] = MappingProxyType({"fcfs": fcfs})


def make_policy(name: str, settings: Mapping[str, object]) -> Policy:
    """The policy of that name. Raises `PolicySettingsError` with the nearest known name or
    setting."""
    factory = POLICIES.get(name)
    if factory is None:
        raise PolicySettingsError(f"no policy {name!r}; {nearest(name, POLICIES)}")
    return factory(settings)
