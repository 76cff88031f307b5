"""How well step times are predicted while a real server computes a mixed load.

    python -m tools.bench_predictor [--devices cpu:1 cpu:2] [--seconds 25] [--json OUT]

For each device list a server is started and gets Poisson arrivals of four kinds of request (short
and long prompts, short and long answers), with a burst in the middle, so that steps of every kind
occur: decode only, prefill only, both. The server keeps its journal in a file; each step in it is
predicted *before* the models see it (prequential), by models that begin with the built-in guess:

    worker   one model per worker, as its Batcher has it
    node     one model for all workers, as the Dispatcher has it
    mean     the running mean of the worker's steps, for comparison

    hindsight  the median of all steps of the run that were alike (same batch, contexts within 128
               tokens, chunks within 64; at least ten of them): what is left is noise

The relative error is |predicted - seen| / seen, over all steps but the first `--skip` of each
worker; `tail` is the share of steps within `tail_seconds`.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp

from appliance.core.step_model import StepModel
from tools.bench_start import ROOT, free_port

KINDS = ((0.4, 40, 24), (0.3, 200, 64), (0.2, 700, 32), (0.1, 60, 200))
"""Share, mean prompt tokens, mean answer tokens."""


class Step(NamedTuple):
    """What a worker reported of one step."""

    worker: int
    prefill_tokens: int
    prefill_pairs: int
    decodes: int
    context_tokens: int
    elapsed: float

    @property
    def prefix_tokens(self) -> int:
        """Tokens before the chunk, if it is one chunk."""
        n = self.prefill_tokens
        return max(0, round(self.prefill_pairs / n - (n + 1) / 2)) if n else 0

    def counts(self) -> dict[str, int]:
        """As a model is asked."""
        return {
            "prefill_tokens": self.prefill_tokens,
            "prefix_tokens": self.prefix_tokens,
            "decodes": self.decodes,
            "context_tokens": self.context_tokens,
        }

    @property
    def kind(self) -> str:
        """Which phases it computes."""
        if not self.prefill_tokens:
            return "decode"
        return "mixed" if self.decodes else "prefill"


class _Row(NamedTuple):
    """Errors of one step."""

    kind: str
    worker: float
    node: float
    mean: float
    hindsight: float | None
    tail: bool


def run_server(devices: str, *, journal: Path, seconds: float, rate: float) -> None:
    """Serve the load, with the journal in that file."""
    port = free_port()
    words = ["--devices", devices, "--port", str(port), "--set", f"journal.path={journal}"]
    server = subprocess.Popen(
        [sys.executable, "-m", "appliance", "start", *words],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        asyncio.run(_load(f"http://127.0.0.1:{port}", seconds=seconds, rate=rate))
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


async def _load(url: str, *, seconds: float, rate: float) -> None:
    rng = random.Random(1)
    async with aiohttp.ClientSession() as session:
        for _ in range(600):
            with suppress(aiohttp.ClientError):
                async with session.get(f"{url}/ready") as reply:
                    if reply.status == 200:
                        break
            await asyncio.sleep(0.1)
        began, tasks, due = time.monotonic(), [], 0.0
        while due < seconds:
            await asyncio.sleep(max(0.0, began + due - time.monotonic()))
            tasks.append(asyncio.create_task(_ask(session, url, rng)))
            burst = 3.0 if 0.4 < due / seconds < 0.6 else 1.0
            due += rng.expovariate(rate * burst)
        await asyncio.gather(*tasks)


async def _ask(session: aiohttp.ClientSession, url: str, rng: random.Random) -> None:
    weights = [share for share, _, _ in KINDS]
    ((_, prompt, answer),) = rng.choices(KINDS, weights)
    body = {
        "model": "tiny-tasks",
        "prompt": [rng.randrange(8, 1000) for _ in range(_length(rng, prompt))],
        "max_tokens": _length(rng, answer),
        "ignore_eos": True,
        "temperature": 0,
    }
    async with session.post(f"{url}/v1/completions", json=body) as reply:
        await reply.read()
        if reply.status != 200:
            raise RuntimeError(f"{reply.status} {await reply.text()}")


def _length(rng: random.Random, mean: int) -> int:
    return max(4, min(1500, round(rng.lognormvariate(0, 0.5) * mean)))


def read_steps(journal: Path) -> list[Step]:
    """The steps in a journal, in the order in which the node heard of them."""
    steps = []
    with journal.open("rb") as lines:
        for line in lines:
            entry = json.loads(line)
            report = entry[3] if isinstance(entry, list) else {}
            if report.get("t") == "StepReported":
                steps.append(
                    Step(
                        report["worker"],
                        report["prefill_tokens"],
                        report.get("prefill_pairs", 0),
                        report["decode_tokens"],
                        report.get("context_tokens", 0),
                        report["elapsed"],
                    )
                )
    return steps


def judge(steps: Sequence[Step], *, skip: int) -> dict[str, Any]:
    """Errors of the three predictors over these steps."""
    own: dict[int, StepModel] = {}
    node = StepModel()
    alike = _medians(steps)
    means: dict[int, float] = {}
    seen: dict[int, int] = {}
    rows: list[_Row] = []
    for step in steps:
        model = own.setdefault(step.worker, StepModel())
        counts, elapsed = step.counts(), step.elapsed
        if seen.get(step.worker, 0) >= skip:
            median = alike.get(_like(step))
            rows.append(
                _Row(
                    step.kind,
                    abs(model.seconds(**counts) / elapsed - 1),
                    abs(node.seconds(**counts) / elapsed - 1),
                    abs(means[step.worker] / elapsed - 1),
                    None if median is None else abs(median / elapsed - 1),
                    model.tail_seconds(**counts) >= elapsed,
                )
            )
        for learner in (model, node):
            learner.observe(
                prefill_tokens=step.prefill_tokens,
                prefill_pairs=step.prefill_pairs,
                decodes=step.decodes,
                context_tokens=step.context_tokens,
                elapsed=elapsed,
            )
        old = means.get(step.worker, elapsed)
        means[step.worker] = old + 0.1 * (elapsed - old)
        seen[step.worker] = seen.get(step.worker, 0) + 1
    kinds = sorted({row.kind for row in rows})
    result = {kind: _summary([row for row in rows if row.kind == kind]) for kind in kinds}
    return {"all": _summary(rows), **result}


def _like(step: Step) -> tuple[int, ...]:
    """What steps that are alike have in common."""
    context = step.context_tokens // (128 * step.decodes) if step.decodes else 0
    return step.prefill_tokens // 64, step.prefix_tokens // 128, step.decodes, context


def _medians(steps: Sequence[Step]) -> dict[tuple[int, ...], float]:
    groups: dict[tuple[int, ...], list[float]] = {}
    for step in steps:
        groups.setdefault(_like(step), []).append(step.elapsed)
    return {key: statistics.median(group) for key, group in groups.items() if len(group) >= 10}


def _summary(rows: Sequence[_Row]) -> dict[str, Any]:
    result: dict[str, Any] = {"steps": len(rows)}
    for name in ("worker", "node", "mean", "hindsight"):
        values = (getattr(row, name) for row in rows)
        errors = sorted(float(value) for value in values if value is not None)
        if not errors:
            continue
        result[name] = {
            "mean": round(sum(errors) / len(errors), 4),
            "p50": round(errors[len(errors) // 2], 4),
            "p90": round(errors[len(errors) * 9 // 10], 4),
        }
    result["tail"] = round(sum(row.tail for row in rows) / len(rows), 4)
    return result


def _print(devices: str, result: Mapping[str, Any]) -> None:
    for kind, row in result.items():
        words = "  ".join(
            f"{name} {row[name]['mean']:6.1%} / {row[name]['p50']:6.1%} / {row[name]['p90']:6.1%}"
            for name in ("worker", "node", "mean", "hindsight")
            if name in row
        )
        print(f"{devices:6} {kind:8} {row['steps']:6} steps  {words}  tail {row['tail']:.1%}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--devices", nargs="+", default=["cpu:1", "cpu:2"])
    parser.add_argument("--seconds", type=float, default=25.0)
    parser.add_argument("--rate", type=float, default=25.0, help="requests per second and worker")
    parser.add_argument("--skip", type=int, default=100)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--journals", type=Path, help="keep (or, with --seconds 0, read) them here")
    args = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        directory = args.journals or Path(name)
        for devices in args.devices:
            journal = directory / f"{devices.replace(':', '-')}.jsonl"
            if args.seconds:
                workers = int(devices.partition(":")[2].partition("@")[0] or 1)
                rate = args.rate * workers
                run_server(devices, journal=journal, seconds=args.seconds, rate=rate)
            results[devices] = judge(read_steps(journal), skip=args.skip)
            _print(devices, results[devices])
    if args.json:
        document = {
            "command": "python -m tools.bench_predictor "
            f"--devices {' '.join(args.devices)} --seconds {args.seconds:g} --rate {args.rate:g}",
            "machine": f"{os.cpu_count()} x {platform.machine()}",
            "skip": args.skip,
            "columns": "mean, median and 90th percentile of |predicted - seen| / seen",
            "results": results,
        }
        args.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
