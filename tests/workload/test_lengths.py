"""Lengths of prompts and answers."""

from itertools import pairwise
from statistics import correlation, fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.workload.draws import Draws
from appliance.workload.lengths import (
    FixedLengths,
    LognormalLengths,
    draw_lengths,
    fitted,
    length_tables,
)

TRACES = ("arxiv_summ_lengths", "azure23_code", "azure23_conv")
PUBLISHED = {
    "azure23_conv": ((207, 1020, 2735, 4142), (54, 129, 424, 601), -0.112),
    "azure23_code": ((147, 1469, 5194, 7436), (7, 13, 55, 252), 0.001),
    "arxiv_summ_lengths": ((1242, 2730, 3702, 3934), (78, 167, 372, 3273), -0.463),
}
"""10th, 50th, 90th and 99th percentile of prompts and answers of the traces, and the correlation of
the two."""
LEVELS = (0.1, 0.5, 0.9, 0.99)


def test_the_tables_come_along_with_credit_and_licence() -> None:
    tables = length_tables()
    assert sorted(tables) == sorted(TRACES)
    for table in tables.values():
        assert table.licence in {"CC-BY-4.0", "MIT"}
        assert "20" in table.credit
        assert "Changed" in table.credit
        assert table.source.startswith("https://")


@pytest.mark.parametrize("name", TRACES)
def test_what_is_drawn_has_the_moments_and_percentiles_of_the_trace(name: str) -> None:
    table = length_tables()[name]
    draws = Draws(11, name)
    pairs = [draw_lengths(table, draws) for _ in range(30000)]
    prompts = sorted(prompt for prompt, _ in pairs)
    outputs = sorted(output for _, output in pairs)
    assert fmean(prompts) == pytest.approx(table.prompt_mean, rel=0.02)
    assert fmean(outputs) == pytest.approx(table.output_mean, rel=0.05)
    of_prompts, of_outputs, together = PUBLISHED[name]
    for level, prompt, output in zip(LEVELS, of_prompts, of_outputs, strict=True):
        place = int(level * len(pairs))
        assert prompts[place] == pytest.approx(prompt, rel=0.04, abs=2)
        assert outputs[place] == pytest.approx(output, rel=0.08, abs=2)
    found = correlation([prompt for prompt, _ in pairs], [output for _, output in pairs])
    assert found == pytest.approx(together, abs=0.03)


@pytest.mark.parametrize("name", TRACES)
def test_quantile_functions_rise(name: str) -> None:
    table = length_tables()[name]
    for levels, values in (
        (table.prompt_levels, table.prompt),
        *((table.output_levels, row) for row in table.output),
    ):
        assert len(levels) == len(values)
        assert (levels[0], levels[-1]) == (0.0, 1.0)
        assert all(low < high for low, high in pairwise(levels))
        assert all(low <= high for low, high in pairwise(values))


@given(st.floats(1e-9, 1 - 1e-9), st.floats(1e-9, 1 - 1e-9))
def test_a_drawn_length_lies_within_the_trace(u: float, v: float) -> None:
    for table in length_tables().values():
        prompt, output = table.at(u, v)
        assert max(1, table.prompt[0]) <= prompt <= table.prompt[-1]
        assert 1 <= output <= max(row[-1] for row in table.output)


def test_lognormal_lengths_have_their_medians() -> None:
    lengths = LognormalLengths(
        prompt_median=400, prompt_sigma=1.2, output_median=600, output_sigma=0.9
    )
    assert lengths.at(0.5, 0.5) == (400, 600)
    assert lengths.at(0.8413, 0.5)[0] == pytest.approx(400 * 2.71828**1.2, rel=0.01)


def test_fixed_lengths_are_fixed() -> None:
    assert FixedLengths(prompt=3, output=4).at(0.9, 0.1) == (3, 4)


@given(
    st.integers(1, 100000),
    st.integers(1, 100000),
    st.floats(0.001, 10),
    st.integers(0, 20000).filter(lambda bound: bound == 0 or bound >= 2),
)
def test_fitted_lengths_are_positive_and_within_the_bound(
    prompt: int, output: int, scale: float, max_len: int
) -> None:
    short = fitted(prompt, output, scale=scale, max_len=max_len)
    assert min(short) >= 1
    if max_len:
        assert sum(short) <= max_len
    else:
        assert short == (max(1, round(prompt * scale)), max(1, round(output * scale)))
