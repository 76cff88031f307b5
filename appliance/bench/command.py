"""`appliance bench`: from the arguments to runs, a table, a document and a report.

Exit codes: 0 measured; 1 the server cannot be reached (any more: the run under way is not kept) or
does not take such requests; 2 the arguments cannot be used; 3 a run is void because this client was
late; 130 interrupted (what was measured until then is in the document).
"""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import uvloop
from rich.console import Console
from rich.markup import escape

from appliance.bench.calibrate import calibrate
from appliance.bench.connection import Pool
from appliance.bench.loop import LoopSettings
from appliance.bench.options import (
    BadOptions,
    add_options,
    document_spec,
    fitted_offer,
    key_of,
    offer_of,
)
from appliance.bench.plots import NoPictures
from appliance.bench.points import (
    Offer,
    Point,
    earlier_runs,
    is_done,
    items_of,
    known_calibration,
    points_of,
    slos_of,
)
from appliance.bench.progress import Progress
from appliance.bench.report import BadReport, write_report
from appliance.bench.session import only_new, policy_of, run_point
from appliance.bench.tables import capacity_table, class_table, heading
from appliance.bench.target import Address, BenchError, Target, address_of, probe
from appliance.metrics.document import Document, append_lines, write_document
from appliance.metrics.score import VOID_LATENESS, Summary
from appliance.workload.arrivals import ArrivalsError
from appliance.workload.traces import TraceError

FILE_WIDTH = 120
"""Columns of what is not written to a terminal."""
OK, FAILED, BAD_ARGUMENTS, VOID = 0, 1, 2, 3


def main(arguments: Sequence[str]) -> int:
    """The command with its arguments; the exit code."""
    parser = argparse.ArgumentParser(
        prog="appliance bench",
        description="Offer an open-loop workload to a server and score its answers by class.",
    )
    add_options(parser)
    return run(parser.parse_args(arguments))


def run(options: argparse.Namespace) -> int:
    """The whole command; its exit code."""
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console = Console(highlight=False, soft_wrap=True, width=FILE_WIDTH)
    try:
        offer = offer_of(options)
        address = address_of(options.url, key=key_of(options))
        points = points_of(offer, rates=options.rate, loads=options.load, seeds=options.seed)
        for point in points:
            items_of(offer, point)  # what cannot be offered is told before anything is sent
    except (BadOptions, BenchError, ArrivalsError, TraceError) as error:
        return _last_line(error, code=BAD_ARGUMENTS)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            document, void = runner.run(
                _measure(options, offer, address=address, points=points, console=console)
            )
        if options.report is not None:
            _report(options.report, document, console)
    except (BenchError, ArrivalsError, TraceError, BadReport, NoPictures) as error:
        return _last_line(error, code=FAILED)
    return VOID if void else OK


def _last_line(error: Exception, *, code: int) -> int:
    sys.stderr.write(f"appliance bench: {error}\n")
    return code


async def _measure(
    options: argparse.Namespace,
    offer: Offer,
    *,
    address: Address,
    points: Sequence[Point],
    console: Console,
) -> tuple[Document, bool]:
    """All points that are missing; the document, and whether a run of them is void."""
    pool = Pool(address.url)
    try:
        target = await probe(
            pool,
            address,
            slos=slos_of(offer, points),
            model=options.model,
            natural=options.natural,
            tell_targets=not options.no_slo,
        )
        policy = options.policy_name or await policy_of(pool, target)
        offer, notes = fitted_offer(offer, target, max_len=options.max_len)
        if options.calibrate:
            known = known_calibration(options.json) if options.resume else None
            calibration = await calibrate(pool, target) if known is None else known
            offer = msgspec.structs.replace(offer, calibration=calibration)
        notes = [*target.notes, *notes]
        spec = document_spec(options, offer, target, notes=notes, policy=policy)
        document = earlier_runs(options.json, Document(spec=spec, runs=()), resume=options.resume)
        _say_what(console, target, offer, policy=policy, notes=notes)
        return await _sweep(
            pool, target, options, offer=offer, points=points, document=document, policy=policy,
            console=console,
        )  # fmt: skip
    finally:
        await pool.close()


async def _sweep(
    pool: Pool,
    target: Target,
    options: argparse.Namespace,
    *,
    offer: Offer,
    points: Sequence[Point],
    document: Document,
    policy: str,
    console: Console,
) -> tuple[Document, bool]:
    settings = LoopSettings(timeout=options.timeout, drain=options.drain, natural=options.natural)
    progress = Progress(console, seconds=offer.seconds)
    void = False
    for point in points:
        if is_done(point, document.runs, policy=policy):
            console.print(f"{point.words}: measured before, skipped")
            continue
        showing = asyncio.get_running_loop().create_task(progress.show())
        try:
            found = await run_point(
                pool, target, offer=offer, point=point, settings=settings, policy=policy,
                watcher=progress,
            )  # fmt: skip
        finally:
            showing.cancel()
            await asyncio.gather(showing, return_exceptions=True)
        if options.outcomes is not None:
            append_lines(options.outcomes, found.outcomes)
        document = msgspec.structs.replace(document, runs=only_new(document.runs, found.summary))
        if options.json is not None:
            write_document(options.json, document)
        _say_run(console, found.summary, document)
        void = void or found.summary.void
    console.print(capacity_table(document))
    if options.json is not None:
        console.print(f"scores: {escape(str(options.json))}")
    return document, void


def _say_what(
    console: Console, target: Target, offer: Offer, *, policy: str, notes: Sequence[str]
) -> None:
    console.print(
        f"[bold]{escape(target.settings.model)}[/bold] at {target.address.url}, policy "
        f"{escape(policy)}: workload {escape(offer.spec.name)}, {target.settings.route}"
    )
    span = "the whole trace" if offer.seconds is None else f"{offer.seconds:g} s a run"
    console.print(f"  {span}, the first {offer.warm_up:g} s do not count")
    if (found := offer.calibration) is not None:
        console.print(
            f"  unloaded: TTFT {found.a * 1000:.1f} ms + {found.b * 1e6:.1f} us per prompt token, "
            f"TPOT {found.tpot0 * 1000:.2f} ms; targets are relative to that"
        )
    for note in notes:
        console.print(f"  [yellow]{escape(note)}[/yellow]")


def _say_run(console: Console, summary: Summary, document: Document) -> None:
    console.print(heading(summary, document))
    console.print(class_table(summary, document))
    if summary.void:
        late = summary.lateness_ms.p99 or 0.0
        console.print(
            f"[bold white on red] VOID [/] this client sent too late (99th percentile {late:.0f} "
            f"ms, above {VOID_LATENESS * 1000:.0f} ms): the run says nothing of the server. Give "
            "the client a core of its own, or lower the rate."
        )


def _report(path: Path, document: Document, console: Console) -> None:
    if not any(not run.void for run in document.runs):
        console.print("no run that counts: no report is written")
        return
    write_report(path, document)
    console.print(f"report: {escape(str(path))}")
