"""Numbers of a live sweep: capacities, ratios and differences, with intervals.

Requests within a few seconds of each other share their fate, so an interval that took them as
independent would be too narrow. Here whole blocks of seconds are drawn again with replacement (a
block bootstrap), the *same* blocks for every policy, since all met the same requests: differences
and ratios between policies are of pairs. Counts of all seeds of a load are pooled; the worst class
is that of the pooled counts.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from appliance.core.types import Record
from appliance.metrics.score import Capacity, capacity
from tools.sweep_kit import LiveRun

RESAMPLES = 1000
Quantity = Literal["overall", "worst"]
Counts = NDArray[np.float64]
"""Resamples x classes x (offered, attained); the first resample is what was measured."""


class Interval(Record, frozen=True, kw_only=True):
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def words(self) -> str:
        """`1.23 [1.10, 1.35]`"""
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


class Sample:
    """All runs of one kind of arrivals, resampled once."""

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

    def capacities(
        self, policy: str, quantity: Quantity, threshold: float
    ) -> tuple[Capacity, NDArray[np.float64]]:
        """As measured, and the rate of every resample."""
        rates = [rate for rate in self.rates if self.has(policy, rate)]
        table = np.array([self.attainment(policy, rate, quantity) for rate in rates])
        found = [
            capacity(list(zip(rates, column.tolist(), strict=True)), threshold)
            for column in table.T
        ]
        return found[0], np.array([one.rate for one in found])

    def best(self, policies: Sequence[str], quantity: Quantity, threshold: float) -> str:
        """The one with the largest capacity."""
        return max(policies, key=lambda one: self.capacities(one, quantity, threshold)[0].rate)


def interval(values: NDArray[np.float64]) -> Interval:
    """Of resamples, the first being the measured one; what is not finite is left out."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return Interval(value=float("nan"), low=float("nan"), high=float("nan"))
    low, high = np.quantile(finite, (0.025, 0.975))
    return Interval(value=float(values[0]), low=float(low), high=float(high))


def ratio(above: NDArray[np.float64], below: NDArray[np.float64]) -> Interval:
    """Of pairs of resamples."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return interval(above / below)


def mean_over(
    runs: Sequence[LiveRun], value: Callable[[LiveRun], float | None]
) -> dict[tuple[str, float], float]:
    """A figure by (policy, rate), the mean of the seeds that have it."""
    found: dict[tuple[str, float], list[float]] = defaultdict(list)
    for run in runs:
        if (number := value(run)) is not None:
            found[run.policy, run.rate].append(number)
    return {key: sum(values) / len(values) for key, values in found.items()}


def by_arrivals(runs: Sequence[LiveRun]) -> Mapping[str, list[LiveRun]]:
    """Runs of each kind of arrivals."""
    found: dict[str, list[LiveRun]] = defaultdict(list)
    for run in runs:
        found[run.arrivals].append(run)
    return found


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
