"""Live sweeps: policies x arrivals x rates x seeds, each run on a server of its own. Resumable.

    python -m tools.sweep_live sweep --devices paced:4@h200-8b --reference 40 \\
        --policies 'hyperflexis@auto,fcfs,round-robin,edf,fcfs@1P3D' \\
        --arrivals poisson,gamma:4,phases:15 --loads 0.4,0.6,0.8,1,1.2,1.5 \\
        --seeds 1 --more-seeds 2,3 --more-at 0.8,1 --out sweep.jsonl
    python -m tools.sweep_live overload --devices paced:4@h200-8b --reference 40 \\
        --policies hyperflexis@auto,edf --out overload.jsonl
    python -m tools.sweep_live relative --devices cpu:2 --reference 12 --length-scale 0.1 \\
        --policies hyperflexis,fcfs --loads 0.5,1 --arrivals poisson --out cpu.jsonl

A rate is a load times `--reference` requests per second. What is in the file already is not run
again; a run that was void (the client was late, or the machine busy) is. Ctrl-C ends it after
cleaning up, and the same command goes on. `--dry-run` says what would be run and how long it takes.
Files beside `--out`: `NAME.d/` with every outcome, for `tools.sweep_report` (tables, intervals,
pictures).

`overload` runs each policy at steady loads, to find the goodput of saturation, and then with three
times the reference for 60 s and half of it afterwards (give the capacity as `--reference`).
`relative` measures the unloaded server first and makes all targets relative to it.
"""

import argparse
import json
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import asdict, replace
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from appliance.metrics.document import append_line
from appliance.policy.choice import parse_choices
from appliance.workload.arrivals import parse_arrivals
from appliance.workload.spec import FIVE, digest, load_spec
from tools.control_kit import machine
from tools.sweep_calibration import calibrated
from tools.sweep_kit import Cores, LiveRun, Plan, Setup, num_workers, read_runs, run_live

START_SECONDS = 6.0
"""What a run takes beside sending and draining, for the first estimate."""
OVERLOAD_SECONDS = 60.0
OVERLOAD = "steps:60x3,{rest:g}x0.5"
DEFAULTS: Mapping[str, tuple[float, tuple[float, ...]]] = {
    "sweep": (75.0, (0.4, 0.6, 0.8, 1.0, 1.2, 1.5)),
    "overload": (180.0, (1.0, 1.5, 2.0)),
    "relative": (75.0, (0.4, 0.6, 0.8, 1.0, 1.2, 1.5)),
}
"""Seconds of a run and loads, by mode."""
SAME = (
    "devices", "reference", "seconds", "warm_up", "workload", "workload_digest", "drain",
    "positions", "max_num_seqs", "max_batch_tokens", "assignments",
)  # fmt: skip
"""What all runs of a file have in common; cores and priority are the machine's business."""


def main() -> None:
    """Run what is missing."""
    for number in (signal.SIGINT, signal.SIGTERM):  # in the background SIGINT may be ignored
        signal.signal(number, signal.default_int_handler)
    options = _options()
    setup = _setup(options)
    done = {run.key for run in read_runs(options.out)}
    plans = [plan for plan in _plans(options, setup) if plan.key not in done]
    console = Console(highlight=False, soft_wrap=True)
    each = setup.seconds + START_SECONDS + 8
    console.print(
        f"{len(done)} runs in {options.out}, {len(plans)} to go, about"
        f" {_clock(each * len(plans))} ({each:.0f} s each)"
    )
    if options.dry_run:
        for plan in plans:
            console.print(f"  {_words(plan)}")
        return
    _describe(options, setup)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left {task.fields[left]}"),
        console=console,
    ) as progress:
        task = progress.add_task("", total=len(plans), left=_clock(each * len(plans)))
        _run_all(plans, setup, options.out, progress, task)


def _run_all(
    plans: Sequence[Plan], setup: Setup, out: Path, progress: Progress, task: TaskID
) -> None:
    began = time.monotonic()
    for place, plan in enumerate(plans):
        progress.update(task, description=_words(plan))
        run = run_live(setup, plan, outcomes_directory=out.with_suffix(".d"))
        append_line(out, run)
        progress.console.print(_line(run))
        mean = (time.monotonic() - began) / (place + 1)
        progress.update(task, advance=1, left=_clock(mean * (len(plans) - place - 1)))


def _plans(options: argparse.Namespace, setup: Setup) -> Iterator[Plan]:
    """Load by load, so that an unfinished sweep can be compared already; the policies next to each
    other, so that what drifts on the machine meets all of them."""
    policies = [choice.word for choice in parse_choices(options.policies)]
    for choice in parse_choices(options.policies):
        choice.role_tuple(num_workers(setup.devices))
    if options.mode == "overload":
        over = OVERLOAD.format(rest=setup.seconds - OVERLOAD_SECONDS)
        kinds = [*(("poisson", load) for load in options.loads), (over, 1.0)]
    else:
        kinds = [(word, load) for word in options.arrivals for load in options.loads]
        kinds.sort(key=lambda kind: kind[1])
    for word, _ in kinds:
        parse_arrivals(word)
    for arrivals, load in kinds:
        for seed in options.seeds:
            for policy in policies:
                yield _plan(options, policy, arrivals, load, seed)
    for arrivals, load in kinds:
        for seed in options.more_seeds if load in options.more_at else ():
            for policy in policies:
                yield _plan(options, policy, arrivals, load, seed)


def _plan(options: argparse.Namespace, policy: str, arrivals: str, load: float, seed: int) -> Plan:
    rate = round(load * options.reference, 4)
    return Plan(policy=policy, arrivals=arrivals, load=load, rate=rate, seed=seed)


def _setup(options: argparse.Namespace) -> Setup:
    cores = Cores(
        server=options.server_cores, workers=options.worker_cores, client=options.client_cores
    )
    setup = Setup(
        devices=options.devices,
        workload=options.workload,
        seconds=options.seconds,
        warm_up=options.warm_up,
        drain=options.drain,
        cores=cores,
        priority=options.priority,
        assignments=tuple(options.set),
    )
    if options.devices.startswith("cpu"):
        setup = replace(setup, max_num_seqs=64, max_batch_tokens=512)
    if options.mode == "relative":
        setup = replace(setup, workload=str(_relative_workload(options, setup)))
    return setup


def _relative_workload(options: argparse.Namespace, setup: Setup) -> Path:
    """A specification beside the results: shorter, with targets relative to this machine. It is
    made once, so that every policy and every resumed sweep has the same targets."""
    path: Path = options.out.with_suffix(".workload.json")
    if path.exists():
        return path
    if load_spec(options.workload) != load_spec("five"):
        raise SystemExit('relative: only the workload "five" can be scaled here')
    table: dict[str, Any] = dict(FIVE) | {
        "length_scale": options.length_scale,
        "max_len": options.max_len,
    }
    table["calibration"] = {"a_ms": 0.0, "b_ms": 0.0, "tpot0_ms": 1.0}
    if not options.dry_run:
        table["calibration"] = calibrated(setup, max_len=options.max_len)
        path.write_text(json.dumps(table, indent=1) + "\n")
        return path
    unmeasured = path.with_suffix(".dry-run.json")
    unmeasured.write_text(json.dumps(table) + "\n")
    return unmeasured


def _describe(options: argparse.Namespace, setup: Setup) -> None:
    """What was asked and on which machine, beside the results. Raises `SystemExit` where the file
    is there and says otherwise; what an older one does not say counts as equal."""
    path = options.out.with_suffix(".setup.json")
    words: Mapping[str, Any] = asdict(setup) | {
        "cores": asdict(setup.cores),
        "reference": options.reference,
        "workload_digest": digest(load_spec(setup.workload)),
        "machine": machine(),
    }
    if path.exists():
        before, now = json.loads(path.read_text()), json.loads(json.dumps(words))
        for name in SAME:
            if name in before and before[name] != now[name]:
                raise SystemExit(
                    f"{options.out} holds runs with {name} = {before[name]!r}, not {now[name]!r}:"
                    " name another file with --out"
                )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(words, indent=1) + "\n")


def _line(run: LiveRun) -> str:
    late = run.lateness_ms.p99 or 0.0
    cpu = "  ".join(f"{name} {share:.0%}" for name, share in run.cpu.items())
    return (
        f"{run.policy:<28} {run.arrivals:<12} {run.rate:6.1f}/s  attained {run.attainment:6.1%}"
        f"  worst {run.worst_class:6.1%} ({run.worst_class_name})  goodput {run.goodput:5.1f}/s"
        f"  late {late:.0f} ms{'  VOID' if run.void else ''}  {cpu}"
    )


def _words(plan: Plan) -> str:
    return f"{plan.policy} {plan.arrivals} {plan.rate:g}/s seed {plan.seed}"


def _clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(",") if part)


def _whole(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def _words_of(text: str) -> tuple[str, ...]:
    """Arrivals with commas between them; a part that begins no arrivals goes on with the last."""
    found: list[str] = []
    for part in text.split(","):
        if found and part.split(":")[0] not in {"poisson", "gamma", "phases", "steps", "trace"}:
            found[-1] += f",{part}"
        else:
            found.append(part)
    return tuple(found)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mode", choices=("sweep", "overload", "relative"))
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE.jsonl")
    add("--devices", required=True)
    add("--policies", required=True, help="words of appliance/policy/choice.py")
    add("--reference", type=float, required=True, help="requests per second at load 1")
    add("--workload", default="five")
    add("--arrivals", type=_words_of, default=("poisson",))
    add("--loads", type=_numbers)
    add("--seeds", type=_whole, default=(1,))
    add("--more-seeds", type=_whole, default=(), help="at the loads of --more-at")
    add("--more-at", type=_numbers, default=())
    add("--seconds", type=float)
    add("--warm-up", type=float, default=10.0)
    add("--drain", type=float, default=120.0)
    add("--server-cores", type=_whole, default=(0,))
    add("--worker-cores", type=_whole, default=(0, 1))
    add("--client-cores", type=_whole, default=(1,))
    add("--priority", type=int, default=0, help="autogroup nice value of server and workers")
    add("--length-scale", type=float, default=0.1, help="relative: of all lengths")
    add("--max-len", type=int, default=3072, help="relative: longest prompt and answer")
    add("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    add("--dry-run", action="store_true")
    options = parser.parse_args()
    seconds, loads = DEFAULTS[options.mode]
    options.seconds = seconds if options.seconds is None else options.seconds
    options.loads = loads if options.loads is None else options.loads
    return options


if __name__ == "__main__":
    main()
