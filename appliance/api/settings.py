"""What the HTTP surface may be told: bounds and the known SLO classes."""

from collections.abc import Mapping

from appliance.core.types import Record, Slo


class ApiSettings(Record, frozen=True, kw_only=True):
    """Bounds of the HTTP surface. A request past one gets a typed error."""

    max_body_bytes: int = 8 * 1024 * 1024
    """Largest request body, after decompression."""
    max_stream_buffer_bytes: int = 1024 * 1024
    """Bytes that may wait for one slow reader before its answer is given up."""
    max_sequences: int = 128
    """Largest number of answers to one HTTP request: prompts times `n`."""
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
