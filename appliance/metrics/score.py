"""Scores of a run.

* Attained: finished, all requested tokens, every target of the request holds. TTFT counts from the
  moment of sending; the client's own lateness is reported apart, and voids a run above 50 ms at its
  99th percentile. What was refused, failed or never answered is missed.
* Deadline attainment (after SLOs-Serve): finished, first token in time, and at least 90 % of the
  tokens k by `sent + TTFT + k * TPOT`: early tokens may be banked, holding tokens back gains
  nothing. The end-to-end target must hold too.
* Goodput: attained requests per second of the offered span; token goodput: their tokens.
* Capacity: the largest offered rate with attainment at or above a threshold, linear between the
  bracketing steps.
* Intervals are Wilson's, at 95 %.

Requests are counted by when they were due: those within the span, whatever became of them later;
so warm-up is left out and drain is included. A span in which none is due has no score.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from math import ceil, sqrt
from typing import Literal

from appliance.core.types import Record
from appliance.metrics.outcome import Outcome

VOID_LATENESS = 0.05
"""Seconds of client lateness (99th percentile) above which a run says nothing of the server."""
ON_TIME = 0.9
"""Share of tokens that deadline attainment asks for."""
_Z95 = 1.959963984540054


class EmptySpan(ValueError):
    """No request is due in what counts of a run; the text names the fix."""


Miss = Literal["error", "unfinished", "ttft", "tpot", "e2e"]


class Spread(Record, frozen=True, kw_only=True):
    """Statistics of a quantity over the requests that have it; None without any."""

    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    mean: float | None = None
    num: int = 0


class ClassSummary(Record, frozen=True, kw_only=True):
    """Scores of one class; `missed` counts each miss under its first reason."""

    offered: int
    attained: int
    attainment: float
    ci95: tuple[float, float]
    deadline_attainment: float
    goodput: float
    token_goodput: float
    ttft_ms: Spread
    tpot_ms: Spread
    e2e_ms: Spread
    longest_gap_ms: Spread
    missed: Mapping[str, int]


class Summary(Record, frozen=True, kw_only=True):
    """Scores of a run. Rates are per second of the offered span; `_ms` are milliseconds.
    `worst_class` is the lowest attainment of a class that was offered anything."""

    policy: str
    load: float
    attainment: float
    worst_class: float
    worst_class_name: str
    per_class: Mapping[str, ClassSummary]
    goodput: float
    token_goodput: float
    ttft_ms: Spread
    tpot_ms: Spread
    e2e_ms: Spread
    tbt_ms: Spread
    """The longest gap of each answer."""
    lateness_ms: Spread
    instance_seconds: float
    goodput_per_instance: float
    """Attained requests per instance-second."""
    offered: int
    attained: int
    failed: int
    offered_rate: float
    span_seconds: float
    deadline_attainment: float
    ci95: tuple[float, float]
    output_tokens: int
    cached_tokens: int
    prompt_tokens: int
    void: bool
    """The client was late: the run says nothing."""
    workload: str = ""
    arrivals: str = ""
    seed: int = 0
    note: str = ""


class Capacity(Record, frozen=True, kw_only=True):
    """A rate, or with `at_least` the largest one tried, since none failed. 0: the first failed."""

    rate: float
    at_least: bool


def first_miss(outcome: Outcome) -> Miss | None:
    """Why a request counts as missed; None when it is attained."""
    if outcome.error:
        return "error"
    if not outcome.finished or outcome.num_tokens < max(1, outcome.wanted_tokens):
        return "unfinished"
    slo, ttft, tpot, e2e = outcome.slo, outcome.ttft, outcome.tpot, outcome.e2e
    if ttft is None or tpot is None or e2e is None:
        return "unfinished"
    if slo.ttft is not None and ttft > slo.ttft:
        return "ttft"
    if slo.tpot is not None and tpot > slo.tpot:
        return "tpot"
    if slo.e2e is not None and e2e > slo.e2e:
        return "e2e"
    return None


def attained(outcome: Outcome) -> bool:
    """Finished, complete, and within every target."""
    return first_miss(outcome) is None


def deadline_attained(outcome: Outcome) -> bool:
    """See the module's text."""
    if first_miss(outcome) not in (None, "tpot") or outcome.on_time < ON_TIME:
        return False
    # a missed "tpot" is the first reason only: the end-to-end target was not looked at
    allowed, e2e = outcome.slo.e2e, outcome.e2e
    return allowed is None or (e2e is not None and e2e <= allowed)


def wilson(hits: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a share; (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    share = hits / trials
    z2 = _Z95 * _Z95
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z95 * sqrt(share * (1 - share) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    return max(0.0, centre - half), min(1.0, centre + half)


def quantile(ordered: Sequence[float], level: float) -> float:
    """The smallest of sorted values that at least this share does not exceed (nearest rank)."""
    return ordered[max(0, min(len(ordered), ceil(level * len(ordered) - 1e-9)) - 1)]


def spread(values: Iterable[float | None], *, scale: float = 1.0) -> Spread:
    """Statistics of what is not None, times `scale`."""
    ordered = sorted(value * scale for value in values if value is not None)
    if not ordered:
        return Spread()
    return Spread(
        p50=quantile(ordered, 0.5),
        p90=quantile(ordered, 0.9),
        p99=quantile(ordered, 0.99),
        mean=sum(ordered) / len(ordered),
        num=len(ordered),
    )


def counted(outcomes: Iterable[Outcome], span: tuple[float, float]) -> list[Outcome]:
    """Those that were due within the span: `span[0] <= at < span[1]`."""
    start, end = span
    return [outcome for outcome in outcomes if start <= outcome.at < end]


def check_span(times: Iterable[float], span: tuple[float, float]) -> None:
    """Raise `EmptySpan` if none of these times lies within the span."""
    start, end = span
    if not any(start <= at < end for at in times):
        raise EmptySpan(
            f"no request is due in what counts ({start:g} to {end:g} s of the run): make the run"
            " longer, the rate or load higher, or the warm-up shorter"
        )


def summarise(
    outcomes: Iterable[Outcome],
    *,
    policy: str,
    load: float,
    span: tuple[float, float],
    instance_seconds: float,
    workload: str = "",
    arrivals: str = "",
    seed: int = 0,
    note: str = "",
) -> Summary:
    """Score the requests due within `span` (seconds from the start of the run). Raises `EmptySpan`
    where there is none: 100 % of nothing would enter capacities as a success."""
    chosen = counted(outcomes, span)
    seconds = span[1] - span[0]
    if seconds <= 0:
        raise ValueError(f"span = {span}: must end after it starts")
    check_span((outcome.at for outcome in chosen), span)
    groups: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in chosen:
        groups[outcome.class_name].append(outcome)
    per_class = {name: _class(group, seconds) for name, group in sorted(groups.items())}
    hits = [outcome for outcome in chosen if attained(outcome)]
    worst = min(per_class, key=lambda name: per_class[name].attainment, default="")
    lateness = spread((outcome.lateness for outcome in chosen), scale=1000)
    return Summary(
        policy=policy,
        load=load,
        attainment=_share(len(hits), len(chosen)),
        worst_class=per_class[worst].attainment if worst else 1.0,
        worst_class_name=worst,
        per_class=per_class,
        goodput=len(hits) / seconds,
        token_goodput=sum(outcome.num_tokens for outcome in hits) / seconds,
        ttft_ms=spread((outcome.ttft for outcome in chosen), scale=1000),
        tpot_ms=spread((outcome.tpot for outcome in chosen), scale=1000),
        e2e_ms=spread((outcome.e2e for outcome in chosen), scale=1000),
        tbt_ms=spread(_gaps(chosen), scale=1000),
        lateness_ms=lateness,
        instance_seconds=instance_seconds,
        goodput_per_instance=len(hits) / instance_seconds if instance_seconds > 0 else 0.0,
        offered=len(chosen),
        attained=len(hits),
        failed=sum(1 for outcome in chosen if first_miss(outcome) in ("error", "unfinished")),
        offered_rate=len(chosen) / seconds,
        span_seconds=seconds,
        deadline_attainment=_share(sum(map(deadline_attained, chosen)), len(chosen)),
        ci95=wilson(len(hits), len(chosen)),
        output_tokens=sum(outcome.num_tokens for outcome in chosen),
        cached_tokens=sum(outcome.cached_tokens for outcome in chosen),
        prompt_tokens=sum(outcome.prompt_tokens for outcome in chosen),
        void=lateness.p99 is not None and lateness.p99 > VOID_LATENESS * 1000,
        workload=workload,
        arrivals=arrivals,
        seed=seed,
        note=note,
    )


def capacity(points: Sequence[tuple[float, float]], threshold: float = 0.9) -> Capacity:
    """The largest rate with attainment at or above `threshold`, from (rate, attainment) points.

    Between the last step before the first failure and that failure it is linear; beyond the first
    failure nothing counts, since a point that is good again by chance is no capacity. Points of one
    rate are averaged."""
    by_rate: dict[float, list[float]] = defaultdict(list)
    for rate, share in points:
        by_rate[rate].append(share)
    steps = [(rate, sum(shares) / len(shares)) for rate, shares in sorted(by_rate.items())]
    before: tuple[float, float] | None = None
    for rate, share in steps:
        if share < threshold:
            if before is None:
                return Capacity(rate=0.0, at_least=False)
            along = (before[1] - threshold) / (before[1] - share)
            return Capacity(rate=before[0] + along * (rate - before[0]), at_least=False)
        before = (rate, share)
    return Capacity(rate=0.0 if before is None else before[0], at_least=True)


def _class(group: Sequence[Outcome], seconds: float) -> ClassSummary:
    reasons = [first_miss(outcome) for outcome in group]
    hits = [outcome for outcome, why in zip(group, reasons, strict=True) if why is None]
    missed: dict[str, int] = defaultdict(int)
    for why in reasons:
        if why is not None:
            missed[why] += 1
    return ClassSummary(
        offered=len(group),
        attained=len(hits),
        attainment=_share(len(hits), len(group)),
        ci95=wilson(len(hits), len(group)),
        deadline_attainment=_share(sum(map(deadline_attained, group)), len(group)),
        goodput=len(hits) / seconds,
        token_goodput=sum(outcome.num_tokens for outcome in hits) / seconds,
        ttft_ms=spread((outcome.ttft for outcome in group), scale=1000),
        tpot_ms=spread((outcome.tpot for outcome in group), scale=1000),
        e2e_ms=spread((outcome.e2e for outcome in group), scale=1000),
        longest_gap_ms=spread(_gaps(group), scale=1000),
        missed=dict(missed),
    )


def _gaps(outcomes: Iterable[Outcome]) -> Iterable[float]:
    return (outcome.longest_gap for outcome in outcomes if outcome.num_tokens > 1)


def _share(hits: int, trials: int) -> float:
    """A share; 1 of nothing: nothing was missed."""
    return hits / trials if trials else 1.0
