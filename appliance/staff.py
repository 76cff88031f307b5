"""Who does what at the start: roles of the workers (`--roles`), and those that stand by.

`roles.initial` is one word for all workers, one word per worker, or "auto": all begin mixed and the
controller may change that. A role is a preference, so any combination serves; one that leaves a
phase to workers that prefer the other is said in the plan.
"""

import difflib
from collections.abc import Sequence

import msgspec

from appliance.config import Config, ConfigError
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
    wanted = config.standby.workers
    if len(workers) + wanted > MAX_WORKERS:
        raise ConfigError(
            f"standby.workers = {wanted}: with {len(workers)} on devices.spec that is more than "
            f"{MAX_WORKERS} workers; write at most {MAX_WORKERS - len(workers)}"
        )
    for index in range(len(workers), len(workers) + wanted):
        device = devices.device_of(index)
        workers.append(WorkerSpec(id=WorkerId(index), devices=(device,), parked=True))
    return msgspec.structs.replace(devices, workers=tuple(workers))


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
    """Whether the node changes roles by itself."""
    wanted = config.roles.controller
    return config.roles.initial.strip().lower() == AUTO if wanted == AUTO else wanted == "on"


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
