"""Attainment over time, and recovery after changes."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.metrics.outcome import Outcome
from appliance.metrics.phases import recoveries, windows
from tests.metrics.outcomes import outcome


def stream(*, bad: list[tuple[float, float]], until: float = 60.0) -> list[Outcome]:
    """Ten requests a second; those due within a stretch of `bad` are late."""
    return [
        outcome(at, ttft=2.0 if any(low <= at < high for low, high in bad) else 0.5)
        for at in (place / 10 + 0.05 for place in range(int(until * 10)))
    ]


def test_a_window_counts_what_was_due_in_it() -> None:
    found = windows(stream(bad=[(1, 2)], until=4), start=0, end=4, width=1, step=1)
    assert [(one.start, one.offered, one.attained) for one in found] == [
        (0, 10, 10),
        (1, 10, 0),
        (2, 10, 10),
        (3, 10, 10),
    ]
    assert windows([], start=0, end=1, width=1, step=1)[0].attainment == 1.0
    with pytest.raises(ValueError, match="must be above 0"):
        windows([], start=0, end=1, width=0, step=1)


def test_recovery_is_the_time_until_attainment_is_back() -> None:
    run = stream(bad=[(21, 25)])
    first, second = recoveries(run, [20, 40], end=60, width=1.0, step=0.5)
    assert (first.change, first.until) == (20, 40)
    assert first.lowest == 0.0
    assert first.dip == pytest.approx(0.5)
    assert first.back == first.settled == first.seconds == pytest.approx(5.0)
    assert first.mean == pytest.approx(0.8)
    assert recoveries(run, [], end=60) == []
    assert (second.dip, second.seconds, second.lowest, second.mean) == (None, 0.0, 1.0, 1.0)


def test_a_second_dip_is_back_before_it_is_settled() -> None:
    (found,) = recoveries(stream(bad=[(20, 22), (26, 27)]), [20], end=40, width=1, step=0.5)
    assert found.dip == 0.0
    assert found.back == pytest.approx(2.0)
    assert found.settled == pytest.approx(7.0)


def test_what_never_comes_back_has_no_time() -> None:
    (found,) = recoveries(stream(bad=[(22, 60)]), [20], end=40, width=1, step=0.5)
    assert found.dip == pytest.approx(1.5)
    assert found.back is None
    assert found.seconds is None


@given(
    st.lists(st.tuples(st.floats(0, 60), st.floats(0, 8)), max_size=3),
    st.lists(st.floats(1, 50), min_size=1, max_size=4, unique=True),
)
def test_the_times_of_a_recovery_are_in_order(
    bad: list[tuple[float, float]], changes: list[float]
) -> None:
    run = stream(bad=[(start, start + length) for start, length in bad])
    found = recoveries(run, changes, end=60.0, width=1.0, step=0.25)
    assert [one.change for one in found] == sorted(changes)
    assert all(left.until == right.change for left, right in pairwise(found))
    for one in found:
        known = [time for time in (one.dip, one.back, one.settled) if time is not None]
        assert known == sorted(known)
        assert all(0 <= time <= one.until - one.change for time in known)
        assert (one.lowest < 0.9) == (one.dip is not None)
