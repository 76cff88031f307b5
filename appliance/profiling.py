"""`appliance profile`: measure how long steps last on a device, fit, and keep it in a file.

A real node with one worker process serves prompts of random tokens, without HTTP: first groups of
equal answers, so that decode steps of many batch sizes and contexts occur, then prompts of many
lengths, alone and beside running answers. Every step that the worker reports goes into the node's
model of step times, as it would while serving; at the end the model is fitted until nothing moves.

The table shows steps that were alike together: what was measured, what the fit says. A server that
is started with the file (`devices.cost_profile`) predicts well from its first step on; one without
learns the same from its first some hundred steps.
"""

import argparse
import asyncio
import os
import sys
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import uvloop
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from appliance.config import Config, ConfigError, find_file, load, parse_assignment
from appliance.core.payload import Sampling
from appliance.core.step_model import PredictionError, Seen
from appliance.cost_profile import CostProfile, write_profile
from appliance.devices import count_gpus, plan_devices
from appliance.live.checkpoint import CheckpointError
from appliance.live.node import Node, StartFailed
from appliance.live.records import Delta, End, Rejected, Submission, Ticket
from appliance.live.spawner import Spawner
from appliance.metrics.document import DocumentError, check_output
from appliance.startup import Plan, make_plan, read_machine
from appliance.wiring import build_node

PRELOAD = {
    "torch": ("appliance.worker.main", "appliance.worker.torch_engine"),
    "paced": ("appliance.worker.main", "appliance.worker.paced_engine"),
}
STEPS = 16
"""Decode steps of each group."""
MOST_TOKENS = 131072
"""Of all prompts of one group, so that none takes long."""
LIMIT = 120.0
"""Seconds for one group."""
POOR = 0.1
"""A mean error of the fit that is worth a warning."""


class Group(NamedTuple):
    """Equal requests that are sent together, beside `running` answers that are under way."""

    num_seqs: int
    prompt: int
    answer: int
    running: int = 0


class _Sent:
    """One request: its answer's first token, and its end."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.over: asyncio.Future[End] = asyncio.get_running_loop().create_future()
        self.ticket: Ticket | None = None

    def push(self, delta: Delta) -> None:
        """A token."""
        del delta
        self.first.set()

    def end(self, end: End) -> None:
        """The answer is over."""
        self.first.set()
        if not self.over.done():
            self.over.set_result(end)


def main(arguments: Sequence[str]) -> int:
    """The command line of `appliance profile`; the exit code."""
    options = _parser().parse_args(arguments)
    console = Console(highlight=False)
    try:
        if options.json:
            check_output(Path(options.json), flag="--json")
        plan = _plan(options)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            profile = runner.run(_measure(plan, console))
        _show(profile, console)
        if options.json:
            write_profile(profile, Path(options.json))
            console.print(f'use it with: --set devices.cost_profile="{options.json}"')
    except (ConfigError, DocumentError) as error:
        return _last_line(error, code=2)
    except (CheckpointError, StartFailed, Rejected, OSError, TimeoutError) as error:
        return _last_line(error, code=1)
    return 0


def _relay(line: str) -> None:
    """What a worker says when something is amiss; its usual lines would break the table."""
    if " info " not in line:
        sys.stderr.write(line + "\n")


def _last_line(error: Exception, *, code: int) -> int:
    sys.stderr.write(f"appliance: {error}\n")
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="appliance profile", description="Measure how long steps last on a device."
    )
    parser.add_argument("--devices", help="cpu:1 or paced:1@PROFILE; one worker is measured")
    parser.add_argument("--model", help="directory, bundled model or local hub-cache id")
    parser.add_argument("--config", metavar="F", help="configuration file (else ./config.toml)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="set any key"
    )
    parser.add_argument("--json", metavar="OUT", help="where to write the profile")
    return parser


def _plan(options: argparse.Namespace) -> Plan:
    """One worker of the kind that is asked for, without prefix cache and without controller."""
    overrides: dict[str, dict[str, Any]] = {}
    for assignment in options.set:
        section, key, value = parse_assignment(assignment)
        overrides.setdefault(section, {})[key] = value
    if options.devices:
        overrides.setdefault("devices", {})["spec"] = options.devices
    if options.model:
        overrides.setdefault("model", {})["path"] = options.model
    overrides.setdefault("devices", {})["cost_profile"] = ""
    overrides.setdefault("kv", {})["prefix_cache"] = False
    overrides.setdefault("standby", {})["workers"] = 0
    overrides["roles"] = {"initial": "mixed", "controller": "off"}
    config: Config = load(find_file(options.config, directory=Path.cwd()), overrides, flags={})
    machine = read_machine(cores=len(os.sched_getaffinity(0)))
    devices = plan_devices(config.devices.spec, cores=machine.cores, count_gpus=count_gpus)
    spec = "cpu:1" if devices.kind == "cpu" else f"paced:1@{devices.profile}"
    one = plan_devices(spec, cores=machine.cores, count_gpus=count_gpus)
    return make_plan(config, one, machine=machine)


def groups(*, max_num_seqs: int, longest: int, kv_tokens: int) -> list[Group]:
    """What is measured on a worker of this size: nothing that would not fit."""
    contexts = [n for n in (16, 64, 256, 1024, 2048, 4096) if n + 2 * STEPS < longest]
    batches = [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256) if n <= max_num_seqs]
    room = min(MOST_TOKENS, kv_tokens)
    found = [
        Group(batch, context, STEPS)
        for context in contexts
        for batch in batches
        if batch * (context + 2 * STEPS) <= room
    ]
    lengths = [n for n in (8, 32, 100, 200, 400, 800, 1600, 3200, 6400) if n + 2 < longest]
    for running in (0, *(n for n in (2, 8, 32, 128) if n < max_num_seqs)):
        found += [
            Group(1, length, 1, running=running)
            for length in lengths
            if running * 256 + length <= room
        ]
    return found


async def _measure(plan: Plan, console: Console) -> CostProfile:
    spawner = Spawner(PRELOAD[plan.devices.engine])
    node = build_node(plan, faults=(), spawner=spawner, stderr=_relay)
    try:
        node.start()
        await node.wait_ready()
        load_ = _Load(node)
        planned = groups(
            max_num_seqs=plan.batcher.max_num_seqs,
            longest=plan.batcher.max_model_len,
            kv_tokens=plan.num_blocks * plan.config.kv.block_tokens,
        )
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("measuring steps", total=len(planned))
            for group in [planned[0], *planned]:  # the first once more: caches are cold
                async with asyncio.timeout(LIMIT):
                    await load_.serve(group)
                progress.advance(task)
        steps = node.dispatcher.view.cost.steps
    finally:
        await node.close()
    steps.settle()
    seen = tuple(each for each in steps.seen() if each.num_steps >= 2)
    return CostProfile(
        devices=f"paced:1@{plan.devices.profile}" if plan.devices.profile else "cpu:1",
        model=plan.served_name,
        dtype=plan.dtype,
        coefficients=steps.coefficients,
        error=_error(seen),
        seen=seen,
    )


class _Load:
    """Requests of random tokens."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._num = 0

    async def serve(self, group: Group) -> None:
        """Send a group and wait until it is over."""
        running = [await self._send(64, STEPS * 16) for _ in range(group.running)]
        for sink in running:
            await sink.first.wait()
        sinks = [await self._send(group.prompt, group.answer) for _ in range(group.num_seqs)]
        for sink in sinks:
            end = await sink.over
            if end.error is not None:
                raise StartFailed(f"a request failed while measuring: {end.message}")
        for sink in running:
            if sink.ticket is not None:
                self._node.cancel(sink.ticket)
            await sink.over

    async def _send(self, prompt: int, answer: int) -> "_Sent":
        self._num += 1
        vocabulary = self._node.text.vocab_size - 1
        start = self._num * 7919
        ids = array("i", ((start + at * 31) % vocabulary for at in range(prompt)))
        encoded = await self._node.text.encode_ids(ids)
        sink = _Sent()
        sink.ticket = self._node.submit(
            Submission(
                name=f"profile-{self._num}",
                prompt=encoded,
                sampling=Sampling(temperature=0.0, ignore_eos=True),
                max_tokens=answer,
            ),
            [sink],
        )
        return sink


def _error(seen: Sequence[Seen]) -> PredictionError:
    """Of the fit, each kind of step counting once."""
    errors = sorted(abs(each.predicted / each.seconds - 1.0) for each in seen) or [0.0]
    return PredictionError(
        mean_relative=sum(errors) / len(errors),
        p90_relative=errors[len(errors) * 9 // 10],
        num_steps=sum(each.num_steps for each in seen),
    )


def _show(profile: CostProfile, console: Console) -> None:
    table = Table(title=f"steps of {profile.model} on {profile.devices}")
    names = ("prompt tokens", "decodes", "KV tokens", "steps", "measured ms", "fitted ms", "error")
    for name in names:
        table.add_column(name, justify="right")
    for each in sorted(profile.seen, key=lambda one: (one.prefill_tokens, one.decodes)):
        error = each.predicted / each.seconds - 1.0
        table.add_row(
            f"{each.prefill_tokens:.0f}",
            f"{each.decodes:.0f}",
            f"{each.kv_tokens:.0f}",
            str(each.num_steps),
            f"{each.seconds * 1000:.2f}",
            f"{each.predicted * 1000:.2f}",
            f"{error:+.1%}",
        )
    console.print(table)
    for name, plane in zip(("first", "second"), profile.coefficients.planes, strict=True):
        step, token, pair, decode, kv = (k * 1e6 for k in plane)
        console.print(
            f"{name} plane, microseconds: {step:.1f} a step, {token:.3f} a prompt token, "
            f"{pair:.6f} a pair, {decode:.3f} a decode, {kv:.6f} a KV token"
        )
    error_ = profile.error
    console.print(
        f"error of the fit: mean {error_.mean_relative:.1%}, p90 {error_.p90_relative:.1%}"
    )
    if error_.mean_relative > POOR:
        console.print(
            "that is a poor fit: other programs on the same cores make steps uneven; measure again "
            "while they rest"
        )
