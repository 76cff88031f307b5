"""Drawing tokens: filters, distribution, seeds, log-probabilities, and row-invariance (R12)."""

import math

import numpy as np
import pytest
import torch

from appliance.core.payload import Sampling
from appliance.worker import sampler
from appliance.worker.adjustments import SampleRow
from appliance.worker.sampler import NonFiniteLogits, sample

VOCAB = 300


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def random_logits(rows: int, *, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


def draw(logits: torch.Tensor, sampling: Sampling, *, position: int = 0, emitted: int = 0) -> int:
    (drawn,) = sample(logits.view(1, -1), [SampleRow(sampling, position, emitted)])
    return drawn.token


def frequencies(
    probabilities: list[float], sampling: dict[str, float], draws: int = 4000
) -> list[float]:
    """Share of each token over many positions, drawn in batches of rows with equal logits."""
    logits = torch.tensor(probabilities).log().expand(draws, -1)
    rows = [SampleRow(Sampling(seed=3, **sampling), p, 0) for p in range(draws)]  # type: ignore[arg-type]
    tokens = [drawn.token for drawn in sample(logits, rows)]
    return (np.bincount(tokens, minlength=len(probabilities)) / draws).tolist()


def test_temperature_zero_is_the_largest_logit_whatever_the_filters() -> None:
    logits = random_logits(20)
    greedy = Sampling(temperature=0.0, top_k=3, top_p=0.2, min_p=0.9)
    drawn = sample(logits, [SampleRow(greedy, 0, 0)] * 20)
    assert [d.token for d in drawn] == logits.argmax(-1).tolist()
    assert all(d.logprobs is None for d in drawn)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({}, [0.5, 0.25, 0.15, 0.1]),
        ({"temperature": 0.5}, [w / 0.345 for w in (0.25, 0.0625, 0.0225, 0.01)]),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 0.6}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 0.49}, [1, 0, 0, 0]),
        ({"min_p": 0.25}, [5 / 9, 2.5 / 9, 1.5 / 9, 0]),
        ({"top_k": 3, "top_p": 0.8}, [2 / 3, 1 / 3, 0, 0]),  # top_p of what top_k left
        ({"top_k": 1000, "top_p": 1.0}, [0.5, 0.25, 0.15, 0.1]),
        ({"temperature": 1e-6}, [1, 0, 0, 0]),
    ],
)
def test_draws_follow_the_filtered_distribution(
    sampling: dict[str, float], expected: list[float]
) -> None:
    got = frequencies([0.5, 0.25, 0.15, 0.1], sampling)
    for share, probability in zip(got, expected, strict=True):
        if probability in (0, 1):
            assert share == probability
        else:  # 4.5 standard deviations of 4000 fixed draws
            assert abs(share - probability) < 4.5 * math.sqrt(
                probability * (1 - probability) / 4000
            )


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-45, 1e-40, 1e-30, 1e-7])
def test_a_tiny_temperature_is_as_good_as_zero(temperature: float) -> None:
    logits = random_logits(20)
    for more in ({}, {"top_p": 0.5}, {"top_k": 3}, {"min_p": 1.0}):
        sampling = Sampling(temperature=temperature, seed=1, **more)  # type: ignore[arg-type]
        drawn = sample(logits, [SampleRow(sampling, p, 0) for p in range(20)])
        assert [d.token for d in drawn] == logits.argmax(-1).tolist()


@pytest.mark.parametrize("top_p", [5e-324, 1e-17, 1 - 2**-53])
@pytest.mark.parametrize("min_p", [0.0, 5e-324, 1 - 2**-53, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, VOCAB - 1, VOCAB, 1 << 62])
def test_extreme_filters_draw_a_token_of_the_vocabulary(
    top_p: float, min_p: float, top_k: int
) -> None:
    logits = random_logits(20, scale=60.0)
    for temperature in (5e-324, 1.0, 2.0):
        sampling = Sampling(temperature=temperature, top_p=top_p, min_p=min_p, top_k=top_k, seed=5)
        for drawn in sample(logits, [SampleRow(sampling, p, 0) for p in range(20)]):
            assert 0 <= drawn.token < VOCAB


def test_equal_logits_are_kept_or_dropped_together() -> None:
    shares = frequencies([0.4, 0.2, 0.2, 0.2], {"top_k": 2})
    assert all(share > 0.1 for share in shares)


MIXED = [
    Sampling(temperature=0.0),
    Sampling(temperature=0.7, seed=1),
    Sampling(temperature=1.3, top_k=5, seed=2),
    Sampling(temperature=1.0, top_p=0.8, seed=-3),
    Sampling(temperature=2.0, min_p=0.05, seed=2**64 - 1),
    Sampling(temperature=1.0, top_k=40, top_p=0.9, min_p=0.01, seed=5, logprobs=3),
    Sampling(temperature=0.9, min_tokens=50, stop_token_ids=(7, 8), eos_token_ids=(2,), logprobs=0),
]


def test_R12_a_rows_token_does_not_depend_on_the_rows_beside_it() -> None:
    logits = random_logits(70)
    rows = [SampleRow(MIXED[i % len(MIXED)], position=i * 3, num_emitted=i) for i in range(70)]
    alone = [sample(logits[i : i + 1], rows[i : i + 1])[0] for i in range(70)]
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1)).tolist()
    together = sample(logits[order], [rows[i] for i in order])
    assert together == [alone[i] for i in order]
    assert sample(logits[:40], rows[:40]) == alone[:40]


def test_R12_top_p_gives_the_same_threshold_however_far_it_looks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits = random_logits(40, scale=0.3)  # flat: the nucleus is wide
    wide = [SampleRow(Sampling(seed=i, top_p=0.2 + i / 50), i, 0) for i in range(40)]
    staged = sample(logits, wide)
    monkeypatch.setattr(sampler, "LOOKS", (1 << 31,))
    assert sample(logits, wide) == staged
    monkeypatch.setattr(sampler, "LOOKS", (1, 2, 100, 1 << 31))
    assert sample(logits, wide) == staged
    mate = SampleRow(Sampling(seed=3, top_k=250), 3, 0)
    assert sample(logits, [*wide[:-1], mate])[:-1] == staged[:-1]


def test_a_seed_fixes_the_answer_and_another_one_changes_it() -> None:
    logits = random_logits(1).expand(50, -1)

    def answer(seed: int) -> list[int]:
        rows = [SampleRow(Sampling(seed=seed), p, p) for p in range(50)]
        return [d.token for d in sample(logits, rows)]

    assert answer(4) == answer(4)
    assert answer(4) != answer(5)
    assert len(set(answer(4))) > 5  # positions differ too


def test_min_tokens_forbids_what_would_end_the_answer() -> None:
    logits = torch.zeros(VOCAB)
    logits[2], logits[7] = 50.0, 40.0
    sampling = Sampling(
        temperature=0.0, min_tokens=3, eos_token_ids=(2,), stop_token_ids=(7, VOCAB + 5)
    )
    assert draw(logits, sampling, emitted=2) not in (2, 7)
    assert draw(logits, sampling, emitted=3) == 2
    ignoring = Sampling(temperature=0.0, min_tokens=3, eos_token_ids=(2,), ignore_eos=True)
    assert draw(logits, ignoring, emitted=0) == 2


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = random_logits(3)
    sampling = Sampling(temperature=0.2, top_k=1, logprobs=4, seed=1)
    drawn = sample(
        logits, [SampleRow(sampling, 0, 0), *[SampleRow(Sampling(logprobs=0), 0, 0)] * 2]
    )
    table = logits.double().log_softmax(-1)
    first, second, _ = drawn
    assert first.logprobs is not None
    assert first.logprobs.top_ids == tuple(logits[0].topk(4).indices.tolist())
    assert first.logprobs.top_logprobs == pytest.approx(table[0].topk(4).values.tolist(), abs=1e-5)
    assert first.logprobs.logprob == pytest.approx(float(table[0, first.token]), abs=1e-5)
    assert second.logprobs is not None
    assert second.logprobs.top_ids == ()
    assert second.logprobs.logprob == pytest.approx(float(table[1, second.token]), abs=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_with_non_finite_logits_are_named(bad: float) -> None:
    logits = random_logits(4)
    logits[2, 5] = bad
    with pytest.raises(NonFiniteLogits, match=r"rows \[2\]"):
        sample(logits, [SampleRow(Sampling(), 0, 0)] * 4)


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    logits = torch.full((500, 4), float("-inf"))
    logits[:, 1:3] = 0.0
    rows = [SampleRow(Sampling(seed=9), p, 0) for p in range(500)]
    assert {d.token for d in sample(logits, rows)} == {1, 2}
