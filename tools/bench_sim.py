"""How fast the simulator is: a million output tokens on eight devices, on one core.

python -m tools.bench_sim [--policy fcfs,hyperflexis] [--load 1] [--json OUT]

Processor time of one process, the generation of the workload not counted. With `--profile` what
takes it, by package of the code: the figures are then those of a profiled run, and only their
shares mean something.
"""

import argparse
import cProfile
import gc
import pstats
import sys
from collections import defaultdict
from pathlib import Path
from time import process_time
from typing import Any

import msgspec
from msgspec.structs import replace

from appliance.policy.choice import PolicyChoice, parse_choices
from appliance.sim.machine import parse_machine
from appliance.sim.simulation import simulate
from appliance.sim.sweep import Sweep, items_of, reference_for
from appliance.workload.spec import load_spec

PARTS = (
    "sim", "core/step_", "core/planning", "core/committing", "core/blocks", "core/pool",
    "core/batcher", "core/dispatcher", "core", "policy", "metrics", "workload",
)  # fmt: skip
"""Parts of the code that times are given for; the first that fits counts."""


def main() -> int:
    """Measure; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", default="fcfs")
    parser.add_argument("--devices", default="h200:8")
    parser.add_argument("--load", type=float, default=1.0)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--json")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    machine = parse_machine(options.devices)
    spec = replace(load_spec("five"), max_len=machine.max_model_len)
    sweep = Sweep(spec=spec, machine=machine, arrivals="poisson", seconds=1000.0, reference=1.0)
    sweep = replace(sweep, reference=reference_for(sweep))
    items, tokens = [], 0
    for item in items_of(sweep, load=options.load, seed=0):
        if tokens >= options.tokens:
            break
        items.append(item)
        tokens += item.output_tokens
    results = []
    for choice in parse_choices(options.policy):
        gc.collect()
        profile = cProfile.Profile() if options.profile else None
        began = process_time()
        if profile is not None:
            profile.enable()
        outcomes, _, extras = simulate(items, choice, machine)
        if profile is not None:
            profile.disable()
        seconds = process_time() - began
        done = sum(outcome.num_tokens for outcome in outcomes)
        found = {
            "policy": choice.word,
            "seconds": seconds,
            "tokens": done,
            "requests": len(items),
            "steps": extras.steps,
            "virtual_seconds": extras.seconds,
            "microseconds_per_token": seconds / done * 1e6,
            "microseconds_per_step": seconds / extras.steps * 1e6,
        }
        results.append(found)
        print(
            f"{choice.word}: {done:,} tokens in {extras.steps:,} steps, {len(items):,} requests, "
            f"{extras.seconds:.0f} s of virtual time: {seconds:.2f} s of one core; "
            f"{found['microseconds_per_token']:.2f} us a token, "
            f"{found['microseconds_per_step']:.0f} us a step"
        )
        if profile is not None:
            _show(choice, profile)
    if options.json:
        spec_of = {"devices": options.devices, "load": options.load, "python": sys.version}
        data = msgspec.json.format(msgspec.json.encode({"spec": spec_of, "runs": results}))
        Path(options.json).write_bytes(data + b"\n")
    return 0


def _show(choice: PolicyChoice, profile: cProfile.Profile) -> None:
    """Shares of the time by part; built-in functions count where they are called."""
    stats: Any = pstats.Stats(profile)
    shares: dict[str, float] = defaultdict(float)
    for (file, _, _), (_, _, own, _, callers) in stats.stats.items():
        if file != "~":
            shares[_part(file)] += own
            continue
        for (caller, _, _), (_, _, spent, _) in callers.items():
            shares[_part(caller)] += spent
    total = sum(shares.values())
    for part, spent in sorted(shares.items(), key=lambda pair: -pair[1]):
        print(f"    {choice.word}  {part:16} {spent / total:6.1%}")


def _part(file: str) -> str:
    inside = file.rpartition("/appliance/")[2] if "/appliance/" in file else ""
    return next((part for part in PARTS if inside.startswith(part)), "other")


if __name__ == "__main__":
    sys.exit(main())
