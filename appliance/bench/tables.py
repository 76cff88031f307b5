"""Scores at a terminal."""

from rich.table import Table
from rich.text import Text

from appliance.bench.curves import (
    THRESHOLDS,
    capacities,
    capacity_words,
    class_names,
    class_spread,
)
from appliance.bench.plots import load_words
from appliance.metrics.document import Document
from appliance.metrics.score import Spread, Summary


def heading(run: Summary, document: Document) -> Text:
    """One run in two lines."""
    instances = f", {run.instance_seconds:.0f} instance-seconds" if run.instance_seconds else ""
    text = Text(f"\n{run.load:g} {load_words(document)}, seed {run.seed}: ", style="bold")
    text.append(f"{run.attained} of {run.offered} attained = {run.attainment:.1%}")
    text.append(f" [{run.ci95[0]:.1%}, {run.ci95[1]:.1%}], ")
    text.append(f"worst class {run.worst_class:.1%} ({run.worst_class_name})\n")
    text.append(
        f"goodput {run.goodput:.2f}/s of {run.offered_rate:.2f}/s offered", style="not bold"
    )
    text.append(f", {run.token_goodput:.0f} tokens/s{instances}", style="not bold")
    text.append(f"; client late by {run.lateness_ms.p99 or 0:.1f} ms (p99)", style="not bold")
    if run.note:
        text.append(f"; errors: {run.note}", style="red")
    return text


def class_table(run: Summary, document: Document) -> Table:
    """One line per class; times in milliseconds."""
    table = Table(box=None, pad_edge=False, header_style="cyan")
    table.add_column("class", no_wrap=True)
    for name in ("attained", "interval", "TTFT p50 p99", "TPOT p50 p99 ms"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("missed by")
    for name in class_names([run], document.spec):
        one = run.per_class[name]
        style = "green" if one.attainment >= THRESHOLDS[0] else "red"
        ttft, tpot = (class_spread(run, name, key) for key in ("ttft_ms", "tpot_ms"))
        table.add_row(
            name,
            Text(f"{one.attained}/{one.offered} {one.attainment:>6.1%}", style=style),
            f"{one.ci95[0] * 100:.0f}-{one.ci95[1]:.0%}",
            _pair(ttft),
            _pair(tpot),
            ", ".join(f"{why} {count}" for why, count in one.missed.items()),
        )
    return table


def capacity_table(document: Document) -> Table:
    """Capacity of each policy, overall and of the worst class."""
    table = Table(box=None, pad_edge=False, header_style="cyan")
    table.add_column(f"capacity, {load_words(document)}", no_wrap=True)
    for words in ("all", "worst class"):
        for level in THRESHOLDS:
            table.add_column(f"{words} {level:.0%}", justify="right")
    for found in capacities(document):
        cells = [capacity_words(one) for one in (*found.overall, *found.worst)]
        table.add_row(found.policy, *cells)
    return table


def _pair(spread: Spread) -> str:
    return f"{_ms(spread.p50)} {_ms(spread.p99):>6}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}"
