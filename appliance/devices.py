"""What `--devices` means: which workers there are and what computes in them.

cpu[:N]                N CPU workers (default: min(2, cores))
paced[:N][@PROFILE]    N workers whose steps last as long as a device profile says (default 1)
cuda:I[,J...]          one worker per entry; a card may be named twice
auto                   every CUDA card; without one, as `cpu`
"""

import re
from collections.abc import Callable
from typing import Literal

from appliance.config import ConfigError
from appliance.core.profiles import DEFAULT_PROFILE, device_profile
from appliance.core.types import Record, WorkerId, WorkerSpec

MAX_WORKERS = 64
_COUNTED = re.compile(r"(cpu|paced)(?::(\d+))?(?:@([\w.-]+))?")
_LISTED = re.compile(r"cuda:\d+(?:,\d+)*")


class DevicePlan(Record, frozen=True, kw_only=True):
    """Workers as asked for, and the engine they run."""

    kind: Literal["cpu", "paced"]
    workers: tuple[WorkerSpec, ...]
    spares: tuple[WorkerSpec, ...] = ()
    """Workers that may be started later."""
    profile: str = ""
    why: str = ""
    """How "auto" was decided; empty if the operator decided."""

    @property
    def most(self) -> int:
        """Workers that there may be, the spare ones too."""
        return len(self.workers) + len(self.spares)

    @property
    def engine(self) -> str:
        """The engine's name in a `WorkerStart`."""
        return "paced" if self.kind == "paced" else "torch"

    def device_of(self, index: int) -> str:
        """The device of a further worker of this kind."""
        return f"paced:{index}" if self.kind == "paced" else "cpu"


def plan_devices(spec: str, *, cores: int, count_gpus: Callable[[], int]) -> DevicePlan:
    """The workers that `spec` asks for. `count_gpus` is called only if the answer depends on it.

    Raises `ConfigError`, naming the fix."""
    if spec == "auto":
        return _auto(cores, count_gpus())
    if (match := _COUNTED.fullmatch(spec)) is not None:
        return _counted(spec, match, cores)
    if _LISTED.fullmatch(spec):
        raise _no_cuda(spec, count_gpus())
    raise ConfigError(
        f"devices.spec = {spec!r} (--devices): write auto, cpu:2, paced:4 "
        f"or paced:4@{DEFAULT_PROFILE}"
    )


def count_gpus() -> int:
    """CUDA cards that the driver shows; 0 without a driver. Loads no CUDA library but the driver's
    management interface, so nothing is initialised that a fork could break."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0
    try:
        return int(pynvml.nvmlDeviceGetCount())
    finally:
        pynvml.nvmlShutdown()


def _auto(cores: int, num_gpus: int) -> DevicePlan:
    number = min(2, cores)
    cards = f"{num_gpus} CUDA cards stay idle (not built yet)" if num_gpus else "no CUDA card"
    why = f"auto: {cards}, min(2, {cores} cores) CPU workers"
    return DevicePlan(kind="cpu", workers=_specs(["cpu"] * number), why=why)


def _counted(spec: str, match: re.Match[str], cores: int) -> DevicePlan:
    kind, digits, profile = match.groups()
    number = int(digits) if digits else (min(2, cores) if kind == "cpu" else 1)
    if not 1 <= number <= MAX_WORKERS:
        raise ConfigError(
            f"devices.spec = {spec!r} (--devices): the number of workers must be 1 to {MAX_WORKERS}"
        )
    if kind == "cpu":
        if profile:
            raise ConfigError(f"devices.spec = {spec!r} (--devices): only paced takes a @PROFILE")
        return DevicePlan(kind="cpu", workers=_specs(["cpu"] * number))
    workers = _specs([f"paced:{index}" for index in range(number)])
    profile = profile or DEFAULT_PROFILE
    try:
        device_profile(profile)
    except ValueError as error:
        raise ConfigError(f"devices.spec = {spec!r} (--devices): {error}") from error
    return DevicePlan(kind="paced", workers=workers, profile=profile)


def _no_cuda(spec: str, num_gpus: int) -> ConfigError:
    seen = f"{num_gpus} are visible" if num_gpus else "none is visible on this machine"
    return ConfigError(
        f"devices.spec = {spec!r} (--devices): this version does not compute on CUDA devices "
        f"({seen}); use --devices cpu:2"
    )


def _specs(devices: list[str]) -> tuple[WorkerSpec, ...]:
    return tuple(
        WorkerSpec(id=WorkerId(index), devices=(device,)) for index, device in enumerate(devices)
    )
