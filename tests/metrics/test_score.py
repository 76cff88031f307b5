"""Scores, against cases computed by hand."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.types import Slo
from appliance.metrics.score import (
    Capacity,
    EmptySpan,
    attained,
    capacity,
    deadline_attained,
    first_miss,
    quantile,
    spread,
    summarise,
    wilson,
)
from tests.metrics.outcomes import outcome

BATCH = Slo(class_name="batch", e2e=120.0)


def test_attained_is_finished_complete_and_within_every_target() -> None:
    assert attained(outcome())
    assert first_miss(outcome(ttft=1.001)) == "ttft"
    assert first_miss(outcome(tpot=0.0501)) == "tpot"
    assert first_miss(outcome(error="queue_full")) == "error"
    assert first_miss(outcome(finished=False)) == "unfinished"
    assert first_miss(outcome(wanted_tokens=12)) == "unfinished"
    assert first_miss(outcome(ttft=None)) == "unfinished"
    assert first_miss(outcome(ttft=80.0, tpot=5.0, slo=BATCH)) == "e2e"
    assert attained(outcome(ttft=80.0, tpot=3.9, slo=BATCH))


def test_a_single_token_has_no_time_per_token() -> None:
    assert outcome(num_tokens=1).tpot == 0.0
    assert attained(outcome(num_tokens=1))


def test_times_count_from_sending_and_lateness_apart() -> None:
    late = outcome(2.0, late=0.3, ttft=0.9)
    assert attained(late)
    assert late.ttft == pytest.approx(0.9)
    assert late.lateness == pytest.approx(0.3)


def test_deadline_attainment_forgives_what_was_banked() -> None:
    assert deadline_attained(outcome(tpot=0.06, on_time=0.95))
    assert not deadline_attained(outcome(on_time=0.89))
    assert not deadline_attained(outcome(ttft=1.1, on_time=1.0))
    assert not deadline_attained(outcome(error="x"))
    assert not deadline_attained(outcome(ttft=200.0, slo=BATCH))


def test_deadline_attainment_asks_for_the_end_in_time_whatever_the_pace_was() -> None:
    """11 tokens at 60 ms end after 1.1 s: the pace alone is forgiven, the end is not."""
    slow = {"tpot": 0.06, "on_time": 0.95}
    whole = Slo(class_name="whole", ttft=1.0, tpot=0.05, e2e=1.0)
    assert first_miss(outcome(slo=whole, **slow)) == "tpot"
    assert not deadline_attained(outcome(slo=whole, **slow))
    later = msgspec.structs.replace(whole, e2e=1.2)
    assert first_miss(outcome(slo=later, **slow)) == "tpot"
    assert deadline_attained(outcome(slo=later, **slow))


def test_a_run_is_scored_by_hand() -> None:
    run = [
        outcome(9.9, ttft=5.0),  # warm-up
        outcome(10.0),
        outcome(11.0, ttft=2.0),
        outcome(12.0, ttft=0.3, tpot=0.02),
        outcome(19.0, error="queue_full", ttft=None),
        outcome(15.0, slo=BATCH, num_tokens=101, tpot=0.1),
        outcome(20.0, ttft=9.0),  # after the span
    ]
    summary = summarise(
        run, policy="fcfs", load=1.5, span=(10.0, 20.0), instance_seconds=40.0, seed=3
    )
    assert (summary.offered, summary.attained, summary.failed) == (5, 3, 1)
    assert summary.attainment == pytest.approx(0.6)
    assert summary.offered_rate == pytest.approx(0.5)
    assert summary.goodput == pytest.approx(0.3)
    assert summary.token_goodput == pytest.approx((11 + 11 + 101) / 10)
    assert summary.goodput_per_instance == pytest.approx(3 / 40)
    assert (summary.worst_class, summary.worst_class_name) == (0.5, "chat")
    chat, batch = summary.per_class["chat"], summary.per_class["batch"]
    assert (chat.offered, chat.attained, chat.missed) == (4, 2, {"ttft": 1, "error": 1})
    assert batch.attainment == 1.0
    assert chat.ttft_ms.p50 == pytest.approx(500)
    assert chat.ttft_ms.p99 == pytest.approx(2000)
    assert batch.e2e_ms.mean == pytest.approx(500 + 100 * 100)
    assert chat.ci95 == pytest.approx((0.1500, 0.8500), abs=1e-4)
    assert not summary.void


def test_the_summary_has_the_keys_that_were_promised() -> None:
    summary = summarise([outcome()], policy="p", load=1, span=(0, 1), instance_seconds=2)
    data = msgspec.json.decode(msgspec.json.encode(summary))
    promised = {
        "policy",
        "load",
        "attainment",
        "worst_class",
        "per_class",
        "goodput",
        "ttft_ms",
        "tpot_ms",
        "instance_seconds",
    }
    assert promised <= set(data)
    assert {"p50", "p99"} <= set(data["ttft_ms"])
    assert {"p50", "p99"} <= set(data["tpot_ms"])


def test_a_late_client_voids_the_run() -> None:
    run = [outcome(0.01 * n, late=0.049) for n in range(98)]
    on_time = summarise(run, policy="p", load=1, span=(0, 10), instance_seconds=0)
    assert not on_time.void
    late = [*run, outcome(5, late=0.2), outcome(6, late=0.2)]
    assert summarise(late, policy="p", load=1, span=(0, 10), instance_seconds=0).void


@pytest.mark.parametrize("times", [[], [0.5, 10.0]], ids=["nothing", "nothing that counts"])
def test_nothing_offered_has_no_score(times: list[float]) -> None:
    run = [outcome(at) for at in times]
    with pytest.raises(EmptySpan, match=r"1 to 10 s.*make the run longer.*warm-up shorter"):
        summarise(run, policy="p", load=0, span=(1, 10), instance_seconds=0)
    with pytest.raises(ValueError, match="span"):
        summarise([], policy="p", load=0, span=(10, 10), instance_seconds=0)


@pytest.mark.parametrize(
    ("hits", "trials", "low", "high"),
    [(0, 0, 0, 1), (0, 10, 0, 0.2775), (10, 10, 0.7225, 1), (90, 100, 0.8256, 0.9448)],
)
def test_wilson_intervals_are_the_textbooks(
    hits: int, trials: int, low: float, high: float
) -> None:
    assert wilson(hits, trials) == pytest.approx((low, high), abs=1e-4)


@given(st.integers(0, 500), st.integers(1, 500))
def test_a_wilson_interval_holds_the_share(hits: int, trials: int) -> None:
    hits = min(hits, trials)
    low, high = wilson(hits, trials)
    assert 0 <= low <= hits / trials + 1e-12
    assert hits / trials - 1e-12 <= high <= 1


def test_a_quantile_is_the_smallest_that_the_share_does_not_exceed() -> None:
    ordered = [float(n) for n in range(1, 101)]
    assert (quantile(ordered, 0.5), quantile(ordered, 0.99), quantile(ordered, 1.0)) == (
        50,
        99,
        100,
    )
    assert quantile([7.0], 0.99) == 7.0
    assert spread([None, None]).p50 is None
    assert spread([2.0, None, 1.0], scale=10).mean == 15


def test_capacity_is_linear_between_the_bracketing_steps() -> None:
    points = [(10, 1.0), (20, 0.95), (30, 0.75), (40, 0.5)]
    assert capacity(points, 0.9) == Capacity(rate=pytest.approx(22.5), at_least=False)
    assert capacity(points, 0.99).rate == pytest.approx(12.0)


def test_capacity_is_at_least_the_last_step_where_none_failed() -> None:
    assert capacity([(10, 1.0), (20, 0.95)], 0.9) == Capacity(rate=20, at_least=True)


def test_capacity_is_nothing_where_the_first_step_failed() -> None:
    assert capacity([(10, 0.5), (20, 0.95)], 0.9) == Capacity(rate=0.0, at_least=False)
    assert capacity([], 0.9) == Capacity(rate=0.0, at_least=True)


def test_a_point_that_is_good_again_by_chance_is_no_capacity() -> None:
    points = [(10, 1.0), (20, 0.8), (30, 1.0)]
    assert capacity(points, 0.9).rate == pytest.approx(15)


def test_seeds_of_one_rate_are_averaged() -> None:
    points = [(10, 1.0), (10, 0.96), (20, 0.8), (20, 0.84)]
    assert capacity(points, 0.9).rate == pytest.approx(10 + 10 * 0.08 / 0.16)


@given(
    st.lists(st.tuples(st.floats(1, 100), st.floats(0, 1)), min_size=1, max_size=8),
    st.floats(0.05, 0.999),
)
def test_a_stricter_threshold_never_gives_more_capacity(
    points: list[tuple[float, float]], threshold: float
) -> None:
    strict, lax = capacity(points, threshold), capacity(points, threshold / 2)
    assert 0 <= strict.rate <= max(rate for rate, _ in points)
    assert strict.rate <= lax.rate + 1e-9


@given(
    st.lists(
        st.tuples(st.floats(0, 10), st.floats(0.1, 2), st.sampled_from(["a", "b", "c"])),
        max_size=40,
    )
)
def test_the_classes_add_up_to_the_whole(entries: list[tuple[float, float, str]]) -> None:
    run = [outcome(at, ttft=ttft, slo=Slo(class_name=name, ttft=1.0)) for at, ttft, name in entries]
    run.append(outcome(1.0, slo=Slo(class_name="a", ttft=1.0)))
    summary = summarise(run, policy="p", load=1, span=(0, 8), instance_seconds=1)
    classes = summary.per_class.values()
    assert sum(one.offered for one in classes) == summary.offered
    assert sum(one.attained for one in classes) == summary.attained
    assert sum(one.goodput for one in classes) == pytest.approx(summary.goodput)
    assert sum(sum(one.missed.values()) for one in classes) == summary.offered - summary.attained
    assert summary.worst_class == min((one.attainment for one in classes), default=1.0)
