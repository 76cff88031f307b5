"""The hardware that is simulated, in numbers: devices, links, where weights come from.

h200:N              N cards of the profile `h200-8b`: KV of its real size over NVLink (an estimate,
                    400 GB/s per direction), 15 GB of weights
h100:N              the same of the profile `h100-8b`
paced:N[@PROFILE]   N paced workers of this product: steps of the profile, KV of 8 bytes per token
                    through shared memory
cpu:N               N CPU workers with the bundled model, one core each

Steps last as long as the profile says, times a log-normal factor of mean 1 (`noise`), plus
`host_seconds`.
"""

import re
from collections.abc import Mapping
from typing import Literal

import msgspec

from appliance.core.profiles import (
    DEFAULT_PROFILE,
    KV_SLOT_BYTES,
    Profile,
    Roofline,
    device_profile,
)
from appliance.core.types import Record

WeightSource = Literal["peer", "host", "disk"]
WEIGHT_SOURCES: tuple[WeightSource, ...] = ("peer", "host", "disk")
_SPEC = re.compile(r"(cpu|paced|h200|h100)(?::(\d+))?(?:@([\w.-]+))?")
_LARGEST = 256


class UnknownMachine(ValueError):
    """What `--devices` says is not understood; says what is."""


class Machine(Record, frozen=True, kw_only=True):
    """One node. Seconds, bytes, tokens."""

    name: str
    profile: Profile
    num_workers: int
    num_standby: int = 0
    """Further workers that begin parked."""
    num_spares: int = 0
    """Workers that can be started beside those."""
    max_model_len: int = 16384
    max_num_seqs: int = 256
    max_batch_tokens: int = 2048
    depth: int = 0
    block_tokens: int = 16
    num_blocks: int
    host_blocks: int = 0
    """Blocks of each worker's host tier; 0: there is none."""
    block_bytes: int
    """Of one KV block."""
    noise: float
    """Sigma of the log-normal factor of a step."""
    host_seconds: float
    """Between two steps."""
    listens: bool
    """Commands are obeyed while a step is under way, not after it."""
    pipe_seconds: float
    """A frame from a worker to the node, or back."""
    peer_seconds: float
    """A message from a worker to another."""
    front_seconds: float
    """From the client to the node; and of a token from the node to the client."""
    copy_path: str
    copy_bytes_per_second: float
    copy_seconds: float
    """Of a copy, beside its bytes."""
    host_bytes_per_second: float
    """From the host tier to a device."""
    start_seconds: float
    """A worker's start, without its weights."""
    wake_seconds: float
    """Of a parked worker, without its weights."""
    weight_bytes: int
    """To be brought to a worker that starts, and to one that wakes unless `parked_weights`."""
    weight_rates: Mapping[WeightSource, float]
    """Bytes per second."""
    weights_from: WeightSource = "peer"
    parked_weights: bool
    """A parked worker keeps its weights."""

    @property
    def kv_tokens(self) -> int:
        """Of one worker."""
        return self.num_blocks * self.block_tokens

    @property
    def weights_seconds(self) -> float:
        """Until a worker has its weights."""
        return self.weight_bytes / self.weight_rates[self.weights_from]


def parse_machine(spec: str, **changes: object) -> Machine:
    """The machine that `spec` names (see the module's text), with other fields changed. Raises
    `UnknownMachine`."""
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise UnknownMachine(f"devices {spec!r}: write cpu:2, h200:8, h100:8 or paced:8@h200-8b")
    kind, digits, profile_name = match.groups()
    number = int(digits) if digits else 1
    if not 1 <= number <= _LARGEST:
        raise UnknownMachine(f"devices {spec!r}: the number must be 1 to {_LARGEST}")
    if profile_name and kind != "paced":
        raise UnknownMachine(f"devices {spec!r}: only paced takes a @PROFILE")
    known = {"cpu": "cpu", "h100": "h100-8b"}
    try:
        profile = device_profile(profile_name or known.get(kind, DEFAULT_PROFILE))
    except ValueError as error:
        raise UnknownMachine(f"devices {spec!r}: {error}") from error
    made = {"cpu": _cpu, "paced": _paced}.get(kind, _card)(spec, profile, number)
    return msgspec.structs.replace(made, **changes) if changes else made


def _card(name: str, profile: Profile, number: int) -> Machine:
    kv_bytes = profile.kv_bytes if isinstance(profile, Roofline) else KV_SLOT_BYTES
    weights = profile.weight_bytes if isinstance(profile, Roofline) else 0.0
    return Machine(
        name=name,
        profile=profile,
        num_workers=number,
        num_blocks=profile.kv_tokens // 16,
        block_bytes=int(kv_bytes * 16),
        noise=0.03,
        host_seconds=0.0,
        listens=True,
        pipe_seconds=0.0002,
        peer_seconds=0.0001,
        front_seconds=0.001,
        copy_path="peer copy",
        copy_bytes_per_second=400e9,
        copy_seconds=50e-6,
        host_bytes_per_second=50e9,
        start_seconds=10.0,
        wake_seconds=0.002,
        weight_bytes=int(weights),
        weight_rates={"peer": 400e9, "host": 50e9, "disk": 5e9},
        parked_weights=False,
    )


def _paced(name: str, profile: Profile, number: int) -> Machine:
    return Machine(
        name=name,
        profile=profile,
        num_workers=number,
        num_blocks=profile.kv_tokens // 16,
        block_bytes=KV_SLOT_BYTES * 16,
        noise=0.0,
        host_seconds=0.0,
        listens=True,
        pipe_seconds=0.0003,
        peer_seconds=0.0002,
        front_seconds=0.002,
        copy_path="shared memory",
        copy_bytes_per_second=5e9,
        copy_seconds=0.0003,
        host_bytes_per_second=5e9,
        start_seconds=0.2,
        wake_seconds=0.001,
        weight_bytes=0,
        weight_rates=dict.fromkeys(WEIGHT_SOURCES, 1e9),
        parked_weights=True,
    )


def _cpu(name: str, profile: Profile, number: int) -> Machine:
    kv_bytes = (
        2 * 4 * 2 * 32 * 4
    )  # bundled model: keys and values, 4 layers, 2 heads of 32, float32
    return Machine(
        name=name,
        profile=profile,
        num_workers=number,
        max_model_len=4096,
        max_num_seqs=64,
        max_batch_tokens=512,
        num_blocks=profile.kv_tokens // 16,
        block_bytes=kv_bytes * 16,
        noise=0.08,
        host_seconds=0.0,
        listens=False,
        pipe_seconds=0.0003,
        peer_seconds=0.0002,
        front_seconds=0.002,
        copy_path="shared memory",
        copy_bytes_per_second=8e9,
        copy_seconds=0.0003,
        host_bytes_per_second=8e9,
        start_seconds=0.2,
        wake_seconds=0.001,
        weight_bytes=10_000_000,
        weight_rates={"peer": 10e9, "host": 10e9, "disk": 2.5e9},
        parked_weights=True,
    )
