"""The engine beside its peers: the same checkpoint, one core, one thread, several concurrencies.

    python -m tools.make_checkpoint build/checkpoints --gguf f32 f16 bf16
    python -m tools.bench_peers build/checkpoints/rand5m \\
        --llama-server BUILD/bin/llama-server --transformers VENV/bin/transformers \\
        --openvino VENV/bin/python --json OUT

Peers whose program is not given are left out. Every server is started once and stays up; then, for
each concurrency, all contestants take turns (A B C A B C): the same prompts for all in one repeat,
new ones in the next. Servers are pinned to one core, the client to the other. An answer is greedy
and has exactly the length that was asked for, or the run fails.

Two figures per turn: output tokens per second of wall clock, and per second of CPU time of the
contestant's processes. The second notices less of what else the machine is doing. Ratios are taken
within a repeat; the tables show medians and ranges over the repeats.
"""

import argparse
import json
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import msgspec
from tokenizers import Tokenizer

from appliance.core.types import Record
from tools.make_checkpoint import random_words
from tools.peers import (
    Answers,
    Contestant,
    HttpContestant,
    OpenVinoContestant,
    Prompt,
    appliance_recipe,
    llama_recipe,
    transformers_recipe,
)

OURS = "appliance"
CONCURRENCIES = (1, 8, 32)
LEAST_REQUESTS = 4
WARM_TOKENS = 8


class Load(Record, frozen=True, kw_only=True):
    """What is asked of each contestant."""

    prompt_tokens: int
    max_tokens: int
    rounds: int
    """Requests of a turn: this many times the concurrency or `LEAST_REQUESTS`, what is more."""
    repeats: int

    def num_requests(self, concurrency: int) -> int:
        """Requests of one turn."""
        return self.rounds * max(concurrency, LEAST_REQUESTS)


class Turn(Record, frozen=True, kw_only=True):
    """One contestant's turn. Rates in output tokens per second."""

    name: str
    precision: str
    concurrency: int
    repeat: int
    requests: int
    mean_prompt_tokens: float
    wall_seconds: float
    cpu_seconds: float
    front_cpu_seconds: float
    per_wall: float
    per_cpu: float
    same_answers: float
    """Share of answers equal to those of the first contestant (ours) in the same repeat."""


class PromptSource(Protocol):
    """Where prompts come from."""

    def draw(self, seed: str, count: int) -> list[Prompt]:
        """`count` prompts that depend on `seed` alone."""


class Prompts:
    """Random prompts of an exact number of tokens."""

    def __init__(self, directory: Path, num_tokens: int) -> None:
        self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self._num_tokens = num_tokens

    def draw(self, seed: str, count: int) -> list[Prompt]:
        """See `PromptSource`."""
        rng = random.Random(seed)
        return [self._one(rng) for _ in range(count)]

    def _one(self, rng: random.Random) -> Prompt:
        while True:
            text = " ".join(random_words(rng, self._num_tokens))
            ids = self._tokenizer.encode(text).ids[: self._num_tokens]
            text = self._tokenizer.decode(ids)
            if self._tokenizer.encode(text).ids == ids:
                return Prompt(text, ids)


def make_turn(
    contestant: Contestant,
    answers: Answers,
    *,
    concurrency: int,
    repeat: int,
    reference: Sequence[str],
) -> Turn:
    """The record of a turn; `reference` are the texts it is compared with."""
    requests = len(answers.texts)
    return Turn(
        name=contestant.name,
        precision=contestant.precision,
        concurrency=concurrency,
        repeat=repeat,
        requests=requests,
        mean_prompt_tokens=answers.prompt_tokens / requests,
        wall_seconds=answers.wall,
        cpu_seconds=answers.cpu,
        front_cpu_seconds=answers.cpu_front,
        per_wall=answers.tokens / answers.wall,
        per_cpu=answers.tokens / answers.cpu,
        same_answers=sum(map(str.__eq__, answers.texts, reference)) / requests,
    )


def run(
    contestants: Sequence[Contestant],
    prompts: PromptSource,
    load: Load,
    *,
    concurrencies: Sequence[int],
    tell: Callable[[str], None],
) -> Iterator[Turn]:
    """All turns, as they are finished. Raises `RuntimeError` if an answer has another length."""
    for number, contestant in enumerate(contestants):
        warm = prompts.draw(f"warm {number}", max(concurrencies))
        contestant.ask(warm, max_tokens=WARM_TOKENS, concurrency=max(concurrencies))
    for concurrency in concurrencies:
        requests = load.num_requests(concurrency)
        for repeat in range(load.repeats):
            asked = prompts.draw(f"{concurrency} {repeat}", requests)
            reference: list[str] = []
            for contestant in contestants:
                answers = contestant.ask(asked, max_tokens=load.max_tokens, concurrency=concurrency)
                if answers.tokens != requests * load.max_tokens:
                    raise RuntimeError(
                        f"{contestant.name} gave {answers.tokens} tokens "
                        f"instead of {requests} x {load.max_tokens}"
                    )
                reference = reference or answers.texts
                turn = make_turn(
                    contestant,
                    answers,
                    concurrency=concurrency,
                    repeat=repeat,
                    reference=reference,
                )
                tell(
                    f"{concurrency:>2} {turn.name:<12} {turn.precision:<4} "
                    f"{turn.per_wall:7.0f} /s wall {turn.per_cpu:7.0f} /s CPU, "
                    f"{turn.cpu_seconds / turn.wall_seconds:4.0%} busy, "
                    f"{turn.same_answers:4.0%} equal answers"
                )
                yield turn


def spread(values: Sequence[float], form: Callable[[float], str]) -> str:
    """Median and, of several, the range."""
    middle = form(statistics.median(values))
    if len(values) == 1:
        return middle
    return f"{middle} ({form(min(values))} to {form(max(values))})"


def table(turns: Sequence[Turn], *, concurrencies: Sequence[int], what: str) -> list[str]:
    """Rows of Markdown: the rate `what` of each contestant, and ours divided by theirs."""
    rates: dict[tuple[str, str, int], list[float]] = {}
    for turn in turns:
        rates.setdefault((turn.name, turn.precision, turn.concurrency), []).append(
            getattr(turn, what)
        )
    heads = [f"{each} at once" for each in concurrencies]
    lines = [
        "| | " + " | ".join([*heads, *(f"ours / it, {each}" for each in concurrencies)]) + " |",
        "| --- |" + " --- |" * (2 * len(concurrencies)),
    ]
    for name, precision in dict.fromkeys((turn.name, turn.precision) for turn in turns):
        cells, ratios = [], []
        for concurrency in concurrencies:
            theirs = rates.get((name, precision, concurrency), [])
            ours = rates.get((OURS, precision, concurrency), [])
            cells.append(spread(theirs, "{:.0f}".format) if theirs else "")
            pairs = [a / b for a, b in zip(ours, theirs, strict=False)]
            shown = name != OURS and pairs
            ratios.append(spread(pairs, "{:.2f}".format) if shown else "")
        lines.append(f"| {name} {precision} | " + " | ".join([*cells, *ratios]) + " |")
    return lines


def front_cost(turns: Sequence[Turn], *, concurrencies: Sequence[int]) -> str:
    """CPU time of our server process (everything but the worker) per token, and its share."""
    parts = []
    for concurrency in concurrencies:
        ours = [turn for turn in turns if turn.name == OURS and turn.concurrency == concurrency]
        front = statistics.median(
            turn.front_cpu_seconds / (turn.per_cpu * turn.cpu_seconds) for turn in ours
        )
        share = statistics.median(turn.front_cpu_seconds / turn.cpu_seconds for turn in ours)
        parts.append(f"{concurrency} at once: {front * 1e6:.0f} us per token, {share:.0%}")
    return "CPU time of the appliance's server process: " + "; ".join(parts)


def open_all(options: argparse.Namespace, stack: ExitStack) -> list[Contestant]:
    """Start everything that was asked for."""
    directory: Path = options.model.resolve()
    way = "stream" if options.stream else "whole"
    contestants: list[Contestant] = []

    def keep(contestant: Contestant) -> None:
        stack.callback(contestant.stop)
        contestants.append(contestant)

    for precision in options.precision:
        recipes = [appliance_recipe(directory, precision, settings=options.set)]
        if options.llama_server:
            recipes.append(llama_recipe(options.llama_server, directory, precision))
        if options.transformers:
            recipes.append(transformers_recipe(options.transformers, directory, precision))
        for recipe in recipes:
            keep(HttpContestant(recipe, core=options.server_core, stream=way))
        if options.openvino:
            gguf = directory / f"{directory.name}-f16.gguf"
            keep(
                OpenVinoContestant(
                    options.openvino, gguf, precision=precision, core=options.server_core
                )
            )
    return contestants


def machine() -> Mapping[str, Any]:
    """What the figures belong to."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else "unknown",
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "when": time.strftime("%Y-%m-%d %H:%M"),
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path, help="a folder of tools.make_checkpoint")
    parser.add_argument("--llama-server", help="the program")
    parser.add_argument("--transformers", help="the program `transformers`")
    parser.add_argument("--openvino", help="a Python that can import openvino_genai")
    parser.add_argument("--precision", nargs="+", choices=["f32", "bf16"], default=["f32", "bf16"])
    parser.add_argument("--concurrency", nargs="+", type=int, default=list(CONCURRENCIES))
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--server-core", type=int, default=0)
    parser.add_argument("--client-core", type=int, default=1)
    parser.add_argument("--stream", action="store_true", help="ask for streams")
    parser.add_argument("--set", action="append", default=[], help="a setting of ours")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    """Measure, print the tables, write the JSON."""
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers are ended too
    os.sched_setaffinity(0, {options.client_core})
    load = Load(
        prompt_tokens=options.prompt_tokens,
        max_tokens=options.max_tokens,
        rounds=options.rounds,
        repeats=options.repeats,
    )
    prompts = Prompts(options.model, options.prompt_tokens)
    before = machine()
    with ExitStack() as stack:
        contestants = open_all(options, stack)
        turns = list(
            run(
                contestants,
                prompts,
                load,
                concurrencies=options.concurrency,
                tell=lambda line: print(line, flush=True),
            )
        )
    for what, title in (
        ("per_wall", "Output tokens per second of wall clock"),
        ("per_cpu", "Output tokens per second of CPU time"),
    ):
        print(f"\n{title}\n")
        print("\n".join(table(turns, concurrencies=options.concurrency, what=what)))
    print("\n" + front_cost(turns, concurrencies=options.concurrency))
    if options.json:
        result = {
            "model": options.model.name,
            "options": {key: value for key, value in vars(options).items() if key in SHOWN},
            "machine": before,
            "turns": [msgspec.to_builtins(turn) for turn in turns],
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")


SHOWN = (
    "precision",
    "concurrency",
    "prompt_tokens",
    "max_tokens",
    "rounds",
    "repeats",
    "stream",
    "set",
)

if __name__ == "__main__":
    main()
