"""Make `appliance/workload/length_tables.json` from request traces.

    python tools/make_length_tables.py TRACES_DIRECTORY [--out FILE]

The directory holds gzip'd JSON lines with `prompt_tokens` and `output_tokens`, one file per trace.
Each trace becomes joint quantiles (`appliance/workload/lengths.py` has the theory): some hundred
numbers instead of thousands of rows. The means of the rows are kept beside them, so that a test can
compare what is drawn with what was recorded."""

import argparse
import gzip
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import msgspec

from appliance.workload.lengths import LengthTable

CREDIT = {
    "azure23_conv": (
        "Azure LLM inference trace 2023 (conversation); Patel et al., Splitwise: Efficient"
        " generative LLM inference using phase splitting, ISCA 2024",
        "CC-BY-4.0",
        "https://github.com/Azure/AzurePublicDataset",
    ),
    "azure23_code": (
        "Azure LLM inference trace 2023 (code); Patel et al., Splitwise: Efficient generative LLM"
        " inference using phase splitting, ISCA 2024",
        "CC-BY-4.0",
        "https://github.com/Azure/AzurePublicDataset",
    ),
    "arxiv_summ_lengths": (
        "Vidur, arXiv summarisation lengths, Llama-2 tokenizer; Agrawal et al., Vidur: A"
        " large-scale simulation framework for LLM inference, MLSys 2024; Copyright (c) Microsoft"
        " Corporation",
        "MIT",
        "https://github.com/microsoft/vidur",
    ),
}
BINS = 24
_TAIL = (0.985, 0.99, 0.995, 0.998, 0.999)


def main() -> None:
    """Read the traces, write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", type=Path)
    parser.add_argument("--out", type=Path, default=Path("appliance/workload/length_tables.json"))
    options = parser.parse_args()
    tables = [table(name, read_pairs(options.traces / f"{name}.jsonl.gz")) for name in CREDIT]
    lines = [msgspec.json.encode(one).decode() for one in tables]
    options.out.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    for one in tables:
        print(f"{one.name}: {one.rows} rows, {len(one.output)} bins")
    print(f"{options.out}: {options.out.stat().st_size} bytes")


def read_pairs(path: Path) -> list[tuple[int, int]]:
    """(prompt, output) tokens of each row."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [(row["prompt_tokens"], row["output_tokens"]) for row in rows]


def table(name: str, pairs: Sequence[tuple[int, int]]) -> LengthTable:
    """The joint quantiles of these pairs."""
    credit, licence, source = CREDIT[name]
    ordered = sorted(pairs)
    prompt_levels = levels(96)
    output_levels = levels(32)
    edges = [round(place * len(ordered) / BINS) for place in range(BINS + 1)]
    return LengthTable(
        name=name,
        credit=f"{credit}. Changed: reduced to joint quantiles of prompt and output lengths.",
        licence=licence,
        source=source,
        rows=len(ordered),
        prompt_mean=round(fmean(prompt for prompt, _ in ordered), 2),
        output_mean=round(fmean(output for _, output in ordered), 2),
        prompt_levels=prompt_levels,
        prompt=quantiles([prompt for prompt, _ in ordered], prompt_levels),
        output_levels=output_levels,
        output=tuple(
            quantiles(sorted(output for _, output in ordered[low:high]), output_levels)
            for low, high in pairwise(edges)
        ),
    )


def levels(count: int) -> tuple[float, ...]:
    """Equal steps from 0 to 1, and finer ones in the upper tail."""
    even = {round(place / count, 5) for place in range(count + 1)}
    return tuple(sorted(even | set(_TAIL)))


def quantiles(ordered: Sequence[int], at: Sequence[float]) -> tuple[int, ...]:
    """Values of sorted numbers at these levels, linear between neighbours."""
    last = len(ordered) - 1
    values = []
    for level in at:
        low = int(level * last)
        high = min(low + 1, last)
        share = level * last - low
        values.append(round(ordered[low] + share * (ordered[high] - ordered[low])))
    return tuple(values)


if __name__ == "__main__":
    main()
