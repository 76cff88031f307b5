"""When requests come. All are open loop: the times are fixed before the run.

* `Poisson`, `Gamma`: a renewal process of the whole stream, each request of a class by the shares.
  The first gap of `Gamma` is the residual of a gap that began before the run (length-biased gap
  times a uniform number), so the mean rate is as asked from the first second on, however bursty.
* `Phases`: the classes in turn at `high` times their rate, the others at `low`, `seconds` each.
  All rates have one common factor such that the run as a whole has the mean rate asked for; over
  whole cycles each class then has its share too. Poisson within a phase.
* `Steps`: (seconds, factor) in turn: `factor` times the rate asked for, then the next; after the
  last one nothing comes. The mean is what the factors make of it.
* `Times`: given times (of a trace), repeated and scaled to the rate asked for.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import inf, isfinite
from pathlib import Path
from typing import assert_never

from appliance.core.types import Record
from appliance.workload.draws import Draws
from appliance.workload.trace_rows import TraceError, read_trace


class ArrivalsError(ValueError):
    """Arrivals cannot be understood; the text says what can be written."""


class Poisson(Record, frozen=True, kw_only=True):
    """Independent arrivals."""


class Gamma(Record, frozen=True, kw_only=True):
    """Gamma-distributed gaps with this coefficient of variation (1: Poisson)."""

    cv: float = 4.0


class Phases(Record, frozen=True, kw_only=True):
    """See the module's text. `classes`: the ones that take turns (empty: all, in their order)."""

    seconds: float = 20.0
    high: float = 3.0
    low: float = 0.5
    classes: tuple[str, ...] = ()


class Steps(Record, frozen=True, kw_only=True):
    """See the module's text."""

    steps: tuple[tuple[float, float], ...]


class Times(Record, frozen=True, kw_only=True):
    """Ascending times in seconds, the first of them 0."""

    times: tuple[float, ...]


Arrivals = Poisson | Gamma | Phases | Steps | Times

FORMS = (
    '"poisson", "gamma:CV", "phases:SECONDS", "phases:SECONDS:CLASS,CLASS",'
    ' "steps:SECONDSxFACTOR,SECONDSxFACTOR" or "trace:FILE"'
)


def parse_arrivals(text: str) -> Arrivals:
    """Arrivals from words. Raises `ArrivalsError` listing the forms."""
    name, _, rest = text.partition(":")
    match name:
        case "poisson" if not rest:
            return Poisson()
        case "gamma":
            return Gamma(cv=_positive(rest or "4", text))
        case "phases":
            seconds, _, classes = rest.partition(":")
            return Phases(
                seconds=_positive(seconds or "20", text),
                classes=tuple(part.strip() for part in classes.split(",") if part.strip()),
            )
        case "steps" if rest:
            return Steps(steps=tuple(_step(part, text) for part in rest.split(",")))
        case "trace" if rest:
            return _times(rest)
        case _:
            raise ArrivalsError(f"{text!r}: write {FORMS}")


def arrival_times(
    arrivals: Arrivals, *, rate: float, seconds: float, shares: Mapping[str, float], seed: int
) -> list[tuple[float, str]]:
    """(time, class) of each arrival in [0, seconds), in order. `shares` are weights. Raises
    `ArrivalsError` for a phase of a class that is not among them."""
    if rate <= 0 or seconds <= 0:
        return []
    draws = Draws(seed, "arrivals")
    classes = Draws(seed, "classes")
    if isinstance(arrivals, (Phases, Steps)):
        pieces = rate_pieces(arrivals, rate=rate, seconds=seconds, shares=shares)
        return _piecewise(pieces, draws, classes)
    names = list(shares)
    cumulative = list(accumulate(shares.values()))
    times = _stream(arrivals, draws, rate=rate, seconds=seconds)
    return [(at, names[classes.pick(cumulative)]) for at in times]


class Piece(Record, frozen=True, kw_only=True):
    """A stretch of constant rates, requests per second by class."""

    start: float
    end: float
    rates: Mapping[str, float]


def rate_pieces(
    arrivals: Phases | Steps, *, rate: float, seconds: float, shares: Mapping[str, float]
) -> list[Piece]:
    """The stretches of a run; their starts (but the first) are the changes of the mix."""
    total = sum(shares.values())
    base = {name: rate * share / total for name, share in shares.items()}
    pieces: list[Piece] = []
    if isinstance(arrivals, Steps):
        start = 0.0
        for length, factor in arrivals.steps:
            end = min(start + length, seconds)
            if end > start:
                rates = {name: one * factor for name, one in base.items()}
                pieces.append(Piece(start=start, end=end, rates=rates))
            start = end
        return pieces
    turns = arrivals.classes or tuple(shares)
    if unknown := next((name for name in turns if name not in shares), None):
        known = ", ".join(shares)
        raise ArrivalsError(f"phases: there is no class {unknown!r}; known: {known}")
    place, start = 0, 0.0
    while start < seconds:
        end = min((place + 1) * arrivals.seconds, seconds)
        favoured = turns[place % len(turns)]
        rates = {
            name: one * (arrivals.high if name == favoured else arrivals.low)
            for name, one in base.items()
        }
        pieces.append(Piece(start=start, end=end, rates=rates))
        place, start = place + 1, end
    offered = sum((piece.end - piece.start) * sum(piece.rates.values()) for piece in pieces)
    factor = rate * seconds / offered
    return [
        Piece(
            start=piece.start,
            end=piece.end,
            rates={name: one * factor for name, one in piece.rates.items()},
        )
        for piece in pieces
    ]


def change_times(
    arrivals: Arrivals, *, rate: float, seconds: float, shares: Mapping[str, float]
) -> list[float]:
    """When the mix or the rate changes; empty for arrivals without phases."""
    if isinstance(arrivals, (Phases, Steps)):
        pieces = rate_pieces(arrivals, rate=rate, seconds=seconds, shares=shares)
        return [piece.start for piece in pieces[1:]]
    return []


def _stream(
    arrivals: Poisson | Gamma | Times, draws: Draws, *, rate: float, seconds: float
) -> list[float]:
    match arrivals:
        case Poisson():
            return _renewal(draws, rate=rate, seconds=seconds, cv=1.0)
        case Gamma(cv=cv):
            return _renewal(draws, rate=rate, seconds=seconds, cv=cv)
        case Times(times=given):
            return _repeated(given, rate=rate, seconds=seconds)
        case _:
            assert_never(arrivals)


def _renewal(draws: Draws, *, rate: float, seconds: float, cv: float) -> list[float]:
    """Gamma gaps with mean 1 / rate and this variation, in equilibrium at time 0."""
    shape = 1.0 / (cv * cv)
    scale = cv * cv / rate
    if cv == 1.0:
        at = draws.exponential(1.0 / rate)
    else:
        at = draws.uniform() * draws.gamma(shape + 1.0, scale)
    times = []
    while at < seconds:
        times.append(at)
        at += draws.exponential(1.0 / rate) if cv == 1.0 else draws.gamma(shape, scale)
    return times


def _piecewise(pieces: Sequence[Piece], draws: Draws, classes: Draws) -> list[tuple[float, str]]:
    """Poisson within each piece."""
    found: list[tuple[float, str]] = []
    for piece in pieces:
        names = list(piece.rates)
        cumulative = list(accumulate(piece.rates.values()))
        if cumulative[-1] <= 0:
            continue
        at = piece.start + draws.exponential(1.0 / cumulative[-1])
        while at < piece.end:
            found.append((at, names[classes.pick(cumulative)]))
            at += draws.exponential(1.0 / cumulative[-1])
    return found


def _repeated(times: Sequence[float], *, rate: float, seconds: float) -> list[float]:
    """Given times, scaled to a mean rate, again and again. A round lasts the span and one mean
    gap."""
    if not times:
        return []
    span = times[-1] - times[0]
    mean_gap = span / (len(times) - 1) if len(times) > 1 and span > 0 else 1.0
    factor = 1.0 / (rate * mean_gap)
    round_seconds = (span + mean_gap) * factor
    found: list[float] = []
    turn = 0
    while turn * round_seconds < seconds:
        for time in times:
            at = (time - times[0]) * factor + turn * round_seconds
            if at >= seconds:
                break
            found.append(at)
        turn += 1
    return found


def _positive(number: str, text: str) -> float:
    try:
        value = float(number)
    except ValueError:
        value = -inf
    if not (value > 0 and isfinite(value)):
        raise ArrivalsError(f"{text!r}: {number!r} must be a number above 0; write {FORMS}")
    return value


def _step(part: str, text: str) -> tuple[float, float]:
    length, cross, factor = part.partition("x")
    try:
        if not cross:
            raise ValueError
        step = (_positive(length, text), float(factor))
    except ValueError as error:
        raise ArrivalsError(f"{text!r}: {part!r} must be SECONDSxFACTOR, as in 60x3") from error
    if not (step[1] >= 0 and isfinite(step[1])):
        raise ArrivalsError(f"{text!r}: the factor of {part!r} must be 0 or more")
    return step


def _times(file: str) -> Times:
    try:
        rows = read_trace(Path(file))
    except TraceError as error:
        raise ArrivalsError(str(error)) from error
    times = sorted(row.arrival_s for row in rows if row.arrival_s is not None)
    if not times:
        raise ArrivalsError(f"{file}: no row has an arrival time (arrival_s)")
    return Times(times=tuple(time - times[0] for time in times))
