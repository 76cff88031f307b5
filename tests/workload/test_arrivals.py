"""When requests come."""

from collections import Counter
from itertools import pairwise
from statistics import fmean, pstdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.workload.arrivals import (
    Arrivals,
    ArrivalsError,
    Gamma,
    Phases,
    Poisson,
    Steps,
    Times,
    arrival_times,
    change_times,
    parse_arrivals,
    rate_pieces,
)

SHARES = {"chat": 0.4, "code": 0.2, "summarisation": 0.15, "reasoning": 0.1, "batch": 0.15}
KINDS: list[Arrivals] = [
    Poisson(),
    Gamma(cv=2.0),
    Gamma(cv=4.0),
    Phases(seconds=20.0),
    Phases(seconds=7.0, classes=("summarisation", "reasoning")),
    Times(times=(0.0, 0.1, 0.2, 5.0, 5.1, 9.0)),
]


@pytest.mark.parametrize("arrivals", KINDS, ids=str)
def test_the_mean_rate_is_as_asked(arrivals: Arrivals) -> None:
    counts = [
        len(arrival_times(arrivals, rate=20.0, seconds=100.0, shares=SHARES, seed=seed))
        for seed in range(40)
    ]
    assert fmean(counts) / 100.0 == pytest.approx(20.0, rel=0.04)


@pytest.mark.parametrize("cv", [1.0, 2.0, 4.0])
def test_gaps_have_the_variation_asked_for(cv: float) -> None:
    gaps: list[float] = []
    for seed in range(8):
        times = arrival_times(Gamma(cv=cv), rate=20.0, seconds=800.0, shares=SHARES, seed=seed)
        gaps += [right - left for (left, _), (right, _) in pairwise(times)]
    assert pstdev(gaps) / fmean(gaps) == pytest.approx(cv, rel=0.06)


def test_a_bursty_process_is_in_equilibrium_from_the_first_second() -> None:
    first = [
        sum(
            at < 1.0
            for at, _ in arrival_times(
                Gamma(cv=4.0), rate=20.0, seconds=1.0, shares=SHARES, seed=seed
            )
        )
        for seed in range(3000)
    ]
    assert fmean(first) == pytest.approx(20.0, rel=0.06)


@settings(max_examples=30)
@given(
    st.sampled_from(KINDS),
    st.floats(0.5, 40),
    st.floats(1, 60),
    st.integers(0, 2**20),
)
def test_times_rise_within_the_run_and_follow_from_the_seed(
    arrivals: Arrivals, rate: float, seconds: float, seed: int
) -> None:
    found = arrival_times(arrivals, rate=rate, seconds=seconds, shares=SHARES, seed=seed)
    again = arrival_times(arrivals, rate=rate, seconds=seconds, shares=SHARES, seed=seed)
    assert found == again
    assert all(left[0] <= right[0] for left, right in pairwise(found))
    assert all(0 <= at < seconds for at, _ in found)
    assert {name for _, name in found} <= set(SHARES)


@pytest.mark.parametrize("arrivals", [Poisson(), Gamma(cv=4.0), Phases(seconds=20.0)], ids=str)
def test_classes_have_their_shares_over_whole_cycles(arrivals: Arrivals) -> None:
    found: Counter[str] = Counter()
    for seed in range(10):
        times = arrival_times(arrivals, rate=30.0, seconds=100.0, shares=SHARES, seed=seed)
        found.update(name for _, name in times)
    for name, share in SHARES.items():
        assert found[name] / found.total() == pytest.approx(share, rel=0.06)


def test_in_its_phase_a_class_comes_six_times_as_often_as_out_of_it() -> None:
    arrivals = Phases(seconds=20.0)
    inside = outside = 0
    for seed in range(10):
        for at, name in arrival_times(arrivals, rate=30.0, seconds=100.0, shares=SHARES, seed=seed):
            if name == "code":
                inside += 20 <= at < 40
                outside += not 20 <= at < 40
    assert inside / (outside / 4) == pytest.approx(6.0, rel=0.08)


@given(st.floats(1, 50), st.floats(5, 200), st.floats(1, 30))
def test_phases_keep_the_mean_rate_whatever_the_cut(
    rate: float, seconds: float, phase: float
) -> None:
    pieces = rate_pieces(Phases(seconds=phase), rate=rate, seconds=seconds, shares=SHARES)
    assert pieces[0].start == 0
    assert pieces[-1].end == seconds
    assert all(left.end == right.start for left, right in pairwise(pieces))
    offered = sum((piece.end - piece.start) * sum(piece.rates.values()) for piece in pieces)
    assert offered == pytest.approx(rate * seconds)


def test_whole_cycles_of_five_classes_need_no_common_factor() -> None:
    pieces = rate_pieces(Phases(seconds=20.0), rate=10.0, seconds=100.0, shares=SHARES)
    assert pieces[0].rates == pytest.approx(
        {"chat": 12.0, "code": 1.0, "summarisation": 0.75, "reasoning": 0.5, "batch": 0.75}
    )


def test_steps_are_factors_of_the_rate_asked_for() -> None:
    arrivals = Steps(steps=((60.0, 3.0), (60.0, 0.5)))
    times = arrival_times(arrivals, rate=20.0, seconds=200.0, shares=SHARES, seed=1)
    high = sum(at < 60 for at, _ in times)
    assert high / 60 == pytest.approx(60.0, rel=0.06)
    assert (len(times) - high) / 60 == pytest.approx(10.0, rel=0.15)
    assert times[-1][0] < 120
    assert change_times(arrivals, rate=20.0, seconds=200.0, shares=SHARES) == [60.0]


def test_changes_are_the_starts_of_the_phases_but_the_first() -> None:
    changes = change_times(Phases(seconds=20.0), rate=5.0, seconds=90.0, shares=SHARES)
    assert changes == [20.0, 40.0, 60.0, 80.0]
    assert change_times(Poisson(), rate=5.0, seconds=90.0, shares=SHARES) == []


def test_recorded_times_keep_their_pattern_when_they_are_scaled() -> None:
    arrivals = Times(times=(0.0, 1.0, 3.0))
    found = [at for at, _ in arrival_times(arrivals, rate=2.0, seconds=4.0, shares=SHARES, seed=1)]
    assert found == pytest.approx([0, 1 / 3, 1, 1.5, 1.5 + 1 / 3, 2.5, 3, 3 + 1 / 3])


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("poisson", Poisson()),
        ("gamma:2.5", Gamma(cv=2.5)),
        ("gamma", Gamma(cv=4.0)),
        ("phases", Phases(seconds=20.0)),
        ("phases:12", Phases(seconds=12.0)),
        ("phases:12:chat,code", Phases(seconds=12.0, classes=("chat", "code"))),
        ("steps:60x3,120x0.5", Steps(steps=((60.0, 3.0), (120.0, 0.5)))),
    ],
)
def test_arrivals_are_read_from_words(text: str, meant: Arrivals) -> None:
    assert parse_arrivals(text) == meant


@pytest.mark.parametrize(
    "text",
    [
        "",
        "uniform",
        "poisson:3",
        "gamma:x",
        "gamma:0",
        "gamma:nan",
        "phases:-1",
        "steps",
        "steps:60",
        "steps:60x",
        "steps:60x-1",
        "trace",
        "trace:nowhere.jsonl",
    ],
)
def test_words_that_mean_nothing_are_refused_with_what_can_be_written(text: str) -> None:
    with pytest.raises(ArrivalsError, match=r"write|must be|cannot be read"):
        parse_arrivals(text)


def test_a_phase_of_an_unknown_class_is_refused_by_name() -> None:
    with pytest.raises(ArrivalsError, match="'chatt'; known: chat, code"):
        arrival_times(Phases(classes=("chatt",)), rate=1.0, seconds=9.0, shares=SHARES, seed=0)
