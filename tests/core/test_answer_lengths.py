"""Lengths of answers are learnt per class, asked by quantile, and never read from a bound."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.core.answer_lengths import AnswerLengths


def learnt(median: float = 200.0, sigma: float = 0.6, num: int = 300) -> AnswerLengths:
    lengths, rng = AnswerLengths(), random.Random(1)
    for _ in range(num):
        lengths.observe("chat", max(1, round(rng.lognormvariate(0, sigma) * median)))
    return lengths


def test_quantiles_are_those_of_the_answers_seen() -> None:
    lengths = learnt()
    assert lengths.at("chat", 0.5) == pytest.approx(200, rel=0.15)
    assert lengths.at("chat", 0.9) == pytest.approx(200 * 2.157, rel=0.25)  # e^(0.6 * 1.2816)
    assert lengths.num_observed("chat") == 300
    assert lengths.num_observed("batch") == 0


def test_an_answer_under_way_is_longer_than_what_it_has() -> None:
    lengths = learnt()
    assert lengths.at("chat", 0.5, 400) > 400
    assert lengths.at("chat", 0.5, 400) > lengths.at("chat", 0.5)
    assert lengths.at("chat", 0.5, 1_000_000) > 1_000_000  # longer than any that was seen


def test_classes_are_learnt_apart_and_a_new_one_borrows_from_all() -> None:
    lengths = AnswerLengths()
    for _ in range(50):
        lengths.observe("code", 20)
        lengths.observe("batch", 2000)
    assert lengths.at("code", 0.5) == pytest.approx(20, rel=0.2)
    assert lengths.at("batch", 0.5) == pytest.approx(2000, rel=0.2)
    assert lengths.at("chat", 0.25) == pytest.approx(20, rel=0.2)
    assert lengths.at("chat", 0.75) == pytest.approx(2000, rel=0.2)


def test_before_ten_answers_the_guess_fills_in() -> None:
    lengths = AnswerLengths(median=64.0)
    assert lengths.at("chat", 0.5) == pytest.approx(64, rel=0.1)
    lengths.observe("chat", 1000)
    assert lengths.at("chat", 0.5) < 200
    for _ in range(9):
        lengths.observe("chat", 1000)
    assert lengths.at("chat", 0.5) == pytest.approx(1000, rel=0.2)


def test_answers_of_long_ago_are_forgotten() -> None:
    lengths = AnswerLengths(memory=50)
    for _ in range(200):
        lengths.observe("chat", 1000)
    for _ in range(150):
        lengths.observe("chat", 10)
    assert lengths.at("chat", 0.9) == pytest.approx(10, rel=0.2)


@given(
    st.lists(st.integers(0, 5000), max_size=40),
    st.floats(0.01, 0.99),
    st.floats(0.01, 0.99),
    st.integers(0, 6000),
    st.integers(0, 6000),
)
@settings(deadline=None)
def test_it_grows_with_the_quantile_and_with_what_was_emitted(
    seen: list[int], low: float, high: float, less: int, more: int
) -> None:
    lengths = AnswerLengths()
    for length in seen:
        lengths.observe("chat", length)
    low, high = sorted((low, high))
    less, more = sorted((less, more))
    assert lengths.at("chat", low, less) <= lengths.at("chat", high, less) * (1 + 1e-9)
    assert lengths.at("chat", low, less) <= lengths.at("chat", low, more) * (1 + 1e-9)
    assert lengths.at("chat", low, more) > more
