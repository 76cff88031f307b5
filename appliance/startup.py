"""From a configuration to a plan: what will be served, where, and whether it fits.

Everything that can be known before a process starts is decided and checked here, so that a mistake
costs the operator a second and not a minute::

    weights of the node   one slab, mapped by all workers; with weights.share = "copy" one more for
                          each worker
    packed weights        per CPU worker without native kernels: the copy in the layout of torch's
    KV of a worker        (num_blocks + 1 for scratch) * block_tokens * bytes per token, and an
                          index of 16 bytes per block

`kv.memory = "auto"` is `AUTO_KV_BYTES` or two longest sequences, whichever is more, but no more
than `max_num_seqs` sequences could fill and no more than the worker's share of `AUTO_KV_SHARE` of
the free memory. If the longest sequence then does not fit and `model.max_model_len` is "auto" too,
the latter shrinks, and the plan says so. A paced worker has its profile's number of tokens.
"""

from pathlib import Path

import msgspec

from appliance.config import Config, ConfigError, bundled_models
from appliance.core.kv_layout import INDEX_ENTRY_BYTES, INDEX_HEADER_BYTES, pool_bytes
from appliance.core.model_shape import PAGE_BYTES, DType, parse_dtype, slab_bytes
from appliance.core.profiles import KV_SLOT_BYTES, device_profile
from appliance.core.slots import Policy
from appliance.core.step_model import StepCoefficients
from appliance.core.types import BatcherConfig, Record
from appliance.cost_profile import load_coefficients
from appliance.devices import DevicePlan
from appliance.live.checkpoint import Checkpoint, find_model, open_checkpoint
from appliance.policy import PolicySettingsError, make_policy
from appliance.staff import controller_settings, has_controller, notes_on_roles, staffed
from appliance.worker.native.build import NativeUnavailable, check_threads, ensure_built

AUTO_KV_BYTES = 256 * 1024**2
AUTO_KV_SHARE = 0.25


class Machine(Record, frozen=True, kw_only=True):
    """What the plan needs to know of the machine."""

    cores: int
    free_bytes: int


class Memory(Record, frozen=True, kw_only=True):
    """Bytes of the node when everything is in use."""

    weights: int
    """The node's weight slab; 0 when the engine has no weights."""
    packed: int
    """One worker's private copy."""
    kv: int
    """One worker's KV slab, its index included."""
    block: int
    """One KV block."""
    own: int = 0
    """One worker's own weight slab, where weights are copied."""
    host: int = 0
    """One worker's host tier, its index included."""

    def total(self, num_workers: int) -> int:
        """All of it."""
        return self.weights + num_workers * (self.own + self.packed + self.kv + self.host)


class Kernels(Record, frozen=True, kw_only=True):
    """What CPU workers compute with."""

    native: bool
    words: str
    """For the operator: which kernels, and why not the native ones."""
    fresh: bool = False
    """They were built just now."""


class Plan(Record, frozen=True, kw_only=True):
    """All numbers of a start, checked."""

    config: Config
    devices: DevicePlan
    machine: Machine
    checkpoint: Checkpoint
    served_name: str
    dtype: DType
    threads: int
    kernels: Kernels
    batcher: BatcherConfig
    num_blocks: int
    memory: Memory
    policy: Policy
    host_blocks: int = 0
    """Blocks of each worker's host tier."""
    notes: tuple[str, ...] = ()
    """What the operator should know of how "auto" was decided."""
    steps: StepCoefficients | None = None
    """How long steps last, from `devices.cost_profile`; None: to be learnt."""


def plan_kernels(config: Config, devices: DevicePlan) -> Kernels:
    """What CPU workers will compute with; the native kernels are built if they are not yet there.

    Raises `ConfigError` when they are required and cannot be had."""
    if devices.kind == "paced":
        return Kernels(native=False, words="none: tokens are drawn, not computed")
    if config.engine.native == "off":
        return Kernels(native=False, words="torch (engine.native is off)")
    try:
        if config.devices.threads != "auto":
            check_threads(config.devices.threads)
        library = ensure_built()
    except NativeUnavailable as error:
        if config.engine.native == "required":
            raise ConfigError(f'engine.native = "required": {error}') from error
        return Kernels(native=False, words=f"torch, slower ({error})")
    when = "built now" if library.fresh else "built earlier"
    return Kernels(
        native=True, words=f"native, {when} with {library.compiler}", fresh=library.fresh
    )


def make_plan(
    config: Config, devices: DevicePlan, *, machine: Machine, kernels: Kernels | None = None
) -> Plan:
    """Read the checkpoint and do the arithmetic; `kernels` are looked for unless given.

    Raises `ConfigError` or `CheckpointError`."""
    devices = staffed(devices, config)
    kernels = plan_kernels(config, devices) if kernels is None else kernels
    checkpoint = open_checkpoint(find_model(config.model.path, bundled=bundled_models()))
    dtype = _dtype(config)
    fixed = _fixed_memory(config, devices, checkpoint=checkpoint, dtype=dtype)
    if kernels.native:
        fixed = msgspec.structs.replace(fixed, packed=0)
    host_blocks = _host_blocks(config, fixed.block)
    host = pool_bytes(num_blocks=host_blocks, block_bytes=fixed.block) if host_blocks else 0
    fixed = msgspec.structs.replace(fixed, host=host)
    num_workers = devices.most
    room = (machine.free_bytes - fixed.total(num_workers)) // num_workers
    max_model_len, num_blocks = _lengths(
        config, devices, checkpoint=checkpoint, block_bytes=fixed.block, room=room
    )
    policy = _policy(config)
    notes = [devices.why] if devices.why else []
    notes += notes_on_roles(devices.workers)
    if config.model.max_model_len == "auto" and max_model_len < checkpoint.shape.max_positions:
        notes.append(
            f"model.max_model_len: auto is {max_model_len}, what the KV memory of a worker holds; "
            f"the model was built for {checkpoint.shape.max_positions}"
        )
    kv_bytes = pool_bytes(num_blocks=num_blocks, block_bytes=fixed.block)
    plan = Plan(
        config=config,
        devices=devices,
        machine=machine,
        checkpoint=checkpoint,
        served_name=_served_name(config, checkpoint),
        dtype=dtype,
        threads=_threads(config, dtype, kernels, cores=machine.cores // num_workers),
        kernels=kernels,
        batcher=BatcherConfig(
            max_model_len=max_model_len,
            max_num_seqs=config.batch.max_num_seqs,
            max_batch_tokens=config.batch.max_batch_tokens,
            depth=config.batch.depth,
            enable_prefix_cache=config.kv.prefix_cache,
        ),
        num_blocks=num_blocks,
        memory=msgspec.structs.replace(fixed, kv=kv_bytes),
        policy=policy,
        host_blocks=host_blocks,
        notes=tuple(notes),
        steps=load_coefficients(config.devices.cost_profile),
    )
    _check_memory(plan)
    return plan


def read_machine(*, cores: int, root: Path = Path("/")) -> Machine:
    """Cores as given; memory that can be had without swapping: what the kernel calls available, or
    what the control group leaves if that is less."""
    free = _meminfo(root / "proc/meminfo")
    group = root / "sys/fs/cgroup"
    limit, used = _number(group / "memory.max"), _number(group / "memory.current")
    if limit is not None and used is not None:
        free = min(free, max(0, limit - used))
    return Machine(cores=cores, free_bytes=free)


def shown_bytes(number: int) -> str:
    """`5.2 MiB`: three digits at most."""
    value, unit = float(number), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1000:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if value >= 100 or unit == "B" else f"{value:.1f} {unit}"


def _dtype(config: Config) -> DType:
    if config.model.dtype == "auto":
        return "float32"
    return parse_dtype(config.model.dtype)


def _policy(config: Config) -> Policy:
    """The policy, with the controller of roles if there is to be one."""
    name, settings = config.policy.name, config.policy.settings
    try:
        policy = make_policy(name, settings)
    except PolicySettingsError as error:
        raise ConfigError(f"policy.name (--policy) or policy.settings: {error}") from error
    try:  # settings of a controller that is off are checked too
        controlled = make_policy(name, settings, roles=controller_settings(config))
    except PolicySettingsError as error:
        raise ConfigError(f"roles.settings: {error}") from error
    return controlled if has_controller(config) else policy


def _served_name(config: Config, checkpoint: Checkpoint) -> str:
    name = config.model.served_name
    if not name.strip() or not name.isprintable():
        raise ConfigError(
            f"model.served_name = {name!r} (--served-model-name): requests could not use this "
            'name; write printable text, or "auto" for the name of the directory'
        )
    return checkpoint.name if name == "auto" else name


def _threads(config: Config, dtype: DType, kernels: Kernels, *, cores: int) -> int:
    """One thread keeps rows invariant (R12, ADR 0003 and 0009); bfloat16 in torch has nothing to
    lose and takes all of a worker's `cores`."""
    threads = config.devices.threads
    if threads != "auto":
        return threads
    return 1 if kernels.native or dtype == parse_dtype("float32") else max(1, cores)


def _fixed_memory(
    config: Config, devices: DevicePlan, *, checkpoint: Checkpoint, dtype: DType
) -> Memory:
    """What does not depend on the number of blocks."""
    if devices.kind == "paced":
        return Memory(weights=0, packed=0, kv=0, block=KV_SLOT_BYTES * config.kv.block_tokens)
    shape = checkpoint.shape
    weights = slab_bytes(shape, dtype)
    return Memory(
        weights=weights,
        own=weights if config.weights.share == "copy" else 0,
        packed=shape.packed_bytes(dtype),
        kv=0,
        block=shape.kv_block_bytes(dtype, block_tokens=config.kv.block_tokens),
    )


def _lengths(
    config: Config, devices: DevicePlan, *, checkpoint: Checkpoint, block_bytes: int, room: int
) -> tuple[int, int]:
    """Longest sequence in tokens and number of KV blocks; `room` bytes are free for each worker."""
    most = checkpoint.shape.max_positions
    wanted = config.model.max_model_len
    if wanted != "auto" and wanted > most:
        raise ConfigError(
            f"model.max_model_len = {wanted} (--max-model-len): {checkpoint.name} was built for "
            f"{most} positions; write at most {most}"
        )
    max_model_len = most if wanted == "auto" else wanted
    block_tokens = config.kv.block_tokens
    longest = -(-max_model_len // block_tokens)
    memory = config.kv.memory
    if memory != "auto":
        num_blocks = memory // block_bytes
    elif devices.kind == "paced":
        num_blocks = device_profile(devices.profile).kv_tokens // block_tokens
    else:
        good = max(AUTO_KV_BYTES // block_bytes, 2 * longest)
        most_useful = longest * config.batch.max_num_seqs
        affordable = int(AUTO_KV_SHARE * max(0, room)) // block_bytes
        num_blocks = min(good, most_useful, affordable)
    if num_blocks >= longest:
        return max_model_len, num_blocks
    held = num_blocks * block_tokens
    if wanted == memory == "auto" and held:
        return held, num_blocks
    words = "" if memory == "auto" else f" = {memory} bytes"
    shorter = f" or model.max_model_len = {held} (--max-model-len)" if held else ""
    raise ConfigError(
        f"kv.memory{words}: room for {held} tokens, fewer than one sequence of {max_model_len}; "
        f"write kv.memory = {longest * block_bytes}{shorter}"
    )


def _host_blocks(config: Config, block_bytes: int) -> int:
    """Blocks of each worker's host tier; 0: none is wanted."""
    wanted = config.kv.host_memory
    if not wanted:
        return 0
    if not config.kv.prefix_cache:
        raise ConfigError(
            f"kv.host_memory = {wanted} keeps blocks of the prefix cache, which is off; write "
            "kv.host_memory = 0 or kv.prefix_cache = true"
        )
    if wanted < block_bytes:
        raise ConfigError(
            f"kv.host_memory = {wanted} bytes: not one block of {block_bytes} fits; write 0 or at "
            f"least {block_bytes}"
        )
    return wanted // block_bytes


def _check_memory(plan: Plan) -> None:
    num_workers = plan.devices.most
    total = plan.memory.total(num_workers)
    if total <= plan.machine.free_bytes:
        return
    fixed = total - num_workers * plan.memory.kv
    block = plan.memory.block
    margin = block + INDEX_HEADER_BYTES + 2 * PAGE_BYTES  # scratch block, rounding
    each = (plan.machine.free_bytes - fixed) // num_workers - margin
    room = each // (block + 2 * INDEX_ENTRY_BYTES) * block
    least = -(-plan.batcher.max_model_len // plan.config.kv.block_tokens) * plan.memory.block
    if room > least:
        fix = f"write kv.memory = {room}"
    else:
        fix = "use fewer devices (--devices), a shorter model.max_model_len or a smaller model"
    raise ConfigError(
        f"the plan needs {shown_bytes(total)} of memory and {shown_bytes(plan.machine.free_bytes)} "
        f"are free; {fix}"
    )


def _meminfo(path: Path) -> int:
    for line in path.read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    raise ConfigError(f"{path} does not say MemAvailable; write kv.memory in bytes")


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such control group, or its limit is "max"
        return None
