"""What the HTTP surface may be told: bounds, keys and the known SLO classes."""

from collections.abc import Mapping

from appliance.api.limits import KeyLimits
from appliance.core.types import Record, Slo


class ApiKey(Record, frozen=True, kw_only=True):
    """One configured key. The key itself is nowhere kept, only its digest."""

    name: str
    """Unique; the tenant of its requests, their label in logs and metrics."""
    digest: bytes
    """SHA-256 of the key's UTF-8 bytes."""
    slo_class: str = "default"
    """The class of requests that name none."""
    admin: bool = False
    cache_group: str = ""
    """Keys of one group share the prefix cache; empty: the group is the key alone."""
    limits: KeyLimits = KeyLimits()


class ConnectionLimits(Record, frozen=True, kw_only=True):
    """Bounds of one connection, and how many there may be."""

    max_connections: int = 4096
    max_line_bytes: int = 8190
    """Longest request line (so the longest URL), and the longest name or value of a header."""
    max_headers: int = 128
    receive_seconds: float = 60.0
    """From the end of the headers to the end of the body."""
    idle_seconds: float = 75.0
    """From the start of a connection, or its last answer, to the next request's whole headers."""
    stuck_seconds: float = 60.0
    """Without the client making room for what is to be sent."""
    max_receiving_bytes: int = 256 * 1024 * 1024
    """Of all large bodies that are being received at one time."""


class ApiSettings(Record, frozen=True, kw_only=True):
    """Bounds of the HTTP surface. A request past one gets a typed error."""

    max_body_bytes: int = 8 * 1024 * 1024
    """Largest request body, after decompression."""
    max_stream_buffer_bytes: int = 1024 * 1024
    """Bytes that may wait for one slow reader before its answer is given up."""
    max_sequences: int = 128
    """Largest number of answers to one HTTP request: prompts times `n`."""
    max_prompt_tokens: int | None = None
    """Longest prompt; None: what the model's context has room for."""
    max_messages: int = 4096
    """Longest conversation."""
    max_stop_strings: int = 16
    max_stop_length: int = 1024
    """Characters of one stop string."""
    connections: ConnectionLimits = ConnectionLimits()
    keys: tuple[ApiKey, ...] = ()
    """None: everything is open, admin routes to this machine."""
    metrics_need_key: bool = False
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may call this server; ("*",) for all."""
    tool_format: str = "auto"
    """In which form the model writes tool calls: a name of `tool_parsers.FORMATS`, "auto" (what the
    chat template teaches) or "none"."""
    reasoning: str = "auto"
    """Whether answers begin with thoughts between tags: "think", "none" or "auto" (where the chat
    template says so)."""
    slo_classes: Mapping[str, Slo] = {}
    """Latency targets by class name; "default" is used when a request names none."""
    loop_lag_interval: float = 0.1
    """Seconds between two measurements of the event loop's lag."""
