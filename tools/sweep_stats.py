"""Numbers of a live sweep: capacities, ratios and differences, with intervals.

Requests within a few seconds of each other share their fate, so an interval that took them as
independent would be too narrow. Here whole blocks of seconds are drawn again with replacement (a
block bootstrap), the *same* blocks for every policy, since all met the same requests: differences
and ratios between policies are of pairs, and `paired` leaves out what has no partner. Counts of all
seeds of a load are pooled; the worst class is that of the pooled counts.

A capacity is only known within bounds where nothing failed up to the largest rate tried (it may be
anything above), or where the smallest one failed already (anything below). Each resample therefore
says what a figure is at least and at most, ratios included, and an interval is between quantiles of
these: where the two disagree about one of its bounds, a mark says which way the bound may be off.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import inf, isfinite, isnan, nan
from typing import Literal, NamedTuple

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from appliance.core.types import Record
from appliance.metrics.score import capacity, quantile
from tools.sweep_kit import LiveRun

RESAMPLES = 1000
Quantity = Literal["overall", "worst"]
Mark = Literal["", "≥ ", "≤ ", "? "]
Values = NDArray[np.float64]
"""A figure by resample; the first resample is what was measured."""
Counts = NDArray[np.float64]
"""Resamples x classes x (offered, attained)."""


class Resampled(NamedTuple):
    """A figure by resample, the first being the measured one: what it is at least, and at most."""

    least: Values
    most: Values


class Reach(NamedTuple):
    """A capacity: as measured (`at_least`: none of the rates failed; `nothing`: already the first
    one did), and by resample."""

    rate: float
    at_least: bool
    least: Values
    most: Values

    @property
    def nothing(self) -> bool:
        """It is below the smallest rate tried."""
        return self.rate == 0 and not self.at_least


class Interval(Record, frozen=True, kw_only=True):
    """A value with its 95 % interval. A mark says that a bound is at least ("≥ "), or at most
    ("≤ "), what stands there; "? ": nothing is known of it."""

    value: float
    low: float
    high: float
    low_mark: Mark = ""
    high_mark: Mark = ""

    @property
    def words(self) -> str:
        """`1.23 [1.10, ≥ 1.35]`"""
        return f"{_number(self.value, 2)} {self.bounds(2)}"

    def bounds(self, digits: int) -> str:
        """`[1.10, ≥ 1.35]`"""
        low, high = (_number(one, digits) for one in (self.low, self.high))
        return f"[{self.low_mark}{low}, {self.high_mark}{high}]".replace("? ?", "?")


class Sample:
    """The runs of one experiment, resampled once."""

    def __init__(self, runs: Sequence[LiveRun], *, resamples: int = RESAMPLES) -> None:
        self.policies = list(dict.fromkeys(run.policy for run in runs))
        self.rates = sorted({run.rate for run in runs})
        self.classes = sorted({name for run in runs for name in run.per_class})
        self._counts: dict[tuple[str, float], Counts] = {}
        drawn: dict[tuple[float, int, int], NDArray[np.float64]] = {}
        for run in runs:
            number = len(run.blocks)
            key = (run.rate, run.seed, number)
            if key not in drawn:
                drawn[key] = _weights(number, resamples, seed=hash(key) & 0xFFFFFFFF)
            counts = np.tensordot(drawn[key], _table(run, self.classes), axes=1)
            place = (run.policy, run.rate)
            self._counts[place] = self._counts.get(place, np.zeros_like(counts)) + counts

    def has(self, policy: str, rate: float) -> bool:
        """Whether that was run."""
        return (policy, rate) in self._counts

    def attainment(self, policy: str, rate: float, quantity: Quantity) -> NDArray[np.float64]:
        """By resample; the first is the measured one."""
        counts = self._counts[policy, rate]
        if quantity == "overall":
            total = counts.sum(axis=1)
            return _share(total[:, 1], total[:, 0])
        shares = _share(counts[:, :, 1], counts[:, :, 0])
        worst: NDArray[np.float64] = shares.min(axis=1)
        return worst

    def capacities(self, policy: str, quantity: Quantity, threshold: float) -> Reach:
        """As measured, and of every resample."""
        rates = [rate for rate in self.rates if self.has(policy, rate)]
        table = np.array([self.attainment(policy, rate, quantity) for rate in rates])
        found = [
            capacity(list(zip(rates, column.tolist(), strict=True)), threshold)
            for column in table.T
        ]
        bounds = [
            (one.rate, inf) if one.at_least else (one.rate, one.rate or rates[0]) for one in found
        ]
        least, most = np.array(bounds).T
        return Reach(rate=found[0].rate, at_least=found[0].at_least, least=least, most=most)

    def best(self, policies: Sequence[str], quantity: Quantity, threshold: float) -> str:
        """The one with the largest capacity; of equals one that may have more."""
        reaches = {one: self.capacities(one, quantity, threshold) for one in policies}
        return max(policies, key=lambda one: (reaches[one].rate, reaches[one].at_least))


def exactly(values: Values) -> Resampled:
    """A figure that each resample knows."""
    return Resampled(values, values)


def interval(found: Resampled | Reach) -> Interval:
    """Of a figure by resample; its measured value is what it is at least."""
    low, low_mark = _bound(found, 0.025, upper=False)
    high, high_mark = _bound(found, 0.975, upper=True)
    return Interval(
        value=float(found.least[0]), low=low, high=high, low_mark=low_mark, high_mark=high_mark
    )


def ratio(above: Resampled | Reach, below: Resampled | Reach) -> Interval:
    """Of pairs of resamples. Where the lower one is nothing, the ratio is infinite, or unknown if
    the upper one is nothing too; neither is left out."""
    least = _quotient(above.least, below.most, unknown=0.0)
    most = _quotient(above.most, below.least, unknown=inf)
    value = _quotient(above.least[:1], below.least[:1], unknown=nan)
    return replace(interval(Resampled(least, most)), value=float(value[0]))


def paired(runs: Sequence[LiveRun]) -> tuple[list[LiveRun], list[str]]:
    """Of one experiment the runs that can be compared, and words about the others.

    At each rate the seeds count that every policy has there, so that all met the same requests. If
    there is no such seed, the one that most policies have decides who is compared. Of a run that
    was made twice the later one counts."""
    latest: dict[tuple[str, float, int], LiveRun] = {}
    seeds: dict[float, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    twice = 0
    for run in runs:
        place = (run.policy, run.rate, run.seed)
        twice += place in latest
        if place not in latest or run.when >= latest[place].when:
            latest[place] = run
        seeds[run.rate][run.policy].add(run.seed)
    common = {rate: _common(found.values()) for rate, found in seeds.items()}
    kept = [
        run
        for run in latest.values()
        if run.seed in common[run.rate] and common[run.rate] <= seeds[run.rate][run.policy]
    ]
    words = [
        f"{policy} at {rate:g}/s, seed {seed} (not every policy has it there)"
        for policy, rate, seed in sorted(set(latest) - {(r.policy, r.rate, r.seed) for r in kept})
    ]
    if twice:
        words.append(f"runs that were made again later: {twice}")
    return kept, words


def mean_over(
    runs: Sequence[LiveRun], value: Callable[[LiveRun], float | None]
) -> dict[tuple[str, float], float]:
    """A figure by (policy, rate), the mean of the seeds that have it."""
    found: dict[tuple[str, float], list[float]] = defaultdict(list)
    for run in runs:
        if (number := value(run)) is not None:
            found[run.policy, run.rate].append(number)
    return {key: sum(values) / len(values) for key, values in found.items()}


def by_experiment(runs: Sequence[LiveRun]) -> Mapping[str, list[LiveRun]]:
    """Runs that may be compared, by words: the arrivals, and whatever else not all of `runs` have
    in common of devices, workload and length."""
    facts = [
        (run.devices, f"workload {run.workload}", f"{run.span_seconds:g} s that count")
        for run in runs
    ]
    several = [len(set(column)) > 1 for column in zip(*facts, strict=True)]
    found: dict[str, list[LiveRun]] = defaultdict(list)
    for run, fact in zip(runs, facts, strict=True):
        more = [words for words, told in zip(fact, several, strict=True) if told]
        found[", ".join([run.arrivals, *more])].append(run)
    return found


def _common(found: Iterable[set[int]]) -> set[int]:
    """Seeds that all have, else those of the largest group that shares one."""
    sets = list(found)
    common = set.intersection(*sets)
    if common:
        return common
    counts = Counter(seed for seeds in sets for seed in seeds)
    most = min(counts, key=lambda seed: (-counts[seed], seed))
    return set.intersection(*(seeds for seeds in sets if most in seeds))


def _bound(found: Resampled | Reach, share: float, *, upper: bool) -> tuple[float, Mark]:
    """A quantile, as narrow as can be said truthfully and on the careful side."""
    least, most = (quantile(np.sort(values).tolist(), share) for values in found[-2:])
    if least == most:
        return least, ""
    if least > 0 and not (upper and isfinite(most)):
        return least, "≥ "
    return (most, "≤ ") if isfinite(most) else (nan, "? ")


def _quotient(above: Values, below: Values, *, unknown: float) -> Values:
    """`unknown` where nothing is divided by nothing, or what has no bound by what has none."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found = above / below
    return np.where(np.isnan(found), unknown, found)


def _number(value: float, digits: int) -> str:
    if isnan(value):
        return "?"
    return f"{value:.{digits}f}" if isfinite(value) else "∞"


def _weights(number: int, resamples: int, *, seed: int) -> NDArray[np.float64]:
    """How often each block counts, by resample; in the first, once each."""
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, number, size=(resamples, number))
    weights = np.zeros((resamples + 1, number))
    weights[0] = 1.0
    for row in range(resamples):
        weights[row + 1] = np.bincount(drawn[row], minlength=number)
    return weights


def _table(run: LiveRun, classes: Sequence[str]) -> NDArray[np.float64]:
    """Blocks x classes x (offered, attained)."""
    return np.array(
        [[block.counts.get(name, (0, 0)) for name in classes] for block in run.blocks],
        dtype=np.float64,
    )


def _share(hits: NDArray[np.float64], trials: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 of nothing."""
    shares: NDArray[np.float64] = np.where(trials > 0, hits / np.maximum(trials, 1), 1.0)
    return shares
