"""Traces as workloads."""

import gzip
import json
from collections import Counter
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from appliance.workload.arrivals import Times, parse_arrivals
from appliance.workload.spec import load_spec
from appliance.workload.trace_rows import block_tokens, spread_seconds
from appliance.workload.traces import TraceError, TraceRow, read_trace, trace_items

FIVE = load_spec("five")


def rows(count: int = 300, **more: Any) -> list[TraceRow]:
    return [
        TraceRow(arrival_s=0.5 + 0.1 * place, prompt_tokens=100 + place, output_tokens=5, **more)
        for place in range(count)
    ]


def test_lengths_and_times_are_the_traces_and_classes_come_by_share() -> None:
    items = trace_items(FIVE, rows(3000))
    assert [item.prompt_tokens for item in items] == [100 + place for place in range(3000)]
    assert [item.at for item in items] == pytest.approx([0.1 * place for place in range(3000)])
    found = Counter(item.class_name for item in items)
    assert found["chat"] / 3000 == pytest.approx(0.4, abs=0.03)
    assert items == trace_items(FIVE, rows(3000))
    assert items != trace_items(FIVE, rows(3000), seed=1)


def test_a_load_factor_scales_time_and_seconds_cut_after_that() -> None:
    items = trace_items(FIVE, rows(), load=2.0, seconds=5.0)
    assert len(items) == 100
    assert items[-1].at == pytest.approx(4.95)


def test_a_class_of_the_trace_counts_where_the_specification_has_it() -> None:
    items = trace_items(FIVE, rows(class_name="batch"))
    assert {item.class_name for item in items} == {"batch"}
    assert items[0].slo.e2e == 120.0
    unknown = trace_items(FIVE, rows(class_name="what"))
    assert len({item.class_name for item in unknown}) == 5


def test_a_target_of_the_trace_counts_with_its_class() -> None:
    items = trace_items(FIVE, rows(class_name="own", slo={"ttft_ms": 300, "tpot_ms": 40}))
    assert {item.class_name for item in items} == {"own"}
    assert items[0].slo.ttft == pytest.approx(0.3)
    assert items[0].slo.tpot == pytest.approx(0.04)


def test_coarse_arrivals_are_spread_over_their_step_by_the_seed() -> None:
    coarse = [
        TraceRow(arrival_s=3.0 * (place // 10), prompt_tokens=10, output_tokens=5)
        for place in range(1000)
    ]
    assert spread_seconds(coarse) == 3.0
    items = trace_items(FIVE, coarse, seed=4)
    assert items == trace_items(FIVE, coarse, seed=4)
    times = [item.at for item in items]
    assert all(left <= right for left, right in pairwise(times))
    assert len(set(times)) == 1000
    for step in range(100):
        assert sum(3 * step <= at < 3 * step + 3 for at in times) == 10
    raw = trace_items(FIVE, coarse, spread=0.0)
    assert len({item.at for item in raw}) == 100


def test_fine_arrivals_are_left_alone() -> None:
    assert spread_seconds(rows()) == 0.0
    few = [TraceRow(arrival_s=3.0 * n, prompt_tokens=1, output_tokens=1) for n in range(9)]
    assert spread_seconds(few) == 0.0


@given(st.sampled_from([16, 128, 512]), st.lists(st.integers(1, 9000), min_size=30, max_size=60))
def test_the_size_of_a_prefix_block_is_told_by_the_counts(size: int, prompts: list[int]) -> None:
    prompts = [*prompts, size + 1, 4 * size, 7 * size + 1]
    found = block_tokens(
        [
            TraceRow(
                prompt_tokens=prompt, output_tokens=1, prefix_ids=tuple(range(ceil(prompt / size)))
            )
            for prompt in prompts
        ]
    )
    assert all(ceil(prompt / found) == ceil(prompt / size) for prompt in prompts)


def test_prefixes_are_cut_with_the_prompt() -> None:
    trace = [
        TraceRow(arrival_s=0.0, prompt_tokens=5000, output_tokens=9, prefix_ids=tuple(range(10)))
    ]
    whole = trace_items(FIVE, trace)[0]
    assert (whole.prefix, whole.prefix_block_tokens) == (tuple(range(10)), 512)
    short = trace_items(replace(FIVE, max_len=1100), trace)[0]
    assert short.prompt_tokens == 1091
    assert short.prefix == (0, 1, 2)
    scaled = trace_items(replace(FIVE, length_scale=0.125), trace)[0]
    assert (scaled.prompt_tokens, scaled.prefix_block_tokens) == (625, 64)
    assert scaled.prefix == tuple(range(10))


def test_lengths_without_times_arrive_by_a_process() -> None:
    lengths = [TraceRow(prompt_tokens=n, output_tokens=3) for n in range(1, 100)]
    items = trace_items(FIVE, lengths, rate=10.0, seconds=30.0, seed=1)
    assert len(items) == pytest.approx(300, rel=0.2)
    assert len({item.prompt_tokens for item in items}) > 50
    with pytest.raises(TraceError, match="give a rate and seconds"):
        trace_items(FIVE, lengths)


def test_files_are_read_plain_or_compressed(tmp_path: Path) -> None:
    text = "".join(
        json.dumps({"arrival_s": n, "prompt_tokens": n, "output_tokens": 1, "client": 3}) + "\n"
        for n in range(5)
    )
    plain, packed = tmp_path / "t.jsonl", tmp_path / "t.jsonl.gz"
    plain.write_text(text)
    packed.write_bytes(gzip.compress(text.encode()))
    assert read_trace(plain) == read_trace(packed)
    assert len(read_trace(plain)) == 5
    arrivals = parse_arrivals(f"trace:{packed}")
    assert arrivals == Times(times=(0.0, 1.0, 2.0, 3.0, 4.0))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "has no rows"),
        (b'{"prompt_tokens": 1}\n', "line 1: .*output_tokens"),
        (
            b'{"prompt_tokens": 1, "output_tokens": 2}\n{"prompt_tokens": -1, "output_tokens": 2}',
            "line 2: .*prompt_tokens",
        ),
        (b"nonsense", "line 1: "),
        (b"\x1f\x8b\x00broken", "cannot be read"),
    ],
)
def test_what_is_wrong_in_a_trace_is_named(tmp_path: Path, data: bytes, words: str) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_bytes(data)
    with pytest.raises(TraceError, match=words):
        read_trace(file)
