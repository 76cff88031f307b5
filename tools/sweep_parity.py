"""Is the simulator honest? Live runs of a sweep, simulated with the same requests, class by class.

    python -m tools.sweep_parity sweep.jsonl [--out parity.md] [--low 0.4 --high 0.95]

Taken are the points (policy, arrivals, rate) whose live attainment, seeds pooled, lies between the
two: where everything is attained or nothing is, agreement says little. Each seed of a point is
simulated with the very items that the client sent, and both are scored by the same code. With a
class's difference stands what chance alone allows at its number of requests (95 %, both sides as
independent samples, which is wide: the requests are the same). Runs with `--set` arguments that the
simulator knows nothing of are refused."""

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

from appliance.core.types import Record
from appliance.metrics.score import Summary, summarise
from appliance.policy.choice import parse_choice
from appliance.sim.machine import Machine, parse_machine
from appliance.sim.simulation import simulate
from appliance.workload.arrivals import parse_arrivals
from appliance.workload.generate import generate
from appliance.workload.spec import load_spec
from tools.sweep_kit import LiveRun, read_runs

BAR = 0.05
TAKEN = {"batch.max_num_seqs": "max_num_seqs", "batch.max_batch_tokens": "max_batch_tokens"}
"""Of the `--set` arguments of a sweep, those that the simulator has too, by its own names."""


class Pair(Record, frozen=True, kw_only=True):
    """One class (or all of them) at one point: (attained, offered) on both sides."""

    name: str
    live: tuple[int, int]
    simulated: tuple[int, int]

    @property
    def difference(self) -> float:
        """Simulated minus live."""
        return _share(self.simulated) - _share(self.live)

    @property
    def chance(self) -> float:
        """Half the width of the 95 % interval of a difference that is nothing but chance."""
        hits = self.live[0] + self.simulated[0]
        trials = self.live[1] + self.simulated[1]
        share = hits / trials if trials else 0.0
        each = [1 / number for _, number in (self.live, self.simulated) if number]
        return 1.96 * sqrt(share * (1 - share) * sum(each))


def main() -> None:
    """Simulate, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--low", type=float, default=0.4)
    parser.add_argument("--high", type=float, default=0.95)
    options = parser.parse_args()
    setup = json.loads(options.file.with_suffix(".setup.json").read_text())
    machine = machine_of(setup)
    points: dict[tuple[str, str, float], list[LiveRun]] = defaultdict(list)
    for run in read_runs(options.file):
        points[run.policy, run.arrivals, run.rate].append(run)
    lines = ["| policy | arrivals | requests/s | class | live | simulated | points | chance |",
             "| --- | --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    found: list[Pair] = []
    for (policy, arrivals, rate), runs in sorted(points.items()):
        share = sum(run.attained for run in runs) / max(1, sum(run.offered for run in runs))
        if not options.low <= share <= options.high:
            continue
        simulated = [simulated_run(run, setup, machine) for run in runs]
        for pair in pairs(runs, simulated):
            found.append(pair)
            lines.append(
                f"| {policy} | {arrivals} | {rate:g} | {pair.name} | {_share(pair.live):.1%} |"
                f" {_share(pair.simulated):.1%} | {100 * pair.difference:+.1f} |"
                f" ± {100 * pair.chance:.1f} |"
            )
            print(lines[-1], flush=True)
    lines += ["", summary_line(found)]
    print(lines[-1])
    if options.out is not None:
        options.out.write_text("\n".join(lines) + "\n")


def machine_of(setup: Mapping[str, Any]) -> Machine:
    """The machine of a sweep's setup. Raises `SystemExit` naming what it cannot have."""
    wanted = {
        "max_model_len": setup["positions"],
        "max_num_seqs": setup["max_num_seqs"],
        "max_batch_tokens": setup["max_batch_tokens"],
    }
    for each in setup.get("assignments", ()):
        name, _, value = str(each).partition("=")
        if name.strip() not in TAKEN:
            raise SystemExit(
                f"the runs were made with --set {each}, which the simulator does not take: compare"
                f" a sweep without it (taken are {', '.join(TAKEN)})"
            )
        wanted[TAKEN[name.strip()]] = int(value)
    return parse_machine(setup["devices"], **wanted)


def simulated_run(run: LiveRun, setup: dict[str, object], machine: Machine) -> Summary:
    """The same requests in the simulator, which waits for open answers as long as the client."""
    names = ("seconds", "warm_up", "drain")
    seconds, warm_up, drain = (float(str(setup[name])) for name in names)
    items = generate(
        load_spec(str(setup["workload"])),
        rate=run.rate,
        seconds=seconds,
        seed=run.seed,
        arrivals=parse_arrivals(run.arrivals),
    )
    result = simulate(items, parse_choice(run.policy), machine, seed=run.seed, drain_seconds=drain)
    return summarise(
        result.outcomes,
        policy=run.policy,
        load=run.load,
        span=(warm_up, seconds),
        instance_seconds=result.instance_seconds,
    )


def pairs(live: Sequence[Summary], simulated: Sequence[Summary]) -> list[Pair]:
    """All requests, then every class; seeds pooled."""
    found = [
        Pair(
            name="all",
            live=(sum(run.attained for run in live), sum(run.offered for run in live)),
            simulated=(
                sum(run.attained for run in simulated),
                sum(run.offered for run in simulated),
            ),
        )
    ]
    names = sorted({name for run in live for name in run.per_class})
    return found + [
        Pair(name=name, live=_counts(live, name), simulated=_counts(simulated, name))
        for name in names
    ]


def summary_line(found: Sequence[Pair]) -> str:
    """How many are within the bar."""
    classes = [pair for pair in found if pair.name != "all"]
    if not classes:
        return "No point has an attainment in the range."
    near = sum(abs(pair.difference) <= BAR for pair in classes)
    excused = sum(abs(pair.difference) <= max(BAR, pair.chance) for pair in classes)
    mean = sum(abs(pair.difference) for pair in classes) / len(classes)
    worst = max(classes, key=lambda pair: abs(pair.difference))
    whole = [abs(pair.difference) for pair in found if pair.name == "all"]
    return (
        f"{near} of {len(classes)} classes at {len(whole)} points within {100 * BAR:.0f} points"
        f" ({excused} within that or chance), mean {100 * mean:.1f}, largest"
        f" {100 * worst.difference:+.1f} ({worst.name}); all requests: mean"
        f" {100 * sum(whole) / len(whole):.1f}, largest {100 * max(whole):.1f}."
    )


def _counts(runs: Sequence[Summary], name: str) -> tuple[int, int]:
    chosen = [run.per_class[name] for run in runs if name in run.per_class]
    return sum(one.attained for one in chosen), sum(one.offered for one in chosen)


def _share(pair: tuple[int, int]) -> float:
    return pair[0] / pair[1] if pair[1] else 1.0


if __name__ == "__main__":
    main()
