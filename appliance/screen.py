"""What an operator reads at the start: the plan, the timeline, and how to talk to the server."""

import json
import shlex
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.markup import escape

from appliance import __version__
from appliance.core.profiles import device_profile
from appliance.staff import controller_settings, has_controller
from appliance.startup import Plan, shown_bytes


class Screen:
    """The terminal, or a file or pipe that gets the same words uncoloured."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)

    def plan(self, plan: Plan) -> None:
        """The plan, one fact a line."""
        self._console.print(f"[bold]appliance {__version__}[/bold]")
        for label, words in _facts(plan):
            self._console.print(f"  [cyan]{label:9}[/cyan] {escape(words)}")

    def timeline(self, stages: Sequence[tuple[str, float]]) -> None:
        """Seconds since the process was created, stage by stage."""
        self._console.print("  [cyan]timeline[/cyan]  seconds since the process was created")
        for name, seconds in stages:
            self._console.print(f"  {'':9} [bold]{seconds:5.2f}[/bold]  {escape(name)}")

    def links(self, lines: Sequence[str], *, missing: Sequence[str]) -> None:
        """What came of the probes; `missing` in words."""
        if lines:
            self._console.print("  [cyan]links[/cyan]     probed with a copy")
        for line in lines:
            self._console.print(f"  {'':9} {escape(line)}")
        for line in missing:
            self._console.print(f"  {'':9} [bold red]{escape(line)}[/bold red]")

    def address(self, *, url: str, model: str, needs_key: bool) -> None:
        """Where the server is, and a request to paste."""
        self._console.print(f"\n[bold green]serving {escape(model)} at {url}[/bold green]\n")
        self._console.print(escape(curl(url, model, needs_key=needs_key)) + "\n")


def curl(url: str, model: str, *, needs_key: bool = False) -> str:
    """A ready-to-paste request; with `needs_key` the key is left to be filled in."""
    question = {"role": "user", "content": "Spell ocean letter by letter."}
    body = json.dumps({"model": model, "messages": [question], "temperature": 0})
    headers = "-H 'content-type: application/json'"
    if needs_key:
        headers += ' -H "authorization: Bearer $KEY"'
    return f"curl {url}/v1/chat/completions {headers} -d {shlex.quote(body)}"


def _facts(plan: Plan) -> Iterator[tuple[str, str]]:
    shape, workers = plan.checkpoint.shape, plan.devices.workers
    yield (
        "model",
        f"{plan.served_name}: {shape.family}, {_millions(shape.num_parameters)} parameters, "
        f"{plan.dtype}, {shape.max_positions} positions",
    )
    yield "files", str(plan.checkpoint.directory)
    names = ", ".join(dict.fromkeys(device for worker in workers for device in worker.devices))
    each = f", {plan.threads} threads each" if plan.threads > 1 else ""
    yield "devices", f"{len(workers)} {_plural('worker', len(workers))} on {names}{each}"
    if plan.devices.kind == "paced":
        profile = device_profile(plan.devices.profile)
        yield "profile", f"{profile.name}: {profile.note}; tokens are drawn, not computed"
    else:
        yield "kernels", plan.kernels.words
    yield "roles", _roles(plan)
    if len(workers) > 1:
        yield "links", "between all workers, probed when they are up (below)"
    yield "memory", _memory(plan)
    tokens = plan.num_blocks * plan.config.kv.block_tokens
    yield (
        "kv cache",
        f"per worker {plan.num_blocks} blocks of {plan.config.kv.block_tokens} tokens = {tokens} "
        f"tokens; longest sequence {plan.batcher.max_model_len}",
    )
    yield (
        "batch",
        f"up to {plan.batcher.max_num_seqs} sequences, {plan.batcher.max_batch_tokens} tokens a "
        f"step, depth {plan.batcher.depth}",
    )
    yield "policy", _policy(plan)
    for note in plan.notes:
        yield "note", note


def _roles(plan: Plan) -> str:
    workers = plan.devices.workers
    words = [f"{worker.id} {'standby' if worker.parked else worker.role}" for worker in workers]
    words += [f"{worker.id} only when needed" for worker in plan.devices.spares]
    by_itself = "is off"
    if has_controller(plan.config):
        fixed = controller_settings(plan.config).get("flips") is False
        by_itself = "changes only who serves" if fixed else "changes them"
    return f"{', '.join(words)}; the controller {by_itself}"


def _policy(plan: Plan) -> str:
    settings = [f"{name} {value}" for name, value in plan.config.policy.settings.items()]
    ignored = "" if plan.policy.uses_priority else "; the priority of requests is ignored"
    refusing = [name for name, slo in plan.config.slo.items() if slo.on_miss == "refuse"]
    if refusing and plan.policy.dispatch.late is None:
        ignored += f"; it refuses nobody (on_miss of {', '.join(sorted(refusing))})"
    return f"{plan.policy.name}, settings: {', '.join(settings) or 'defaults'}{ignored}"


def _memory(plan: Plan) -> str:
    number = plan.devices.most
    memory = plan.memory
    parts = [f"KV {shown_bytes(memory.kv)}"]
    if memory.packed:
        parts.insert(0, f"packed weights {shown_bytes(memory.packed)}")
    if memory.own:
        parts.insert(0, f"weights {shown_bytes(memory.own)}")
    weights = f"weights {shown_bytes(memory.weights)} + " if memory.weights else ""
    return (
        f"{weights}{number} x ({' + '.join(parts)}) = {shown_bytes(memory.total(number))} "
        f"of {shown_bytes(plan.machine.free_bytes)} free"
    )


def _millions(number: int) -> str:
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.2f}M"


def _plural(word: str, number: int) -> str:
    return word if number == 1 else f"{word}s"
