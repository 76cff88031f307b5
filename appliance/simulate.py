"""`appliance simulate`: a sweep over policies and loads on a machine that is not here.

The same schedulers and policies as in the product, a virtual clock, and a world that alone knows
how long answers are (`appliance.sim`). Every point is a run of its own, so they may run in several
processes; results do not depend on how many.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from math import isfinite
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any

from msgspec import to_builtins
from msgspec.structs import asdict, replace
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from appliance.bench.curves import THRESHOLDS, capacities, capacity_words
from appliance.bench.plots import NoPictures
from appliance.bench.report import BadReport, check_name, write_report
from appliance.metrics.document import (
    Document,
    DocumentError,
    check_output,
    holds_results,
    write_document,
)
from appliance.metrics.score import EmptySpan
from appliance.policy.settings import PolicySettingsError
from appliance.sim.machine import WEIGHT_SOURCES, Machine, UnknownMachine, parse_machine
from appliance.sim.simulation import Ablation
from appliance.sim.sweep import (
    Point,
    PointResult,
    Sweep,
    calibration_of,
    counted_span,
    items_of,
    parse_policies,
    points,
    reference_for,
    run_point,
)
from appliance.workload.arrivals import ArrivalsError, parse_arrivals
from appliance.workload.spec import SpecError, WorkloadSpec, class_slos, load_spec
from appliance.workload.traces import TraceError, read_trace

LOADS = "0.5,0.7,0.9,1.0,1.1,1.3"
WORST = 0.9
"""Attainment below this is shown in red."""


class CannotSimulate(Exception):
    """What was asked for cannot be understood. The message names the flag and the fix."""


MISTAKES = (
    CannotSimulate,
    BadReport,
    DocumentError,
    EmptySpan,
    PolicySettingsError,
    UnknownMachine,
    SpecError,
    ArrivalsError,
    TraceError,
)
"""What is answered with one line and exit code 2."""


def main(arguments: Sequence[str]) -> int:
    """Run the command; its exit code."""
    return _simulate(_parser().parse_args(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="appliance simulate", description="Try policies on a machine that is not here."
    )
    add = parser.add_argument
    add("--workload", default="five", metavar="W", help='"five" or a file (TOML, JSON)')
    add("--policy", default="fcfs", metavar="P,P", help="NAME[@ROLES][{key=value}], several")
    add("--devices", default="h200:8", metavar="D", help="h200:8, paced:8@h200-8b or cpu:2")
    add("--trace", metavar="FILE", help="arrivals, lengths and prefixes of a recorded trace")
    add("--load", default=LOADS, metavar="X,X", help="loads relative to the reference rate")
    add("--rate", metavar="R,R", help="requests per second instead of loads")
    add("--seconds", type=float, default=60.0, metavar="S", help="how long requests arrive")
    add("--arrivals", metavar="A", help="poisson, gamma:4, phases:20 or steps:60x3,60x0.5")
    add("--seed", default="0", metavar="N,N", help="seeds of the workload and of step times")
    add("--json", required=True, metavar="OUT", help="file for the results")
    add("--plot", metavar="OUT", help="file for pictures (.png) or a report (.html)")
    add("--jobs", type=int, default=1, metavar="N", help="processes")
    add("--without", default="", metavar="X,X", help="ablations: " + ", ".join(_ablations()))
    add("--weights", choices=WEIGHT_SOURCES, help="where workers get their weights from")
    add("--standby", type=int, default=0, metavar="N", help="further workers that begin parked")
    add("--spares", type=int, default=0, metavar="N", help="workers that may be started")
    add("--noise", type=float, metavar="S", help="sigma of the noise of step times")
    add("--relative", action="store_true", help="targets relative to an unloaded worker")
    add("--length-scale", type=float, metavar="F", help="multiplies all lengths")
    add("--slo-scale", type=float, metavar="F", help="multiplies all targets")
    add("--max-tokens", type=int, metavar="N", help="what requests ask for (0: their length)")
    add("--max-num-seqs", type=int, metavar="N", help="sequences of a step")
    add("--max-batch-tokens", type=int, metavar="N", help="tokens of a step")
    add("--max-model-len", type=int, metavar="N", help="longest prompt and answer")
    add("--validate", action="store_true", help="check the schedulers' laws (slow)")
    return parser


def _simulate(options: argparse.Namespace) -> int:
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=140)
    try:
        sweep, todo = _plan(options)
        _say_plan(console, sweep, todo)
        began = perf_counter()
        results = _run(sweep, todo, jobs=max(1, options.jobs), console=console)
    except MISTAKES as error:
        sys.stderr.write(f"appliance: {error}\n")
        return 2
    seconds = perf_counter() - began
    document = _document(options, sweep, todo, results=results)
    write_document(Path(options.json), document)
    console.print(_table(results))
    console.print()
    tokens = sum(result.counts["tokens"] for result in results)
    console.print(
        f"{len(results)} runs, {tokens:,} tokens in {seconds:.1f} s "
        f"({seconds / max(1, tokens) * 1e6:.1f} microseconds a token); results in {options.json}"
    )
    _show_capacities(console, document)
    if options.plot:
        try:
            write_report(Path(options.plot), document)
        except NoPictures as error:
            sys.stderr.write(f"appliance: {error}\n")
            return 1
        console.print(f"picture in {options.plot}")
    return 0


# --- what is asked for ----------------------------------------------------------------------------


def _plan(options: argparse.Namespace) -> tuple[Sweep, list[Point]]:
    _check_outputs(options)
    machine = _machine(options)
    spec = _spec(options, machine)
    rows = tuple(read_trace(Path(options.trace))) if options.trace else ()
    arrivals = options.arrivals or spec.arrivals
    parse_arrivals(arrivals)
    if not (isfinite(options.seconds) and options.seconds > 0):
        raise CannotSimulate("--seconds must be a finite number above 0")
    sweep = Sweep(
        spec=spec,
        machine=machine,
        arrivals=arrivals,
        seconds=options.seconds,
        reference=1.0,
        rows=rows,
        calibration=calibration_of(machine) if options.relative else None,
        ablation=_ablation(options.without),
        validate=options.validate,
    )
    sweep = replace(sweep, reference=reference_for(sweep))
    loads = _numbers(options.load, "--load")
    if options.rate:
        loads = [rate / sweep.reference for rate in _numbers(options.rate, "--rate")]
    seeds = [int(seed) for seed in _numbers(options.seed, "--seed", least=-1e18)]
    choices = parse_policies(options.policy, machine.num_workers)
    for seed in seeds:  # the emptiest runs, so that nothing is told only after hours
        counted_span(sweep, items_of(sweep, load=min(loads), seed=seed), load=min(loads))
    return sweep, points(choices, loads, seeds)


def _check_outputs(options: argparse.Namespace) -> None:
    """Earlier results are written over, since the same flags give the same ones; nothing else."""
    out = Path(options.json)
    check_output(out, flag="--json")
    if out.exists() and not holds_results(out):
        raise CannotSimulate(f"--json {out}: exists and holds no results; name another file")
    if options.plot:
        check_name(Path(options.plot), flag="--plot")
        check_output(Path(options.plot), flag="--plot")


def _machine(options: argparse.Namespace) -> Machine:
    wanted = {
        "weights_from": options.weights,
        "num_standby": options.standby,
        "num_spares": options.spares,
        "noise": options.noise,
        "max_num_seqs": options.max_num_seqs,
        "max_batch_tokens": options.max_batch_tokens,
        "max_model_len": options.max_model_len,
    }
    return parse_machine(options.devices, **{k: v for k, v in wanted.items() if v is not None})


def _spec(options: argparse.Namespace, machine: Machine) -> WorkloadSpec:
    spec = load_spec(options.workload)
    wanted = {
        "length_scale": options.length_scale,
        "slo_scale": options.slo_scale,
        "max_tokens": options.max_tokens,
    }
    spec = replace(spec, **{k: v for k, v in wanted.items() if v is not None})
    longest = machine.max_model_len
    return replace(spec, max_len=min(spec.max_len, longest) if spec.max_len else longest)


def _ablations() -> list[str]:
    return [name.replace("_", "-") for name in asdict(Ablation())]


def _ablation(text: str) -> Ablation:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in _ablations():
            raise CannotSimulate(f"--without {name}: known: {', '.join(_ablations())}")
    return Ablation(**{name.replace("-", "_"): True for name in names})


def _numbers(text: str, flag: str, *, least: float = 0.0) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise CannotSimulate(f"{flag} {text}: write numbers with commas between them") from error
    if not all(isfinite(number) and number > least for number in numbers):
        raise CannotSimulate(f"{flag} {text}: numbers must be finite and above {least:g}")
    return numbers


# --- running --------------------------------------------------------------------------------------


def _run(sweep: Sweep, todo: Sequence[Point], *, jobs: int, console: Console) -> list[PointResult]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    found: dict[int, PointResult] = {}
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("simulating", total=len(todo))
        for number, result in _results(sweep, todo, jobs):
            found[number] = result
            progress.update(task, advance=1, description=_words(todo[number]))
    return [found[number] for number in range(len(todo))]


def _results(sweep: Sweep, todo: Sequence[Point], jobs: int) -> Iterator[tuple[int, PointResult]]:
    if jobs == 1:
        for number, point in enumerate(todo):
            yield number, run_point(sweep, point)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        waiting: dict[Future[PointResult], int] = {
            pool.submit(run_point, sweep, point): number for number, point in enumerate(todo)
        }
        while waiting:
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                yield waiting.pop(future), future.result()


# --- telling --------------------------------------------------------------------------------------


def _words(point: Point) -> str:
    return f"{point.choice.word} at load {point.load:g}"


def _say_plan(console: Console, sweep: Sweep, todo: Sequence[Point]) -> None:
    machine = sweep.machine
    lines = [
        ("machine", f"{machine.name}: {machine.num_workers} workers, {machine.profile.note}"),
        ("", f"{machine.kv_tokens:,} KV tokens each, noise {machine.noise:g}"),
        ("workload", f"{sweep.spec.name}, {sweep.arrivals if not sweep.rows else 'trace'}"),
        ("load 1", f"{sweep.reference:.2f} requests/s: all workers busy with full steps"),
        ("points", f"{len(todo)}"),
    ]
    for label, words in lines:
        console.print(f"  [cyan]{label:9}[/cyan] {words}", soft_wrap=True)


def _document(
    options: argparse.Namespace,
    sweep: Sweep,
    todo: Sequence[Point],
    *,
    results: Sequence[PointResult],
) -> Document:
    machine: dict[str, Any] = to_builtins(sweep.machine)
    spec: dict[str, Any] = {
        "simulated": True,
        "workload": to_builtins(sweep.spec),
        "trace": Path(options.trace).name if options.trace else "",
        "arrivals": sweep.arrivals,
        "seconds": sweep.seconds,
        "reference_rate": sweep.reference,
        "load_is": "load relative to the reference rate",
        "classes": {
            name: {"ttft_ms": _milli(slo.ttft), "tpot_ms": _milli(slo.tpot)}
            for name, slo in class_slos(sweep.spec).items()
        },
        "machine": machine,
        "ablation": to_builtins(sweep.ablation),
        "points": [
            {
                "policy": point.choice.word,
                "load": point.load,
                "seed": point.seed,
                "extras": to_builtins(result.extras),
                "recoveries": to_builtins(result.recoveries),
            }
            for point, result in zip(todo, results, strict=True)
        ],
    }
    return Document(spec=spec, runs=tuple(result.summary for result in results))


def _table(results: Sequence[PointResult]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("policy", "load", "seed"):
        table.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
    for name in (
        "req/s",
        "attained",
        "worst class",
        "goodput",
        "TTFT p50",
        "p99",
        "TPOT p50",
        "p99",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("instance s", justify="right")
    for result in results:
        run = result.summary
        table.add_row(
            run.policy,
            f"{run.load:.2f}",
            str(run.seed),
            f"{run.offered_rate:.1f}",
            f"[{_style(run.attainment)}]{run.attainment:.1%}[/]",
            f"[{_style(run.worst_class)}]{run.worst_class:.1%}[/] {run.worst_class_name}",
            f"{run.goodput:.1f}",
            _ms(run.ttft_ms.p50),
            _ms(run.ttft_ms.p99),
            _ms(run.tpot_ms.p50),
            _ms(run.tpot_ms.p99),
            f"{run.instance_seconds:,.0f}",
        )
    return table


def _milli(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1000


def _show_capacities(console: Console, document: Document) -> None:
    if len({run.load for run in document.runs}) < 2:
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("capacity (load)", no_wrap=True)
    for level in THRESHOLDS:
        table.add_column(f"worst class >= {level:.0%}", justify="right")
        table.add_column(f"all >= {level:.0%}", justify="right")
    for each in capacities(document):
        cells = [
            capacity_words(found)
            for pair in zip(each.worst, each.overall, strict=True)
            for found in pair
        ]
        table.add_row(each.policy, *cells)
    console.print(table)
    console.print()


def _style(share: float) -> str:
    return "red" if share < WORST else "green"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
