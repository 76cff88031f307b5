"""Conversations of several turns: how much of each turn is computed again, and what that costs.

Each turn of a conversation sends everything said before and some new tokens. Whatever worker
answered before has the KV of all of it; the question is who has it when the next turn comes.
The *arms*, each on a fresh node of two workers, in turns:

==============  ====================================================================
mixed alone     each worker uses its own cache only; placed by predicted work
mixed sticky    the same, but a conversation stays with the worker it began with
mixed shared    blocks that another worker has are copied where that is cheaper
1P1D alone      hand-off from a prefill to a decode worker, own caches only
1P1D shared     the same with copies between caches
1P1D upset      as "1P1D shared"; after the third turn both roles are swapped, after the
                fourth a worker is killed
==============  ====================================================================

Counted per turn: tokens computed (prompt less what was cached or copied) beyond the new ones, and
the time to the first token at the node, without HTTP. The most that sharing may compute beyond the
new tokens is one block: only full blocks are shared, and the last token of an answer was never an
input.

    python -m tools.bench_turns --devices paced:2@h200-8b --json docs/results/turns.json
"""

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import time
from array import array
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from appliance.config import load
from appliance.core.lifecycle import WorkerState
from appliance.core.payload import Sampling
from appliance.core.slots import Policy
from appliance.core.types import Phase, Record, Request, Role, WorkerId
from appliance.core.view import NodeView
from appliance.devices import plan_devices
from appliance.live.node import Node
from appliance.live.records import Delta, End, Submission
from appliance.live.spawner import Spawner
from appliance.policy.dispatch_parts import place_least_work
from appliance.startup import make_plan, read_machine
from appliance.wiring import build_node
from tools.control_kit import machine, quantile

FIRST_TOKENS = 900
NEW_TOKENS = 120
ANSWER_TOKENS = 90
SETTLE_SECONDS = 1.5


class Arm(Record, frozen=True, kw_only=True):
    """One way to serve the same conversations."""

    name: str
    roles: str
    shared: bool
    sticky: bool = False
    upset: bool = False


ARMS = (
    Arm(name="mixed alone", roles="mixed", shared=False),
    Arm(name="mixed sticky", roles="mixed", shared=False, sticky=True),
    Arm(name="mixed shared", roles="mixed", shared=True),
    Arm(name="1P1D alone", roles="prefill,decode", shared=False),
    Arm(name="1P1D shared", roles="prefill,decode", shared=True),
    Arm(name="1P1D upset", roles="prefill,decode", shared=True, upset=True),
)


def place_sticky(view: NodeView, request: Request, phase: Phase, now: float) -> WorkerId | None:
    """The worker that the first block of the prompt names, whatever else is going on."""
    willing = view.willing(request, now, phase)
    if not willing or not request.prefix_hashes:
        return place_least_work(view, request, phase, now)
    workers = sorted(view.workers)
    named = workers[request.prefix_hashes[0] % len(workers)]
    if named in willing:
        return named
    ready = view.workers[named].state is WorkerState.READY
    return None if ready else place_least_work(view, request, phase, now)


class Turn:
    """A sink that keeps tokens and times."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.first_at: float | None = None
        self.end_record: End | None = None

    def push(self, delta: Delta) -> None:
        """Tokens have come."""
        if self.first_at is None:
            self.first_at = time.monotonic()
        self.tokens += delta.tokens

    def end(self, end: End) -> None:
        """The answer is over."""
        self.end_record = end


class Talk:
    """One conversation on a node."""

    def __init__(self, node: Node, number: int, *, seed: int) -> None:
        self._node = node
        self._number = number
        self._random = random.Random(seed * 1000 + number)
        self._ids = self._draw(FIRST_TOKENS)
        self.rows: list[dict[str, Any]] = []

    def _draw(self, count: int) -> list[int]:
        return [self._random.randrange(300, self._node.info.vocab_size) for _ in range(count)]

    async def turn(self, number: int) -> None:
        """Say something and wait for the answer."""
        fresh = len(self._ids) if number == 1 else NEW_TOKENS
        if number > 1:
            self._ids += self._draw(NEW_TOKENS)
        sink, began = Turn(), time.monotonic()
        prompt = await self._node.text.encode_ids(array("i", self._ids))
        spec = Submission(
            name=f"talk-{self._number}-{number}-{began}",
            prompt=prompt,
            sampling=Sampling(temperature=0.0, ignore_eos=True),
            max_tokens=ANSWER_TOKENS,
        )
        await self._node.submit(spec, [sink]).done
        end = sink.end_record
        if end is None or end.error is not None or sink.first_at is None:
            raise SystemExit(f"conversation {self._number}, turn {number}: {end}")
        if len(sink.tokens) != ANSWER_TOKENS:
            raise SystemExit(f"{len(sink.tokens)} tokens came, {ANSWER_TOKENS} were asked for")
        self._ids += sink.tokens
        self.rows.append(
            {
                "turn": number,
                "prompt": end.prompt_tokens,
                "new": fresh,
                "computed": end.prompt_tokens - end.cached_tokens,
                "beyond": end.prompt_tokens - end.cached_tokens - fresh,
                "ttft_ms": 1000 * (sink.first_at - began),
            }
        )


async def upset(node: Node, turn: int) -> list[str]:
    """What happens after this turn in the arm that is upset."""
    if turn == 3:
        views = node.dispatcher.view.workers
        other = {Role.PREFILL: Role.DECODE, Role.DECODE: Role.PREFILL}
        swaps = [(worker, other[view.role]) for worker, view in views.items()]
        answer = await node.asks.roles(swaps)
        return [f"roles swapped: {answer.outcome} in {answer.seconds:.3f} s"]
    if turn == 4:
        worker = min(node.workers.living)
        pid = node.workers.living[worker].pid
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(SETTLE_SECONDS)
        return [f"worker {worker} killed; ready again: {node.ready()[0]}"]
    return []


async def run_arm(arm: Arm, options: argparse.Namespace, *, seed: int) -> dict[str, Any]:
    """All conversations on a fresh node."""
    node = open_node(arm, options)
    node.start()
    try:
        await node.wait_ready(len(node.settings.workers))
        await asyncio.sleep(SETTLE_SECONDS)  # links are probed
        talks = [Talk(node, number, seed=seed) for number in range(options.talks)]
        events: list[str] = []
        for turn in range(1, options.turns + 1):
            await asyncio.gather(*(talk.turn(turn) for talk in talks))
            if arm.upset:
                events += await upset(node, turn)
        tokens = {
            str(worker): [stats.prefill_tokens, stats.decode_tokens]
            for worker, stats in node.stats.workers.items()
        }
        rows = [row for talk in talks for row in talk.rows]
        return {"arm": arm.name, "seed": seed, "rows": rows, "events": events, "tokens": tokens}
    finally:
        await node.close()


def open_node(arm: Arm, options: argparse.Namespace) -> Node:
    """A node as `appliance start` would make it."""
    overrides: dict[str, dict[str, Any]] = {
        "devices": {"spec": options.devices},
        "roles": {"initial": arm.roles},
        "transfer": {"prefix_pull": arm.shared},
        "stream": {"join_above": 1.0},
    }
    config = load(None, overrides=overrides)
    here = read_machine(cores=len(os.sched_getaffinity(0)))
    devices = plan_devices(options.devices, cores=here.cores, count_gpus=lambda: 0)
    plan = make_plan(config, devices, machine=here)
    if arm.sticky:
        plan = msgspec.structs.replace(plan, policy=sticky(plan.policy))
    preload = ["appliance.worker.main"]
    if devices.engine == "torch":
        preload.append("appliance.worker.torch_engine")
    lines: list[str] = []
    return build_node(plan, faults=(), spawner=Spawner(preload), stderr=lines.append)


def sticky(policy: Policy) -> Policy:
    """The same policy with sticky placement."""
    dispatch = msgspec.structs.replace(policy.dispatch, place=place_sticky)
    return msgspec.structs.replace(policy, dispatch=dispatch)


def summary(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per arm: tokens computed beyond the new ones and times to first token, from turn 2 on."""
    table = []
    for arm in ARMS:
        mine = [run for run in runs if run["arm"] == arm.name]
        rows = [row for run in mine for row in run["rows"] if row["turn"] > 1]
        if not rows:
            continue
        beyond = [row["beyond"] for row in rows]
        ttft = [row["ttft_ms"] for row in rows]
        table.append(
            {
                "arm": arm.name,
                "turns": len(rows),
                "computed_per_turn": sum(row["computed"] for row in rows) / len(rows),
                "beyond_new_mean": sum(beyond) / len(beyond),
                "beyond_new_max": max(beyond),
                "within_a_block": sum(each <= 16 for each in beyond) / len(beyond),
                "ttft_ms_p50": quantile(ttft, 0.5),
                "ttft_ms_p99": quantile(ttft, 0.99),
                "by_run_ttft_ms_p50": [
                    quantile([row["ttft_ms"] for row in run["rows"] if row["turn"] > 1], 0.5)
                    for run in mine
                ],
                "events": [event for run in mine for event in run["events"]],
            }
        )
    return table


def main() -> None:
    """Run all arms in turns and print one line per arm."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--devices", default="paced:2@h200-8b")
    parser.add_argument("--talks", type=int, default=8, help="conversations at once")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--arms", nargs="*", default=[arm.name for arm in ARMS])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    runs: list[dict[str, Any]] = []
    for repeat in range(options.repeats):
        for arm in ARMS:
            if arm.name not in options.arms:
                continue
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runs.append(runner.run(run_arm(arm, options, seed=repeat)))
            done = summary(runs[-1:])[0]
            print(
                f"{done['arm']:14} computed/turn {done['computed_per_turn']:7.1f}  beyond new: "
                f"mean {done['beyond_new_mean']:6.1f} max {done['beyond_new_max']:5d}  ttft "
                f"p50 {done['ttft_ms_p50']:6.1f} ms p99 {done['ttft_ms_p99']:6.1f} ms  "
                f"{'; '.join(done['events'])}",
                flush=True,
            )
    record = {
        "command": sys.argv[1:],
        "machine": machine(),
        "summary": summary(runs),
        "runs": runs,
    }
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
