"""What the control plane costs: the real server, workers of the paced engine, a client process.

    python -m tools.bench_control rate     do paced workers keep their profile's rate behind it?
    python -m tools.bench_control stream   CPU per token against a bare aiohttp write loop
    python -m tools.bench_control full     8 workers x 256 streams, 50 and 100 steps a second

All ratios come from one run, side by side and in turns. Where processes are pinned is part of each
result. The figures are in docs/results/control-plane.md.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from tools.control_kit import ROOT, Client, cpu_seconds, end, free_port, machine, pin, prefer
from tools.control_measure import ALL_CORES, MODEL, Load, measure
from tools.control_probe import long_model

POSITIONS = 131_072
Run = dict[str, Any]


def rate(options: argparse.Namespace) -> Run:
    """Two workers at the pace of a card, everything on all cores."""
    load = Load(
        num_workers=2,
        profile=options.profile,
        num_streams=options.streams,
        prompt_tokens=100,
        seconds=options.seconds,
        priority=options.priority,
    )
    return {"load": msgspec.to_builtins(load), **measure(load)}


def stream(options: argparse.Namespace) -> Run:
    """Ours, then both forms of the bare loop with chunks of the same size."""
    load = Load(
        num_workers=options.workers,
        profile=f"fixed-{1000 / options.rate:.3f}ms",
        num_streams=options.streams,
        seconds=options.seconds,
        priority=options.priority,
        server_cores=(0,),
        worker_cores=(1,),
        client_cores=(1,),
        assignments=tuple(options.set),
    )
    ours = measure(load)
    chunk_bytes = round(ours["client"]["bytes"] / ours["client"]["chunks"])
    result: Run = {"load": msgspec.to_builtins(load), "chunk_bytes": chunk_bytes, **ours}
    for mode in ("loop", "handlers"):
        bare = measure_bare(load, rate=options.rate, chunk_bytes=chunk_bytes, mode=mode)
        result[f"bare_{mode}_us_per_token"] = bare
        result[f"ratio_to_{mode}"] = ours["server_us_per_token"] / bare
    return result


def measure_bare(load: Load, *, rate: float, chunk_bytes: int, mode: str) -> float:
    """Microseconds of server CPU per chunk of the bare loop."""
    port = free_port()
    command = [
        sys.executable, "-m", "tools.control_bare", "--port", str(port), "--rate", str(rate),
        "--chunk-bytes", str(chunk_bytes), "--mode", mode,
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        time.sleep(2.0)
        pin(process.pid, load.server_cores)
        spec = {
            "port": port,
            "num_streams": load.num_streams,
            "prompt_tokens": load.prompt_tokens,
            "max_tokens": 1,
            "sampled": load.num_streams,
        }
        client = Client(spec, cores=load.client_cores)
        client.wait_steady()
        time.sleep(1.0)
        used, begun = cpu_seconds(process.pid), time.monotonic()
        time.sleep(load.seconds)
        used, ended = cpu_seconds(process.pid) - used, time.monotonic()
        window = {"begin": begun, "end": ended, "schedule": [], "anchor_seconds": 1.0}
        figures = client.stop(window)
    finally:
        end(process)
    return 1e6 * used / float(figures["window_chunks"])


def full(options: argparse.Namespace) -> Run:
    """Eight workers with 256 streams each."""
    load = Load(
        num_workers=options.workers,
        profile=f"fixed-{1000 / options.rate:g}ms",
        num_streams=options.workers * options.streams,
        sampled=options.sampled,
        sweep_seconds=0.1,
        spare=64,
        seconds=options.seconds,
        priority=options.priority,
        worker_priority=options.worker_priority,
        server_cores=(0,),
        worker_cores=ALL_CORES if options.free_workers else (1,),
        client_cores=(1,),
        assignments=tuple(options.set),
        probe=True,
        long_prompt=options.long_prompt,
        slo_class=options.slo_class,
    )
    if not options.long_prompt:
        return {"load": msgspec.to_builtins(load), **measure(load)}
    with long_model(MODEL, positions=POSITIONS) as directory:
        load = msgspec.structs.replace(load, model_dir=str(directory))
        return {"load": msgspec.to_builtins(load), **measure(load)}


def repeat(measured: Callable[[argparse.Namespace], Run], options: argparse.Namespace) -> list[Run]:
    """All repeats, each shown as it ends."""
    runs = []
    for number in range(options.repeats):
        run = measured(options)
        print(json.dumps({"run": number, **run}), file=sys.stderr, flush=True)
        runs.append(run)
    return runs


def write(runs: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> None:
    """Print all runs, and keep them if asked."""
    text = json.dumps({"command": sys.argv[1:], "machine": machine(), "runs": runs}, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, measured, streams, steps, seconds in (
        ("rate", rate, 64, 0.0, 12.0),
        ("stream", stream, 64, 30.0, 12.0),
        ("full", full, 256, 50.0, 12.0),
    ):
        command = commands.add_parser(name)
        command.set_defaults(measured=measured)
        command.add_argument("--streams", type=int, default=streams, help="full: of each worker")
        command.add_argument("--rate", type=float, default=steps, help="steps a second")
        command.add_argument("--seconds", type=float, default=seconds)
        command.add_argument("--profile", default="h200-8b", help="rate: of the workers")
        command.add_argument("--workers", type=int, default=8 if name == "full" else 1)
        command.add_argument("--sampled", type=int, default=64, help="full: read at once")
        command.add_argument("--long-prompt", type=int, default=0, help="full: tokens of it")
        command.add_argument("--slo-class", default="")
        command.add_argument(
            "--free-workers", action="store_true", help="full: workers on all cores"
        )
        command.add_argument("--set", action="append", default=[], help="of the server")
        command.add_argument(
            "--priority", type=int, default=0, help="autogroup nice value of all processes"
        )
        command.add_argument(
            "--worker-priority", type=int, default=0, help="full: of the workers, beyond that"
        )
        command.add_argument("--repeats", type=int, default=3)
        command.add_argument("--json", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are ended
    if options.priority:
        os.setsid()  # a scheduling group of its own, which clients and the bare loop inherit
        prefer(os.getpid(), options.priority)
    write(repeat(options.measured, options), options)


if __name__ == "__main__":
    main()
