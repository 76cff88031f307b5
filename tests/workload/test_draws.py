"""Chance from a seed and a name."""

from itertools import accumulate
from statistics import fmean, pstdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.workload.draws import Draws


def test_a_seed_and_a_name_give_the_same_numbers_for_ever() -> None:
    draws = Draws(7, "lengths/chat")
    assert [draws.uniform() for _ in range(3)] == [
        0.11623939724124338,
        0.8807761831140646,
        0.7050946075659423,
    ]


def test_streams_of_one_seed_differ() -> None:
    assert Draws(7, "a").uniform() != Draws(7, "b").uniform() != Draws(8, "b").uniform()


@given(st.integers(0, 2**32))
def test_a_uniform_number_is_never_an_end(seed: int) -> None:
    draws = Draws(seed, "x")
    assert all(0.0 < draws.uniform() < 1.0 for _ in range(50))


@pytest.mark.parametrize("shape", [1 / 16, 0.25, 1.0, 4.0])
def test_gamma_has_its_mean_and_variation(shape: float) -> None:
    draws = Draws(3, f"gamma {shape}")
    found = [draws.gamma(shape, 2.0) for _ in range(60000)]
    mean = fmean(found)
    assert mean == pytest.approx(2 * shape, rel=0.06)
    assert pstdev(found) / mean == pytest.approx(shape**-0.5, rel=0.06)


def test_exponential_and_normal_have_their_moments() -> None:
    draws = Draws(4, "x")
    assert fmean(draws.exponential(3.0) for _ in range(40000)) == pytest.approx(3.0, rel=0.03)
    found = [draws.normal() for _ in range(40000)]
    assert fmean(found) == pytest.approx(0.0, abs=0.02)
    assert pstdev(found) == pytest.approx(1.0, rel=0.02)


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=6), st.integers(0, 1000))
def test_pick_follows_the_weights(weights: list[float], seed: int) -> None:
    draws = Draws(seed, "pick")
    cumulative = list(accumulate(weights))
    found = [draws.pick(cumulative) for _ in range(2000)]
    for place, weight in enumerate(weights):
        share = found.count(place) / len(found)
        assert share == pytest.approx(weight / sum(weights), abs=0.08)
