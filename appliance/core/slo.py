"""Deadlines and slack: the arithmetic of TTFT, TPOT and end-to-end targets.

The first token is due at `arrived + ttft`, each later one a `tpot` after the one before, so token
k (counted from 0) is due at `arrived + ttft + k * tpot`. A stream that runs ahead thus earns
slack, and one that is late does not get its whole schedule moved. Without a TTFT target the
schedule starts at the moment the first token really came. No target gives no deadline: `None`,
never infinity."""

from appliance.core.types import Record, Request, Slo


def first_token_deadline(request: Request) -> float | None:
    """When the first token is due."""
    ttft = request.slo.ttft
    return None if ttft is None else request.arrived + ttft


def due(slo: Slo, index: int, *, arrived: float, first_token_at: float | None) -> float | None:
    """When token `index` (0 = first) of a request that came at `arrived` is due; the end-to-end
    target bounds every token."""
    first = None if slo.ttft is None else arrived + slo.ttft
    by_gaps: float | None = None
    if index == 0:
        by_gaps = first
    elif slo.tpot is not None:
        start = first_token_at if first is None else first
        by_gaps = None if start is None else start + index * slo.tpot
    end = None if slo.e2e is None else arrived + slo.e2e
    if by_gaps is None or end is None:
        return end if by_gaps is None else by_gaps
    return min(by_gaps, end)


def slack(deadline: float | None, now: float) -> float | None:
    """Seconds left (negative: late); None without a deadline."""
    return None if deadline is None else deadline - now


class Verdict(Record, frozen=True, kw_only=True):
    """How an answer did against its targets. A target that was not set is met. `tpot` is None for
    an answer of fewer than two tokens."""

    ttft: float | None
    tpot: float | None
    e2e: float
    met: bool


def verdict(
    slo: Slo, *, arrived: float, first_token_at: float | None, ended_at: float, num_tokens: int
) -> Verdict:
    """Judge an answer of `num_tokens` tokens; one that emitted nothing misses a TTFT target."""
    ttft = None if first_token_at is None else first_token_at - arrived
    tpot = None
    if first_token_at is not None and num_tokens > 1:
        tpot = (ended_at - first_token_at) / (num_tokens - 1)
    e2e = ended_at - arrived
    met = (
        (slo.ttft is None or (ttft is not None and ttft <= slo.ttft))
        and (slo.tpot is None or tpot is None or tpot <= slo.tpot)
        and (slo.e2e is None or e2e <= slo.e2e)
    )
    return Verdict(ttft=ttft, tpot=tpot, e2e=e2e, met=met)
