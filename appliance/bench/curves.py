"""Numbers behind the pictures: runs of one policy pooled over their seeds, load by load."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from appliance.core.types import Record
from appliance.metrics.document import Document, by_policy
from appliance.metrics.score import Capacity, Spread, Summary, capacity, wilson

THRESHOLDS = (0.9, 0.99)


class Share(Record, frozen=True):
    """Attained of offered at one load, over all seeds."""

    load: float
    attained: int
    offered: int

    @property
    def value(self) -> float:
        """The share; 1 of nothing."""
        return self.attained / self.offered if self.offered else 1.0

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's, at 95 %."""
        return wilson(self.attained, self.offered)


class Capacities(Record, frozen=True):
    """Of one policy, at each of the thresholds: overall and of the worst class."""

    policy: str
    overall: tuple[Capacity, ...]
    worst: tuple[Capacity, ...]


def class_names(runs: Sequence[Summary], spec: Mapping[str, Any]) -> list[str]:
    """Classes in the order of the specification, then whatever else there is."""
    seen = dict.fromkeys(name for run in runs for name in run.per_class)
    told = spec.get("classes")
    order = list(told) if isinstance(told, Mapping) else []
    return [name for name in order if name in seen] + [name for name in seen if name not in order]


def class_curve(runs: Sequence[Summary], name: str) -> list[Share]:
    """Attainment of one class, load by load."""
    return [_share(load, group, name) for load, group in by_load(runs)]


def overall_curve(runs: Sequence[Summary]) -> list[Share]:
    """Attainment of all requests, load by load."""
    return [
        Share(
            load=load,
            attained=sum(run.attained for run in group),
            offered=sum(run.offered for run in group),
        )
        for load, group in by_load(runs)
    ]


def worst_curve(runs: Sequence[Summary]) -> list[Share]:
    """Attainment of the class that did worst, load by load."""
    found = []
    for load, group in by_load(runs):
        names = dict.fromkeys(name for run in group for name in run.per_class)
        shares = [_share(load, group, name) for name in names]
        if shares:
            found.append(min(shares, key=lambda share: share.value))
    return found


def mean_curve(
    runs: Sequence[Summary], value: Callable[[Summary], float | None]
) -> list[tuple[float, float]]:
    """The mean of a figure over the seeds that have it, load by load."""
    found = []
    for load, group in by_load(runs):
        values = [number for run in group if (number := value(run)) is not None]
        if values:
            found.append((load, sum(values) / len(values)))
    return found


def by_load(runs: Sequence[Summary]) -> list[tuple[float, list[Summary]]]:
    """Runs of each load, ascending."""
    groups: dict[float, list[Summary]] = defaultdict(list)
    for run in runs:
        groups[run.load].append(run)
    return sorted(groups.items())


def capacities(document: Document) -> list[Capacities]:
    """Of every policy, in units of load."""
    return [
        Capacities(
            policy=policy,
            overall=tuple(_capacity(overall_curve(runs), level) for level in THRESHOLDS),
            worst=tuple(_capacity(worst_curve(runs), level) for level in THRESHOLDS),
        )
        for policy, runs in by_policy(document.runs).items()
    ]


def capacity_words(found: Capacity) -> str:
    """For a person; "under the first" where even that one failed."""
    if found.rate == 0 and not found.at_least:
        return "below the lowest load"
    return f"{'at least ' if found.at_least else ''}{found.rate:.3g}"


def class_spread(run: Summary, name: str, quantity: str) -> Spread:
    """`ttft_ms`, `tpot_ms` or `e2e_ms` of a class; empty where the class was not offered."""
    found = run.per_class.get(name)
    spread = getattr(found, quantity) if found is not None else None
    return spread if isinstance(spread, Spread) else Spread()


def _capacity(curve: Sequence[Share], level: float) -> Capacity:
    return capacity([(share.load, share.value) for share in curve], level)


def _share(load: float, group: Sequence[Summary], name: str) -> Share:
    found = [run.per_class[name] for run in group if name in run.per_class]
    return Share(
        load=load,
        attained=sum(one.attained for one in found),
        offered=sum(one.offered for one in found),
    )
