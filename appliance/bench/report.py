"""A sweep for a person: one HTML file with everything in it, or one PNG.

The HTML needs nothing beside itself: no script, no font, no picture elsewhere."""

import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from appliance.bench.curves import (
    THRESHOLDS,
    capacities,
    capacity_words,
    class_names,
    class_spread,
)
from appliance.bench.plots import load_words, picture_of
from appliance.metrics.document import Document
from appliance.metrics.score import Summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 78rem; padding: 0 1rem;
       color: #1c1c1c; }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #e3e3e3 }
th { font-weight: 600; background: #f6f6f6 } th:first-child, td:first-child { text-align: left }
.good { color: #00734f } .bad { color: #b03a00 } .void { background: #fff0f0 }
.loud { background: #b00020; color: white; padding: .6rem 1rem; font-weight: 600 }
dl { display: grid; grid-template-columns: max-content auto; gap: .1rem 1rem } dt { color: #555 }
dd { margin: 0 } svg { max-width: 100%; height: auto } p.note { color: #555 }
.wide { overflow-x: auto }
"""
PNG_DPI = 130


class BadReport(ValueError):
    """The name of the report says no form that there is."""


def check_name(path: Path, *, flag: str = "--report") -> None:
    """Raise `BadReport`, which names the flag, unless the name ends in .html or .png."""
    if path.suffix not in (".html", ".png"):
        raise BadReport(f"{flag} {path}: the name must end in .html or .png")


def write_report(path: Path, document: Document) -> None:
    """Write the report of all runs. Raises `BadReport`, and `NoPictures` without matplotlib."""
    check_name(path)
    figures = picture_of(document)
    if path.suffix == ".html":
        path.write_text(html_report(document, figures), encoding="utf-8")
    else:
        path.write_bytes(png_report(figures))


def html_report(document: Document, figures: "Sequence[tuple[str, Figure]]") -> str:
    """The page."""
    spec = document.spec
    title = f"Workload {spec.get('workload', '')} against {spec.get('server', 'a server')}"
    parts = [f"<h1>{escape(title)}</h1>", _facts(document)]
    if any(run.void for run in document.runs):
        parts.append(
            '<p class="loud">Runs marked void say nothing of the server: the client itself was '
            "late (99th percentile above 50 ms). They are in no picture.</p>"
        )
    parts.append(_capacities(document))
    for heading, figure in figures:
        parts += [f"<h2>{escape(heading)}</h2>", _svg(figure)]
    parts.append("<h2>Runs</h2>")
    parts.append(_runs(document))
    for run in document.runs:
        parts.append(f"<h2>{escape(_name(run, document))}: by class</h2>")
        parts.append(_classes(run, document))
    parts.append(f'<p class="note">{NOTES}</p>')
    body = "\n".join(parts)
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


NOTES = (
    "Attained: finished, all tokens, every target held; refused, failed and unanswered requests "
    "are missed. Intervals: Wilson, 95 %. TTFT from the moment of sending. Deadline: first token "
    "in time and 90 % of tokens k by TTFT + k x TPOT. Capacity: the largest load at which "
    "attainment holds, linear between steps."
)


def png_report(figures: "Sequence[tuple[str, Figure]]") -> bytes:
    """All figures below each other in one picture."""
    import numpy as np
    from matplotlib.image import imread, imsave

    pages = []
    for heading, figure in figures:
        figure.suptitle(heading, fontsize=11, fontweight="bold", x=0.01, ha="left")
        page = io.BytesIO()
        figure.savefig(page, format="png", dpi=PNG_DPI)
        page.seek(0)
        pages.append(imread(page, format="png"))
    if not pages:
        raise BadReport("no run that counts: there is nothing to draw")
    width = max(page.shape[1] for page in pages)
    padded = [
        np.pad(page, ((0, 0), (0, width - page.shape[1]), (0, 0)), constant_values=1.0)
        for page in pages
    ]
    out = io.BytesIO()
    imsave(out, np.concatenate(padded), format="png", dpi=PNG_DPI)
    return out.getvalue()


def _svg(figure: "Figure") -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def _facts(document: Document) -> str:
    shown = {key: value for key, value in document.spec.items() if key not in ("classes", "notes")}
    rows = [
        f"<dt>{escape(key)}</dt><dd>{escape(_plain(value))}</dd>" for key, value in shown.items()
    ]
    notes = document.spec.get("notes") or ()
    told = "".join(f'<p class="note">{escape(str(note))}</p>' for note in notes)
    return f"<dl>{''.join(rows)}</dl>{told}"


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _capacities(document: Document) -> str:
    header = ["capacity (" + load_words(document) + ")"]
    header += [f"all, {level:.0%}" for level in THRESHOLDS]
    header += [f"worst class, {level:.0%}" for level in THRESHOLDS]
    rows = [
        [found.policy, *(capacity_words(one) for one in (*found.overall, *found.worst))]
        for found in capacities(document)
    ]
    return _table(header, rows)


def _runs(document: Document) -> str:
    header = (
        "run", "offered", "attained", "95 % interval", "worst class", "deadline", "goodput /s",
        "tokens /s", "TTFT p50", "p99", "TPOT p50", "p99", "late p99", "failed",
    )  # fmt: skip
    rows = [
        [
            _name(run, document),
            f"{run.offered}",
            _share(run.attainment),
            _interval(run.ci95),
            f"{_share(run.worst_class)} {escape(run.worst_class_name)}",
            _share(run.deadline_attainment),
            f"{run.goodput:.2f}",
            f"{run.token_goodput:.0f}",
            _ms(run.ttft_ms.p50),
            _ms(run.ttft_ms.p99),
            _ms(run.tpot_ms.p50),
            _ms(run.tpot_ms.p99),
            _ms(run.lateness_ms.p99),
            escape(f"{run.failed} {f'({run.note})' if run.note else ''}".strip()),
        ]
        for run in document.runs
    ]
    return _table(header, rows, marked=[run.void for run in document.runs])


def _classes(run: Summary, document: Document) -> str:
    header = (
        "class", "offered", "attained", "95 % interval", "deadline", "goodput /s", "TTFT p50",
        "p90", "p99", "TPOT p50", "p90", "p99", "e2e p50", "p99", "missed by",
    )  # fmt: skip
    rows = []
    for name in class_names([run], document.spec):
        one = run.per_class[name]
        ttft = class_spread(run, name, "ttft_ms")
        tpot = class_spread(run, name, "tpot_ms")
        e2e = class_spread(run, name, "e2e_ms")
        missed = ", ".join(f"{why} {count}" for why, count in one.missed.items())
        rows.append(
            [
                escape(name),
                f"{one.offered}",
                _share(one.attainment),
                _interval(one.ci95),
                _share(one.deadline_attainment),
                f"{one.goodput:.2f}",
                *(_ms(value) for value in (ttft.p50, ttft.p90, ttft.p99)),
                *(_ms(value) for value in (tpot.p50, tpot.p90, tpot.p99)),
                *(_ms(value) for value in (e2e.p50, e2e.p99)),
                escape(missed),
            ]
        )
    return _table(header, rows)


def _table(
    header: Iterable[str], rows: Iterable[Iterable[str]], *, marked: Sequence[bool] = ()
) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = []
    for place, row in enumerate(rows):
        kind = ' class="void"' if place < len(marked) and marked[place] else ""
        lines.append(f"<tr{kind}>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>")
    return f'<div class="wide"><table><tr>{top}</tr>{"".join(lines)}</table></div>'


def _name(run: Summary, document: Document) -> str:
    void = " VOID" if run.void else ""
    return f"{run.policy}, {run.load:g} {load_words(document)}, seed {run.seed}{void}"


def _share(value: float) -> str:
    return f'<span class="{"good" if value >= 0.9 else "bad"}">{value:.1%}</span>'


def _interval(bounds: tuple[float, float]) -> str:
    return f"{bounds[0]:.1%} - {bounds[1]:.1%}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}"
