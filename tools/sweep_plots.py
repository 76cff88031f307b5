"""Pictures of live sweeps: attainment over the rate, by policy; attainment over time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from appliance.bench.plots import COLOURS, MARKS, make_figure
from tools.sweep_kit import LiveRun
from tools.sweep_stats import Quantity, Sample, by_experiment, exactly, interval, paired

TITLES: Sequence[tuple[Quantity, str]] = (("overall", "all requests"), ("worst", "worst class"))


def write_pictures(runs: Sequence[LiveRun], directory: Path) -> list[Path]:
    """A PNG for each experiment with more than one rate, and one for phases; their paths. Runs are
    those of the tables."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for words, everything in by_experiment(runs).items():
        group, _ = paired(everything)
        arrivals = group[0].arrivals
        name = "".join(letter if letter.isalnum() else "-" for letter in words)
        if len({run.rate for run in group}) > 1:
            path = directory / f"sweep-{name}.png"
            attainment_figure(group, arrivals).savefig(path, dpi=130)
            written.append(path)
        if any(run.recoveries for run in group):
            path = directory / f"time-{name}.png"
            time_figure(group, arrivals).savefig(path, dpi=130)
            written.append(path)
    return written


def attainment_figure(group: Sequence[LiveRun], arrivals: str) -> Any:
    """Attainment of all requests and of the worst class over the rate, with 95 % intervals."""
    sample = Sample(group)
    figure = make_figure(13, 5)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (quantity, title) in zip(axes, TITLES, strict=True):
        for place, policy in enumerate(sample.policies):
            rates = [rate for rate in sample.rates if sample.has(policy, rate)]
            found = [interval(exactly(sample.attainment(policy, rate, quantity))) for rate in rates]
            style = _style(place, policy)
            axis.plot(rates, [100 * one.value for one in found], **style)
            axis.fill_between(
                rates,
                [100 * one.low for one in found],
                [100 * one.high for one in found],
                color=style["color"],
                alpha=0.10,
                linewidth=0,
            )
        axis.axhline(90, color="#999999", linestyle=":", linewidth=1)
        axis.set_title(f"attainment, {title}", fontsize=10, loc="left")
        axis.set_xlabel("requests per second")
        axis.grid(alpha=0.25)
        axis.set_ylim(0, 101)
    axes[0].set_ylabel("%")
    _finish(figure, axes[0], f"{group[0].devices}, workload {group[0].workload}, {arrivals}")
    return figure


def time_figure(group: Sequence[LiveRun], arrivals: str) -> Any:
    """Attainment of all requests over the time of the run, at the rate with most policies (the
    highest of those), changes as lines."""
    counts = {
        rate: len({run.policy for run in group if run.rate == rate}) for rate in _rates(group)
    }
    rate = max(counts, key=lambda one: (counts[one], one))
    figure = make_figure(13, 4.5)
    axis = figure.subplots()
    chosen = [run for run in group if run.rate == rate]
    start = min(one.change for run in chosen for one in run.recoveries)
    for place, policy in enumerate(dict.fromkeys(run.policy for run in chosen)):
        times, shares = _over_time([run for run in chosen if run.policy == policy])
        axis.plot(times, shares, **_style(place, policy), drawstyle="steps-mid")
    for one in chosen[0].recoveries:
        axis.axvline(one.change, color="#999999", linestyle=":", linewidth=1)
    axis.axhline(90, color="#999999", linestyle=":", linewidth=1)
    axis.set_xlabel(f"seconds (first change at {start:g})")
    axis.set_ylabel("attained of those due, %")
    axis.set_ylim(0, 101)
    axis.grid(alpha=0.25)
    _finish(figure, axis, f"{chosen[0].devices}, {arrivals}, {rate:g} requests/s")
    return figure


def _over_time(runs: Sequence[LiveRun]) -> tuple[list[float], list[float]]:
    """Middle of each block, and its attainment over all seeds in percent."""
    number = min(len(run.blocks) for run in runs)
    first = runs[0]
    length = first.span_seconds / len(first.blocks)
    warm_up = first.span_end - first.span_seconds
    times, shares = [], []
    for place in range(number):
        counts = [pair for run in runs for pair in run.blocks[place].counts.values()]
        offered = sum(pair[0] for pair in counts)
        times.append(warm_up + (place + 0.5) * length)
        shares.append(100 * sum(pair[1] for pair in counts) / offered if offered else 100.0)
    return times, shares


def _rates(group: Sequence[LiveRun]) -> list[float]:
    return sorted({run.rate for run in group})


def _style(place: int, policy: str) -> dict[str, Any]:
    ours = policy.startswith("hyperflexis")
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKS[place % len(MARKS)],
        "markersize": 4,
        "linewidth": 2.4 if ours else 1.2,
        "label": policy,
        "zorder": 3 if ours else 2,
    }


def _finish(figure: Any, axis: Any, title: str) -> None:
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
