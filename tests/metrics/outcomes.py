"""Outcomes with defaults."""

from typing import Any

from appliance.core.types import Slo
from appliance.metrics.outcome import Outcome

CHAT = Slo(class_name="chat", ttft=1.0, tpot=0.05)


def outcome(
    at: float = 0.0,
    *,
    ttft: float | None = 0.5,
    tpot: float = 0.04,
    num_tokens: int = 11,
    slo: Slo = CHAT,
    late: float = 0.0,
    **more: Any,
) -> Outcome:
    """One that is attained by default; first and last token follow from `ttft` and `tpot`."""
    sent = at + late
    first = None if ttft is None else sent + ttft
    fields: dict[str, Any] = {
        "index": 0,
        "class_name": slo.class_name,
        "slo": slo,
        "prompt_tokens": 100,
        "wanted_tokens": num_tokens,
        "at": at,
        "sent": sent,
        "first": first,
        "last": None if first is None else first + tpot * (num_tokens - 1),
        "num_tokens": num_tokens if ttft is not None else 0,
        "on_time": 1.0,
        "longest_gap": tpot,
        "finished": ttft is not None,
    }
    return Outcome(**(fields | more))
