"""Profiles say what the roofline table says, and more work never takes less time."""

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.profiles import (
    DEFAULT_PROFILE,
    KV_SLOT_BYTES,
    PROFILES,
    AnswerLength,
    device_profile,
    paced_kv_slab_bytes,
)

COUNT = st.integers(0, 1 << 20)


def decode_ms(name: str, *, batch: int, context: int) -> float:
    seconds = device_profile(name).step_seconds(
        num_tokens=batch,
        num_samples=batch,
        num_pairs=batch * context,
        num_kv_tokens=batch * context,
    )
    return 1e3 * seconds


def prefill_ms(name: str, tokens: int) -> float:
    seconds = device_profile(name).step_seconds(
        num_tokens=tokens,
        num_samples=1,
        num_pairs=tokens * (tokens + 1) // 2,
        num_kv_tokens=tokens,
    )
    return 1e3 * seconds


@pytest.mark.parametrize(("batch", "floor"), [(1, 3.52), (32, 4.6), (256, 12.5)])
def test_h200_decode_is_the_memory_floor_plus_overhead(batch: int, floor: float) -> None:
    assert decode_ms("h200-8b", batch=batch, context=1024) == pytest.approx(floor + 0.9, rel=0.02)


@pytest.mark.parametrize(("tokens", "floor"), [(2048, 38.0), (8192, 169.0)])
def test_h200_prefill_runs_at_sixty_percent_of_the_matmul_rate(tokens: int, floor: float) -> None:
    assert prefill_ms("h200-8b", tokens) == pytest.approx(floor / 0.6 + 0.9, rel=0.02)


def test_h100_is_slower_where_memory_counts_and_holds_fewer_tokens() -> None:
    assert decode_ms("h100-8b", batch=32, context=1024) > decode_ms(
        "h200-8b", batch=32, context=1024
    )
    assert prefill_ms("h100-8b", 8192) == pytest.approx(prefill_ms("h200-8b", 8192))
    assert device_profile("h100-8b").kv_tokens < device_profile("h200-8b").kv_tokens < 1_000_000


@pytest.mark.parametrize("name", sorted(PROFILES))
@given(counts=st.tuples(COUNT, COUNT, COUNT, COUNT), more=st.tuples(COUNT, COUNT, COUNT, COUNT))
def test_more_work_never_takes_less_time(
    name: str, counts: tuple[int, ...], more: tuple[int, ...]
) -> None:
    fields = ("num_tokens", "num_samples", "num_pairs", "num_kv_tokens")
    profile = device_profile(name)
    small = profile.step_seconds(**dict(zip(fields, counts, strict=True)))
    sums = [a + b for a, b in zip(counts, more, strict=True)]
    assert 0 < small <= profile.step_seconds(**dict(zip(fields, sums, strict=True)))


def test_estimates_are_labelled() -> None:
    for name in ("h200-8b", "h100-8b"):
        assert device_profile(name).note.startswith("estimate")


def test_fixed_profile_lasts_as_long_as_its_name_says_whatever_is_computed() -> None:
    profile = device_profile("fixed-12.5ms")
    for counts in (1, 100_000):
        assert profile.step_seconds(
            num_tokens=counts, num_samples=counts, num_pairs=counts, num_kv_tokens=counts
        ) == pytest.approx(0.0125)
    assert profile.name == "fixed-12.5ms"
    assert profile.note.startswith("synthetic")
    assert profile.kv_tokens >= 256 * 4096


@pytest.mark.parametrize("name", ["fixed-0ms", "fixed-ms", "fixed-20", "fixed--1ms"])
def test_fixed_profile_without_a_duration_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="or fixed-20ms"):
        device_profile(name)


def test_unknown_profile_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'b300'; use one of: cpu, h100-8b, h200-8b"):
        device_profile("b300")
    assert DEFAULT_PROFILE in PROFILES


def test_answers_are_log_normal_and_bounded() -> None:
    answers = AnswerLength(median=100, sigma=0.5, longest=300)
    lengths = [answers.at((index + 0.5) / 1000) for index in range(1000)]
    assert lengths == sorted(lengths)
    assert statistics.median(lengths) == pytest.approx(100, abs=1)
    assert answers.at(1e-18) == 1
    assert max(lengths) == 300


def test_slab_holds_every_slot_and_a_scratch_block() -> None:
    size = paced_kv_slab_bytes(num_blocks=99, block_tokens=16)
    assert size >= 100 * 16 * KV_SLOT_BYTES
    assert size % 4096 == 0
