"""Pictures of a document of results. Needs matplotlib (the extra `bench`)."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from appliance.bench.curves import (
    Share,
    by_load,
    class_curve,
    class_names,
    class_spread,
    mean_curve,
    overall_curve,
    worst_curve,
)
from appliance.metrics.document import Document, by_policy
from appliance.metrics.score import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31",
    "#7F7F7F", "#B22222", "#4B0082",
)  # fmt: skip
MARKS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h")


class NoPictures(Exception):
    """matplotlib is not installed; the text says how to get it."""


def make_figure(width: float, height: float) -> "Figure":
    """An empty figure of this size in inches. Raises `NoPictures`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NoPictures(
            "pictures need matplotlib: pip install 'appliance[bench]' (the JSON has all figures)"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def sweep_figure(document: Document) -> "Figure":
    """Worst class and overall attainment, and goodput, over the load; a line per policy."""
    figure = make_figure(13, 4.2)
    axes = figure.subplots(1, 3)
    groups = by_policy(document.runs)
    for place, (policy, runs) in enumerate(groups.items()):
        style = _style(place, policy)
        _attainment_line(axes[0], worst_curve(runs), style)
        _attainment_line(axes[1], overall_curve(runs), style)
        _line(axes[2], mean_curve(runs, lambda run: run.goodput), style)
    offered = mean_curve(document.runs, lambda run: run.offered_rate)
    _line(axes[2], offered, {"color": "#999999", "linestyle": ":", "label": "offered"})
    _attainment_axes(axes[0], document, title="attainment, worst class")
    _attainment_axes(axes[1], document, title="attainment, all requests")
    _axes(axes[2], document, title="goodput", unit="attained requests/s")
    axes[2].set_ylim(bottom=0)
    _legend(figure, axes[2], columns=min(4, len(groups) + 1))
    return figure


def class_figure(document: Document, policy: str) -> "Figure":
    """Attainment of each class over the load, TTFT and TPOT beside it, of one policy."""
    runs = by_policy(document.runs)[policy]
    names = class_names(runs, document.spec)
    figure = make_figure(13, 4.2)
    axes = figure.subplots(1, 3)
    for place, name in enumerate(names):
        style = _style(place, name)
        _attainment_line(axes[0], class_curve(runs, name), style)
        for axis, quantity in ((axes[1], "ttft_ms"), (axes[2], "tpot_ms")):
            _line(axis, mean_curve(runs, _quantile(name, quantity, "p99")), style)
            faint = {**style, "linestyle": ":", "label": None, "markersize": 3}
            _line(axis, mean_curve(runs, _quantile(name, quantity, "p50")), faint)
    _attainment_axes(axes[0], document, title="attainment by class")
    for axis, words in ((axes[1], "TTFT"), (axes[2], "TPOT")):
        _axes(axis, document, title=f"{words} (line p99, dotted p50)", unit="ms")
        _log_ms(axis)
    figure.suptitle(policy, fontsize=11, fontweight="bold", x=0.01, ha="left")
    _legend(figure, axes[0], columns=len(names))
    return figure


def point_figure(document: Document, runs: Sequence[Summary]) -> "Figure":
    """One load of one policy: attainment of each class with its interval, TTFT and TPOT from the
    median to the 99th percentile, with the target as a mark."""
    names = class_names(runs, document.spec)[::-1]
    figure = make_figure(13, 1.3 + 0.42 * len(names))
    axes = figure.subplots(1, 3, sharey=True)
    shares = [class_curve(runs, name)[0] for name in names]
    _bars(axes[0], shares)
    targets = document.spec.get("classes")
    known: Mapping[str, Any] = targets if isinstance(targets, Mapping) else {}
    for axis, quantity in ((axes[1], "ttft_ms"), (axes[2], "tpot_ms")):
        for row, name in enumerate(names):
            _range(axis, row, runs, name=name, quantity=quantity, target=known.get(name, {}))
        _plain(axis)
        axis.set_xscale("log")
        _plain_numbers(axis.xaxis)
        axis.set_xlabel("ms", fontsize=9)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(-0.6, len(names) - 0.4)
    axes[0].set_title("attainment, with 95 % interval", fontsize=10, loc="left")
    axes[1].set_title("TTFT: p50 (dot), p90 (bar), p99 (tick)", fontsize=10, loc="left")
    axes[2].set_title("TPOT; the target is the red line", fontsize=10, loc="left")
    return figure


def picture_of(document: Document) -> "list[tuple[str, Figure]]":
    """(heading, figure) in the order of a report: the sweep if it is one, then every policy."""
    found: list[tuple[str, Figure]] = []
    groups = by_policy(document.runs)
    if len(groups) > 1 or any(len(by_load(runs)) > 1 for runs in groups.values()):
        found.append(("Over the load", sweep_figure(document)))
    for policy, runs in groups.items():
        loads = by_load(runs)
        if len(loads) > 1:
            found.append((f"{policy}: classes", class_figure(document, policy)))
        else:
            heading = f"{policy} at {loads[0][0]:g} {load_words(document)}"
            found.append((heading, point_figure(document, runs)))
    return found


def load_words(document: Document) -> str:
    """What the loads of these runs are."""
    return str(document.spec.get("load_is", "load"))


def _quantile(name: str, quantity: str, level: str) -> Callable[[Summary], float | None]:
    return lambda run: getattr(class_spread(run, name, quantity), level)


def _style(place: int, label: str) -> dict[str, Any]:
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKS[place % len(MARKS)],
        "label": label,
        "markersize": 4.5,
        "linewidth": 1.6,
    }


def _attainment_line(axis: "Axes", curve: Sequence[Share], style: Mapping[str, Any]) -> None:
    _line(axis, [(share.load, share.value * 100) for share in curve], style)
    low = [share.interval[0] * 100 for share in curve]
    high = [share.interval[1] * 100 for share in curve]
    loads = [share.load for share in curve]
    axis.fill_between(loads, low, high, color=style["color"], alpha=0.12, linewidth=0)


def _line(axis: "Axes", points: Sequence[tuple[float, float]], style: Mapping[str, Any]) -> None:
    axis.plot([load for load, _ in points], [value for _, value in points], **style)


def _attainment_axes(axis: "Axes", document: Document, *, title: str) -> None:
    for level in (90, 99):
        axis.axhline(level, color="#666666", linestyle="--", linewidth=0.8, zorder=1.5)
    _axes(axis, document, title=title, unit="%")
    axis.set_ylim(-2, 102)
    axis.set_yticks([0, 20, 40, 60, 80, 90, 100])


def _axes(axis: "Axes", document: Document, *, title: str, unit: str) -> None:
    _plain(axis)
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel(load_words(document), fontsize=9)
    axis.set_ylabel(unit, fontsize=9)
    axis.set_xlim(left=0)


def _plain(axis: "Axes") -> None:
    axis.grid(visible=True, color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8.5)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _log_ms(axis: "Axes") -> None:
    axis.set_yscale("log")
    _plain_numbers(axis.yaxis)


def _plain_numbers(axis: Any) -> None:
    """1, 1.5, 2, 3, 5, 7, 10, 15 ... instead of powers of ten; fewer over many decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    fine = low > 0 and high / low < 30
    subs = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if fine else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _bars(axis: "Axes", shares: Sequence[Share]) -> None:
    values = [share.value * 100 for share in shares]
    colours = ["#009E73" if value >= 90 else "#D55E00" for value in values]
    rows = range(len(shares))
    axis.barh(rows, values, height=0.55, color=colours, alpha=0.85)
    for row, share in zip(rows, shares, strict=True):
        low, high = (bound * 100 for bound in share.interval)
        axis.plot([low, high], [row, row], color="#222222", linewidth=1.2)
        words = f"{share.value * 100:.0f} %  ({share.attained}/{share.offered})"
        axis.text(103, row, words, va="center", fontsize=8.5)
    axis.axvline(90, color="#666666", linestyle="--", linewidth=0.8)
    _plain(axis)
    axis.set_xlim(0, 140)
    axis.set_xticks([0, 20, 40, 60, 80, 100])
    axis.set_xlabel("%", fontsize=9)


def _range(
    axis: "Axes",
    row: int,
    runs: Sequence[Summary],
    *,
    name: str,
    quantity: str,
    target: Mapping[str, Any],
) -> None:
    levels = [mean_curve(runs, _quantile(name, quantity, level)) for level in ("p50", "p90", "p99")]
    if not all(levels):
        return
    p50, p90, p99 = (max(curve[0][1], 0.1) for curve in levels)
    axis.plot([p50, p99], [row, row], color="#0072B2", linewidth=1.2)
    axis.plot([p50, p90], [row, row], color="#0072B2", linewidth=4.5, alpha=0.5)
    axis.plot([p50], [row], color="#0072B2", marker="o", markersize=6)
    axis.plot([p99], [row], color="#0072B2", marker="|", markersize=10)
    bound = target.get(quantity)
    if bound:
        axis.plot([bound, bound], [row - 0.32, row + 0.32], color="#C00000", linewidth=2)


def _legend(figure: "Figure", axis: "Axes", *, columns: int) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=max(1, columns), fontsize=9,
        frameon=False,
    )  # fmt: skip
