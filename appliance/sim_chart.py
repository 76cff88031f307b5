"""The picture of a simulated sweep: attainment over load, of all requests and of the worst class,
and goodput. Seeds of one point are averaged."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from appliance.metrics.document import Document, by_policy
from appliance.metrics.score import Summary

_PANELS: Sequence[tuple[str, Callable[[Summary], float]]] = (
    ("attained, worst class", lambda run: run.worst_class),
    ("attained, all requests", lambda run: run.attainment),
    ("goodput, requests/s", lambda run: run.goodput),
)


class NoPicture(Exception):
    """Pictures need an optional dependency; names it."""


def draw(path: Path, document: Document) -> None:
    """Write the picture (PNG, or what the ending says). Raises `NoPicture` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NoPicture("--plot needs matplotlib: pip install 'appliance[bench]'") from error
    figure = Figure(figsize=(13.0, 4.2), layout="constrained")
    axes = figure.subplots(1, len(_PANELS))
    for axis, (title, value) in zip(axes, _PANELS, strict=True):
        for policy, runs in by_policy(document.runs).items():
            at: dict[float, list[float]] = defaultdict(list)
            for run in runs:
                at[run.load].append(value(run))
            loads = sorted(at)
            means = [sum(at[load]) / len(at[load]) for load in loads]
            axis.plot(loads, means, marker="o", markersize=3, linewidth=1.3, label=policy)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("load (1: reference rate)")
        axis.grid(alpha=0.25)
        if title.startswith("attained"):
            axis.axhline(0.9, color="grey", linewidth=0.8, linestyle="--")
            axis.set_ylim(-0.02, 1.02)
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=140)
