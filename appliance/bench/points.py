"""Which runs a sweep consists of, what each one sends, and which are done already."""

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import msgspec

from appliance.bench.target import BenchError
from appliance.core.types import Record, Slo
from appliance.metrics.document import Document, DocumentError, read_document
from appliance.metrics.score import EmptySpan, Summary, check_span
from appliance.workload.arrivals import parse_arrivals
from appliance.workload.generate import generate
from appliance.workload.items import Item
from appliance.workload.spec import Calibration, WorkloadSpec, class_slos
from appliance.workload.trace_rows import TraceRow
from appliance.workload.traces import trace_items

FREE_KEYS = frozenset({"url", "server", "policy"})
"""Of a document's `spec`: what may differ between its runs."""


class Point(Record, frozen=True):
    """One run. `load` is the number it goes by in the results: requests per second, or the factor
    of `--load`."""

    load: float
    rate: float | None
    """Requests per second; None: the trace's own times."""
    speed: float
    """How much faster than recorded a trace is played."""
    seed: int

    @property
    def words(self) -> str:
        """For a person."""
        if self.rate is not None:
            return f"{self.rate:g} requests/s, seed {self.seed}"
        return f"trace at {self.speed:g}x, seed {self.seed}"


class Offer(Record, frozen=True):
    """What is offered, at every point alike."""

    spec: WorkloadSpec
    seconds: float | None
    warm_up: float
    arrivals: str
    rows: tuple[TraceRow, ...] = ()
    calibration: Calibration | None = None

    @property
    def is_timed(self) -> bool:
        """The times come from a trace."""
        return any(row.arrival_s is not None for row in self.rows)


def points_of(
    offer: Offer, *, rates: Sequence[float], loads: Sequence[float], seeds: Sequence[int]
) -> list[Point]:
    """All runs of a sweep, rate by rate. Raises `BenchError` where it is not said how fast."""
    if not all(isfinite(value) and value > 0 for value in (*rates, *loads)):
        raise BenchError("--rate and --load must be finite numbers above 0")
    if loads and len(rates) > 1:
        raise BenchError("--load multiplies one --rate, not several; give one of them once")
    pairs: list[tuple[float, float | None, float]] = []
    if offer.is_timed:
        own = recorded_rate(offer.rows)
        if rates and loads:
            raise BenchError("the trace has times: give --rate or --load, not both")
        pairs += [(load, None, load) for load in (loads or (() if rates else (1.0,)))]
        pairs += [(rate, None, rate / own) for rate in rates]
    elif not rates:
        raise BenchError("say how fast: --rate 10, or several as in --rate 5,10,20")
    elif loads:
        pairs += [(load, load * rates[0], 1.0) for load in loads]
    else:
        pairs += [(rate, rate, 1.0) for rate in rates]
    return [
        Point(load=load, rate=rate, speed=speed, seed=seed)
        for load, rate, speed in pairs
        for seed in seeds
    ]


def recorded_rate(rows: Sequence[TraceRow]) -> float:
    """Requests per second of a trace as it was recorded. Raises `BenchError`."""
    times = sorted(row.arrival_s for row in rows if row.arrival_s is not None)
    if len(times) < 2 or times[-1] <= times[0]:
        raise BenchError("the trace has no span of time to be scaled to a --rate; use --load")
    return (len(times) - 1) / (times[-1] - times[0])


def items_of(offer: Offer, point: Point) -> tuple[list[Item], tuple[float, float]]:
    """The requests of a run, and the span of those that count: a trace that ends before `seconds`
    ends it. Raises `BenchError` where none counts."""
    if offer.rows:
        items = trace_items(
            offer.spec,
            offer.rows,
            load=point.speed,
            seconds=offer.seconds,
            seed=point.seed,
            rate=point.rate,
            arrivals=parse_arrivals(offer.arrivals),
            calibration=offer.calibration,
        )
    else:
        assert point.rate is not None
        assert offer.seconds is not None
        items = generate(
            offer.spec,
            rate=point.rate,
            seconds=offer.seconds,
            seed=point.seed,
            arrivals=parse_arrivals(offer.arrivals),
            calibration=offer.calibration,
        )
    end = offer.seconds
    if end is None or offer.is_timed:
        last = items[-1].at + 1e-6 if items else 0.0
        end = last if end is None else min(end, last)
    if end <= offer.warm_up:
        raise BenchError(
            f"the run takes {end:g} s and --warm-up {offer.warm_up:g} s of it: nothing is left"
        )
    try:
        check_span((item.at for item in items), (offer.warm_up, end))
    except EmptySpan as error:
        raise BenchError(f"{point.words}: {error}") from error
    return items, (offer.warm_up, end)


def slos_of(offer: Offer, points: Sequence[Point]) -> dict[str, Slo]:
    """Targets of each class that is offered, those of a trace's own classes included: one of each,
    for asking the server whether it takes them."""
    rows = items_of(offer, points[0])[0] if offer.rows else []
    return {**{item.class_name: item.slo for item in rows}, **class_slos(offer.spec)}


def is_done(point: Point, runs: Sequence[Summary], *, policy: str) -> bool:
    """Whether these results have a run of this point that counts."""
    return any(same_point(run, point, policy=policy) and not run.void for run in runs)


def same_point(run: Summary, point: Point, *, policy: str) -> bool:
    """Whether this is a run of this point."""
    return (run.policy, run.load, run.seed) == (policy, point.load, point.seed)


def known_calibration(path: Path | None) -> Calibration | None:
    """The one that the runs of a file were made with: a sweep has one, however often it resumes."""
    if path is None or not path.exists():
        return None
    try:
        return msgspec.convert(read_document(path).spec.get("relative"), Calibration | None)
    except (DocumentError, msgspec.ValidationError) as error:
        raise BenchError(f"{path}: {error}") from error


def earlier_runs(path: Path | None, document: Document, *, resume: bool) -> Document:
    """The document to add to: `document`, with the runs that a file has already. Raises
    `BenchError`, which names the difference, where the file must not be touched. What an older file
    does not say counts as equal."""
    if path is None or not path.exists():
        return document
    if not resume:
        raise BenchError(
            f"{path} exists: --resume measures what is missing in it; else name another file"
        )
    try:
        found = read_document(path)
    except DocumentError as error:
        raise BenchError(str(error)) from error
    spec = msgspec.json.decode(msgspec.json.encode(document.spec))
    for key in sorted(set(found.spec) - FREE_KEYS):
        where, theirs, ours = _difference(key, found.spec[key], spec.get(key))
        if theirs != ours:
            raise BenchError(
                f"{path} holds runs with {where} = {theirs!r}, not {ours!r}: name another file"
            )
    return msgspec.structs.replace(document, runs=found.runs)


def _difference(where: str, theirs: Any, ours: Any) -> tuple[str, Any, Any]:
    """The first place within two values at which they differ, with what is there; the values
    themselves where they do not."""
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        for key in sorted({*theirs, *ours}):
            if theirs.get(key) != ours.get(key):
                return _difference(f"{where}.{key}", theirs.get(key), ours.get(key))
    return where, theirs, ours
