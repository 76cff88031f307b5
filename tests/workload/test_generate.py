"""Items of a specification."""

from collections import Counter
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from appliance.workload.arrivals import Gamma, Phases
from appliance.workload.generate import generate
from appliance.workload.items import Item
from appliance.workload.spec import Calibration, load_spec

FIVE = load_spec("five")


@settings(max_examples=20)
@given(st.integers(0, 1000), st.floats(0.5, 30), st.sampled_from([None, Gamma(), Phases()]))
def test_items_are_legal_and_follow_from_the_seed(
    seed: int, rate: float, arrivals: Gamma | Phases | None
) -> None:
    items = generate(FIVE, rate=rate, seconds=20.0, seed=seed, arrivals=arrivals)
    assert items == generate(FIVE, rate=rate, seconds=20.0, seed=seed, arrivals=arrivals)
    assert [item.index for item in items] == list(range(len(items)))
    for item in items:
        assert 0 <= item.at < 20.0
        assert item.prompt_tokens >= 1
        assert item.max_tokens == item.output_tokens >= 1
        assert item.prompt_tokens + item.output_tokens <= FIVE.max_len
        assert item.slo.class_name == item.class_name


def by_class(items: list[Item]) -> dict[str, list[tuple[int, int]]]:
    found: dict[str, list[tuple[int, int]]] = {}
    for item in items:
        lengths = (item.prompt_tokens, item.output_tokens)
        found.setdefault(item.class_name, []).append(lengths)
    return found


def test_the_nth_request_of_a_class_is_the_same_at_every_rate() -> None:
    slow = by_class(generate(FIVE, rate=5.0, seconds=60.0, seed=3))
    fast = by_class(generate(FIVE, rate=20.0, seconds=60.0, seed=3, arrivals=Gamma()))
    for name, lengths in slow.items():
        both = min(len(lengths), len(fast[name]))
        assert both > 10
        assert lengths[:both] == fast[name][:both]


def test_seeds_differ() -> None:
    first = generate(FIVE, rate=5.0, seconds=10.0, seed=1)
    assert first != generate(FIVE, rate=5.0, seconds=10.0, seed=2)


def test_lengths_scale_for_small_models() -> None:
    small = replace(FIVE, length_scale=0.1, max_len=400)
    full = generate(FIVE, rate=50.0, seconds=60.0, seed=3)
    scaled = generate(small, rate=50.0, seconds=60.0, seed=3)
    assert max(item.prompt_tokens + item.output_tokens for item in scaled) <= 400
    ratio = fmean(i.prompt_tokens for i in scaled) / fmean(i.prompt_tokens for i in full)
    assert 0.07 < ratio <= 0.1
    assert [item.at for item in full] == [item.at for item in scaled]


def test_max_tokens_can_be_far_above_the_true_length_and_says_nothing_of_it() -> None:
    vague = replace(FIVE, max_tokens=4096)
    plain = generate(FIVE, rate=20.0, seconds=30.0, seed=3)
    items = generate(vague, rate=20.0, seconds=30.0, seed=3)
    assert [item.output_tokens for item in items] == [item.output_tokens for item in plain]
    room = [item for item in items if item.prompt_tokens + 4096 <= FIVE.max_len]
    assert len(room) > 0.9 * len(items)
    assert {item.max_tokens for item in room if item.output_tokens <= 4096} == {4096}
    assert all(item.prompt_tokens + item.max_tokens <= FIVE.max_len for item in items)


def test_targets_are_scaled_and_relative_where_asked() -> None:
    calibration = Calibration(a=0.01, b=0.0001, tpot0=0.004)
    tight = replace(FIVE, slo_scale=0.5)
    items = generate(tight, rate=20.0, seconds=10.0, seed=3, calibration=calibration)
    chat = next(item for item in items if item.class_name == "chat")
    expected = 0.5 * (5 * (0.01 + 0.0001 * chat.prompt_tokens) + 0.05)
    assert chat.slo.ttft == pytest.approx(expected)
    assert chat.slo.tpot == pytest.approx(0.004)


def test_shares_are_as_specified() -> None:
    found = Counter(item.class_name for item in generate(FIVE, rate=200.0, seconds=60.0, seed=9))
    for one in FIVE.classes:
        assert found[one.name] / found.total() == pytest.approx(one.share, abs=0.015)
