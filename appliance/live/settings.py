"""What a node is told when it is built: one frozen record, made by whoever read the
configuration.
"""

from collections.abc import Mapping

from appliance.core.dispatcher import DispatcherConfig
from appliance.core.faults import FaultRule
from appliance.core.start import WorkerStart
from appliance.core.types import BatcherConfig, Record, Role, WorkerSpec
from appliance.live.holding import HoldSettings
from appliance.live.workers import PoolPlan, WatchSettings


class NodeSettings(Record, frozen=True, kw_only=True):
    """All numbers and names of one node. Sizes in bytes, times in seconds."""

    model: str
    """Name under which the model is served."""
    version: str
    fingerprint: str
    """Of the checkpoint."""
    model_dir: str
    dtype: str
    eos_token_ids: tuple[int, ...]
    workers: tuple[WorkerSpec, ...]
    engine: str
    """"torch" or "paced"."""
    pool: PoolPlan
    batcher: BatcherConfig
    block_tokens: int
    num_blocks: int
    """Usable KV blocks of each worker."""
    dispatcher: DispatcherConfig
    policy: str = "fcfs"
    policy_settings: Mapping[str, float | int | str | bool] = {}
    role_settings: Mapping[str, float | int | str | bool] | None = None
    """Of the controller of roles; None: there is none."""
    host_blocks: int = 0
    """Blocks of each worker's host tier; 0: there is none."""
    profile: str = ""
    threads: int = 1
    native: str = "auto"
    """Kernels in C: "auto", "off" or "required"."""
    watch: WatchSettings = WatchSettings()
    heartbeat_seconds: float = 0.1
    stall_seconds: float = 5.0
    """A worker that has work and does not move for so long is reported as stalled."""
    journal_records: int = 20_000
    """Calls of the Dispatcher kept in memory."""
    faults: tuple[FaultRule, ...] = ()
    holding: HoldSettings = HoldSettings()
    """When tokens wait to leave together."""
    validate: bool = False
    """Check the laws after every message and step."""
    log_level: str = "info"
    log_json: bool = False

    def worker_start(
        self, spec: WorkerSpec, epoch: int, *, role: Role, hash_key: bytes, load_weights: bool
    ) -> WorkerStart:
        """What this incarnation is told. It begins with `role`, which may not be that of its
        `spec` any more."""
        return WorkerStart(
            worker=spec.id,
            epoch=epoch,
            devices=spec.devices,
            engine=self.engine,
            model_dir=self.model_dir,
            dtype=self.dtype,
            batcher=self.batcher,
            block_tokens=self.block_tokens,
            num_blocks=self.num_blocks,
            host_blocks=self.host_blocks,
            has_weights_fd=self.pool.weight_bytes > 0,
            load_weights=load_weights,
            role=role,
            hash_key=hash_key,
            policy=self.policy,
            policy_settings=dict(self.policy_settings),
            profile=self.profile,
            threads=self.threads,
            native=self.native,
            heartbeat_seconds=self.heartbeat_seconds,
            steps=self.dispatcher.steps,
            faults=self.faults,
            validate=self.validate,
            log_level=self.log_level,
            log_json=self.log_json,
        )
