"""Who does what at the start: roles of the workers (`--roles`), those that stand by, and those that
the controller may start.

`roles.initial` is one word for all workers, one word per worker, or "auto": all begin mixed and the
controller may change that. A role is a preference, so any combination serves; one that leaves a
phase to workers that prefer the other is said in the plan.
"""

import difflib
from collections.abc import Sequence

import msgspec

from appliance.config import Config, ConfigError
from appliance.config_sections import Setting
from appliance.core.types import Role, WorkerId, WorkerSpec
from appliance.devices import MAX_WORKERS, DevicePlan

AUTO = "auto"


def staffed(devices: DevicePlan, config: Config) -> DevicePlan:
    """The plan with the role of each worker and with the standby workers. Raises `ConfigError`."""
    roles = parse_roles(config.roles.initial, len(devices.workers))
    workers = [
        msgspec.structs.replace(worker, role=role)
        for worker, role in zip(devices.workers, roles, strict=True)
    ]
    _check_bounds(config, len(workers))
    standby, spares = (
        _further(devices, first, number, parked=parked)
        for first, number, parked in (
            (len(workers), config.standby.workers, True),
            (len(workers) + config.standby.workers, config.standby.add, False),
        )
    )
    return msgspec.structs.replace(devices, workers=(*workers, *standby), spares=spares)


def _further(
    devices: DevicePlan, first: int, number: int, *, parked: bool
) -> tuple[WorkerSpec, ...]:
    return tuple(
        WorkerSpec(id=WorkerId(index), devices=(devices.device_of(index),), parked=parked)
        for index in range(first, first + number)
    )


def _check_bounds(config: Config, serving: int) -> None:
    """Raise `ConfigError` if there would be too many workers, or bounds that contradict them."""
    known = serving
    for name, wanted in (("workers", config.standby.workers), ("add", config.standby.add)):
        if known + wanted > MAX_WORKERS:
            raise ConfigError(
                f"standby.{name} = {wanted}: with {known} others that is more than "
                f"{MAX_WORKERS} workers; write at most {MAX_WORKERS - known}"
            )
        known += wanted
    least, most = config.standby.min_workers, config.standby.max_workers
    if least != "auto" and least > known:
        raise ConfigError(
            f"standby.min_workers = {least}: there are {known} workers; write at most {known}"
        )
    if most != "auto" and most < (serving if least == "auto" else least):
        few = f"standby.min_workers = {least}" if least != "auto" else f"the {serving} that begin"
        raise ConfigError(f"standby.max_workers = {most} is less than {few}; write more")


def parse_roles(text: str, num_workers: int) -> tuple[Role, ...]:
    """One role per worker. Raises `ConfigError`."""
    words = [word.strip().lower() for word in text.split(",")]
    if words == [AUTO]:
        words = [Role.MIXED.value]
    roles = [_role(word, text) for word in words]
    if len(roles) == 1:
        roles *= num_workers
    if len(roles) != num_workers:
        example = ",".join(role.value for role in _fitted(roles, num_workers))
        raise ConfigError(
            f"roles.initial = {text!r} (--roles): names {len(roles)} roles for {num_workers} "
            f"workers; write one for each ({example}), one for all, or auto"
        )
    return tuple(roles)


def has_controller(config: Config) -> bool:
    """Whether the node changes roles, or who is in service, by itself."""
    wanted = config.roles.controller
    return wanted == "on" or (wanted == AUTO and (_is_auto(config) or config.roles.scale == "on"))


def controller_settings(config: Config) -> dict[str, Setting]:
    """What the controller is told: [roles] and [standby], and before these `roles.settings`. Where
    only `roles.scale` asks for it, roles stay as they are."""
    found: dict[str, Setting] = {}
    if config.roles.scale != AUTO:
        found["scale"] = config.roles.scale
    if config.roles.controller == AUTO and has_controller(config) and not _is_auto(config):
        found["flips"] = False
    bounds: dict[str, Setting] = {
        "min_workers": config.standby.min_workers,
        "max_workers": config.standby.max_workers,
    }
    found |= {name: wanted for name, wanted in bounds.items() if wanted != AUTO}
    return found | config.roles.settings


def _is_auto(config: Config) -> bool:
    return config.roles.initial.strip().lower() == AUTO


def notes_on_roles(workers: Sequence[WorkerSpec]) -> list[str]:
    """What the operator should know of a combination that is legal and odd."""
    roles = {worker.role for worker in workers if not worker.parked}
    if len(roles) == 1 and Role.MIXED not in roles:
        (role,) = roles
        other = Role.DECODE if role is Role.PREFILL else Role.PREFILL
        return [
            f"roles.initial: every worker prefers {role.value}, so {other.value} is served by them "
            "too, as if mixed"
        ]
    return []


def _role(word: str, text: str) -> Role:
    try:
        return Role(word)
    except ValueError as error:
        known = [role.value for role in Role]
        near = difflib.get_close_matches(word, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"write {', '.join(known)}, or auto alone"
        raise ConfigError(
            f"roles.initial = {text!r} (--roles): {word!r} is not a role; {hint}"
        ) from error


def _fitted(roles: Sequence[Role], num_workers: int) -> list[Role]:
    """These roles, as many as there are workers."""
    if len(roles) > num_workers:
        return list(roles[:num_workers])
    return [roles[index * len(roles) // num_workers] for index in range(num_workers)]
