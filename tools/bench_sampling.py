"""What penalties and grammars cost per step, beside plain drawing.

    python -m tools.bench_sampling [--model DIR] [--batch 1 8 32]

Rows of random logits of the model's vocabulary are drawn at temperature 1 for a number of steps, as
the engine does it: masks, adjustments, draw, counts. CPU time of the thread, median over the steps,
the least of several rounds.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from appliance.api.grammar_check import Check, grammar_of
from appliance.core.payload import Sampling
from appliance.worker.adjustments import SampleRow, TokenCounts
from appliance.worker.grammar import Grammar, Grammars
from appliance.worker.sampler import sample
from appliance.worker.torch_engine import read_shape

ROUNDS = 5
STEPS = 60
PROMPT = range(128)
ENDS = (2,)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "color": {"enum": ["red", "green", "blue"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 100},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 4},
    },
    "required": ["name", "color", "count", "tags"],
    "additionalProperties": False,
}
PENALTIES = Sampling(presence_penalty=0.5, frequency_penalty=0.2, repetition_penalty=1.1)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, default=Path("models/tiny-tasks"))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    vocab = read_shape(arguments.model).vocab_size
    grammars = Grammars(arguments.model / "tokenizer.json", vocab_size=vocab)
    text = grammar_of(Check(kind="json_schema", text=json.dumps(SCHEMA)))
    began = time.thread_time()
    grammars.open(text, ends=ENDS, emitted=()).look()
    print(f"tokenizer, compilation and first mask: {1e3 * (time.thread_time() - began):.1f} ms")
    print(f"vocabulary {vocab}; CPU microseconds per step")
    print("| rows | plain | penalties | grammar | both |\n| --- | --- | --- | --- | --- |")
    with torch.inference_mode():
        for batch in arguments.batch:
            cells = [
                measure(grammars if grammar else None, text, sampling, batch=batch, vocab=vocab)
                for grammar in (False, True)
                for sampling in (Sampling(), PENALTIES)
            ]
            plain, penalties, grammar_only, both = (f"{1e6 * seconds:.0f}" for seconds in cells)
            print(f"| {batch} | {plain} | {penalties} | {grammar_only} | {both} |")


def measure(
    grammars: Grammars | None, text: str, sampling: Sampling, *, batch: int, vocab: int
) -> float:
    """CPU seconds of one step of `batch` rows."""
    least = float("inf")
    for round_ in range(ROUNDS):
        generator = torch.Generator().manual_seed(round_)
        opened: list[Grammar | None] = [
            None if grammars is None else grammars.open(text, ends=ENDS, emitted=())
            for _ in range(batch)
        ]
        wanted = TokenCounts.wanted(sampling)
        counts = [TokenCounts(PROMPT, ()) if wanted else None for _ in range(batch)]
        times = []
        for place in range(STEPS):
            logits = torch.randn(batch, vocab, generator=generator)
            began = time.thread_time()
            step(logits, sampling, place=place, opened=opened, counts=counts)
            times.append(time.thread_time() - began)
        least = min(least, statistics.median(times))
    return least


def step(
    logits: torch.Tensor,
    sampling: Sampling,
    *,
    place: int,
    opened: Sequence[Grammar | None],
    counts: Sequence[TokenCounts | None],
) -> None:
    """What the engine does with the logits of one step."""
    rows = [
        SampleRow(sampling, place, place, count, None if grammar is None else grammar.look())
        for grammar, count in zip(opened, counts, strict=True)
    ]
    for drawn, grammar, count in zip(sample(logits, rows), opened, counts, strict=True):
        if grammar is not None:
            grammar.push(drawn.token)
        if count is not None:
            count.push(drawn.token)


if __name__ == "__main__":
    main()
