"""What a new worker process is told before the first frame.

It is the only thing a worker receives outside the frames: msgpack behind a u32 length, in one
`sendmsg` with file descriptors: weight slab and the slabs that its weights may be copied from (left
out when the engine has no weights), KV pool, and its end of the links channel
(`appliance.core.peer_links`; left out for a worker without peers).
"""

import msgspec

from appliance.core.faults import FaultRule
from appliance.core.step_model import StepCoefficients
from appliance.core.types import BatcherConfig, Role, WorkerId


class WeightPlan(msgspec.Struct, frozen=True, kw_only=True):
    """How one incarnation comes to its weights."""

    own: bool = False
    """True: the weight slab is this worker's own, to be filled by copy. False: it is the node's,
    to be mapped."""
    sources: tuple[str, ...] = ()
    """Slabs to copy from, the best first, by name ("peer:1", "host"); their descriptors come in
    this order after the worker's own. Disk is the last resort and not named."""
    fingerprint: str = ""
    """Of the checkpoint's files as the node serves them; empty: not known yet, anything fits."""
    full_check: bool = False
    """Compare every checksum after a copy, not a sample of them."""
    threads: int = 1
    """That read or copy at one time."""


class WorkerStart(msgspec.Struct, frozen=True, kw_only=True):
    """Everything one incarnation of a worker needs to know."""

    worker: WorkerId
    epoch: int
    devices: tuple[str, ...]
    engine: str
    """"torch" or "paced"."""
    model_dir: str
    dtype: str
    """"float32" or "bfloat16"."""
    batcher: BatcherConfig
    block_tokens: int
    num_blocks: int
    host_blocks: int = 0
    """Blocks of the host tier; 0: there is none."""
    has_weights_fd: bool
    role: Role = Role.MIXED
    load_weights: bool
    """True: fill the node's weight slab from `model_dir`. False: it is complete."""
    weights: WeightPlan = WeightPlan()
    hash_key: bytes
    policy: str = "fcfs"
    policy_settings: dict[str, float | int | str | bool] = {}
    profile: str = ""
    """Device profile of the paced engine."""
    threads: int = 1
    native: str = "auto"
    """Kernels in C: "auto" where they can be built, "off", or "required"."""
    heartbeat_seconds: float = 0.1
    steps: StepCoefficients | None = None
    """What a profile found about the duration of steps."""
    faults: tuple[FaultRule, ...] = ()
    validate: bool = False
    """Check the laws after every step."""
    log_level: str = "info"
    log_json: bool = False
