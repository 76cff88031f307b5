"""What each section of the configuration may say: its keys, their units, ranges and defaults.

`appliance.config` reads them, `config.toml` shows them all with words. A size is a number of bytes
or a text such as "256MiB".
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Auto = Literal["auto"]
Port = Annotated[int, Meta(ge=0, le=65535)]
Positive = Annotated[int, Meta(ge=1)]
Count = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(ge=0)]
Milliseconds = Annotated[float, Meta(gt=0)]
Budget = Annotated[float, Meta(ge=0, le=1e9)]
Bytes = Annotated[int, Meta(ge=1, extra={"unit": "bytes"})]
NoBytes = Annotated[int, Meta(ge=0, extra={"unit": "bytes"})]
Setting = float | int | str | bool


class Section(msgspec.Struct, frozen=True, kw_only=True):
    """Base of every section."""


class ServerSection(Section, frozen=True, kw_only=True):
    """Where the node listens, and what one client may take."""

    host: str = "127.0.0.1"
    port: Port = 8000
    drain_seconds: Seconds = 30.0
    max_body_bytes: Bytes = 16 * 1024**2
    max_stream_buffer_bytes: Bytes = 1024**2
    metrics_need_key: bool = False


class ModelSection(Section, frozen=True, kw_only=True):
    """What is served."""

    path: str = "tiny-tasks"
    served_name: str = "auto"
    max_model_len: Positive | Auto = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    tool_format: Literal["auto", "none", "hermes", "llama3_json"] = "auto"
    reasoning: Literal["auto", "none", "think"] = "auto"


class DevicesSection(Section, frozen=True, kw_only=True):
    """Where it is computed."""

    spec: str = "auto"
    threads: Positive | Auto = "auto"
    cost_profile: str = ""


class EngineSection(Section, frozen=True, kw_only=True):
    """How a CPU worker computes."""

    native: Literal["auto", "off", "required"] = "auto"


class WeightsSection(Section, frozen=True, kw_only=True):
    """Memory of the model."""

    share: Literal["map", "copy"] = "map"
    threads: Positive | Auto = "auto"
    checksums: Literal["sampled", "full"] = "sampled"


class KvSection(Section, frozen=True, kw_only=True):
    """Memory of the sequences."""

    block_tokens: Annotated[int, Meta(ge=1, le=1024)] = 16
    memory: Bytes | Auto = "auto"
    prefix_cache: bool = True
    host_memory: NoBytes = 0


class BatchSection(Section, frozen=True, kw_only=True):
    """Bounds of one forward step of one worker."""

    max_num_seqs: Positive = 64
    max_batch_tokens: Positive = 512
    depth: Annotated[int, Meta(ge=0, le=2)] = 0


class PolicySection(Section, frozen=True, kw_only=True):
    """Who is served first, and where."""

    name: str = "fcfs"
    settings: dict[str, Setting] = {}


class QueueSection(Section, frozen=True, kw_only=True):
    """What may wait for a worker before new requests get 429."""

    max_requests: Positive = 1024
    max_tokens: Positive = 1_000_000


class WorkersSection(Section, frozen=True, kw_only=True):
    """How workers are watched and replaced."""

    heartbeat_ms: Milliseconds = 100.0
    stop_detect_ms: Milliseconds = 600.0
    stall_seconds: Annotated[float, Meta(gt=0)] = 5.0
    stall_kill_seconds: Annotated[float, Meta(gt=0)] = 30.0
    respawn_backoff_ms: Milliseconds = 100.0
    respawn_backoff_max_ms: Milliseconds = 10_000.0
    quarantine_deaths: Positive = 3
    poison_deaths: Positive = 2
    trial_steps: Positive = 4
    max_trials: Positive = 3
    spared_deaths: Count = 2


class RolesSection(Section, frozen=True, kw_only=True):
    """Which worker prefers which phase, and how that changes."""

    initial: str = "mixed"
    controller: Literal["auto", "on", "off"] = "auto"
    scale: Literal["auto", "on", "off"] = "auto"
    settings: dict[str, Setting] = {}
    drain_seconds: Seconds = 2.0
    wind_down: Literal["migrate", "wait"] = "migrate"
    flip_seconds: Annotated[float, Meta(gt=0)] = 5.0
    park_seconds: Annotated[float, Meta(gt=0)] = 30.0


class TransferSection(Section, frozen=True, kw_only=True):
    """How KV moves between workers."""

    lease_seconds: Annotated[float, Meta(gt=0)] = 10.0
    prefix_pull: bool = True
    pull_gain: Annotated[float, Meta(gt=0, le=1)] = 1.0


class StandbySection(Section, frozen=True, kw_only=True):
    """Workers that are started and wait, and how many serve."""

    workers: Annotated[int, Meta(ge=0, le=64)] = 0
    add: Annotated[int, Meta(ge=0, le=64)] = 0
    min_workers: Positive | Auto = "auto"
    max_workers: Positive | Auto = "auto"


class StreamSection(Section, frozen=True, kw_only=True):
    """When tokens of an answer leave together instead of one by one."""

    join_above: Annotated[float, Meta(gt=0, le=1)] = 0.9
    join_ms: Budget = 50.0


class LimitsSection(Section, frozen=True, kw_only=True):
    """What one request or one connection may take."""

    max_prompt_tokens: Positive | Auto = "auto"
    max_messages: Positive = 4096
    max_answers: Positive = 128
    max_stop_strings: Positive = 16
    max_stop_chars: Positive = 1024
    max_line_bytes: Annotated[int, Meta(ge=1024, le=1024**2, extra={"unit": "bytes"})] = 8190
    max_headers: Annotated[int, Meta(ge=16)] = 128
    max_connections: Positive = 4096
    max_receiving_bytes: Bytes = 256 * 1024**2
    max_tokenising_bytes: Bytes = 64 * 1024**2
    receive_seconds: Annotated[float, Meta(gt=0)] = 60.0
    idle_seconds: Annotated[float, Meta(gt=0)] = 75.0
    stuck_seconds: Annotated[float, Meta(gt=0)] = 60.0


class CorsSection(Section, frozen=True, kw_only=True):
    """Which web pages may call."""

    origins: tuple[str, ...] = ()


class KeySection(Section, frozen=True, kw_only=True):
    """One API key."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,64}\Z")]
    sha256: Annotated[str, Meta(pattern=r"^[0-9A-Fa-f]{64}\Z")]
    slo_class: str = "default"
    admin: bool = False
    cache_group: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{0,64}\Z")] = ""
    requests_per_minute: Count = 0
    tokens_per_minute: Count = 0
    max_concurrent_requests: Count = 0


class SloSection(Section, frozen=True, kw_only=True):
    """Latency budgets of one class of requests; 0 means "no target"."""

    ttft_ms: Budget = 0.0
    tpot_ms: Budget = 0.0
    e2e_ms: Budget = 0.0
    weight: Annotated[float, Meta(gt=0, le=1e6)] = 1.0
    on_miss: Literal["serve", "refuse"] = "serve"


class LogSection(Section, frozen=True, kw_only=True):
    """What is written to stderr."""

    format: Literal["human", "json"] = "human"
    level: Literal["debug", "info", "warning", "error"] = "info"


class JournalSection(Section, frozen=True, kw_only=True):
    """The record of everything the schedulers heard and said."""

    path: str = ""
    ring_records: Positive = 20_000
    check_laws: bool = False


class FaultsSection(Section, frozen=True, kw_only=True):
    """Faults to inject on purpose."""

    plan: str = ""
