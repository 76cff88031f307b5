"""What changes logits before a draw: penalties, biases and masks, row by row (R12)."""

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from appliance.core.payload import Sampling
from appliance.worker.adjustments import MASKED, SampleRow, TokenCounts, adjust
from appliance.worker.sampler import sample

VOCAB = 300
WORDS = -(-VOCAB // 32)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def random_logits(rows: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 4


def mask_of(allowed: Sequence[int]) -> np.ndarray:
    bits = np.zeros(WORDS * 32, np.uint8)
    bits[list(allowed)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def row(
    sampling: Sampling,
    *,
    prompt: Sequence[int] = (),
    emitted: Sequence[int] = (),
    allowed: Sequence[int] | None = None,
) -> SampleRow:
    counts = TokenCounts(prompt, emitted) if TokenCounts.wanted(sampling) else None
    mask = None if allowed is None else mask_of(allowed)
    position = len(prompt) + len(emitted)
    return SampleRow(sampling, position, len(emitted), counts, mask)


def by_the_book(
    logits: torch.Tensor,
    sampling: Sampling,
    *,
    prompt: Sequence[int],
    emitted: Sequence[int],
    allowed: Sequence[int] | None,
) -> torch.Tensor:
    """One row, token by token, in float32, as the module's text says."""
    out = logits.clone()
    one = torch.tensor
    for token in range(VOCAB):
        value = out[token]
        if allowed is not None and token not in allowed:
            value = one(MASKED)
        value = value + one(dict(sampling.logit_bias).get(token, 0.0))
        count = emitted.count(token)
        if count or token in prompt:
            penalty = one(sampling.repetition_penalty)
            value = value / penalty if value > 0 else value * penalty
            value = value - one(sampling.frequency_penalty) * one(float(count))
            if count:
                value = value - one(sampling.presence_penalty)
        out[token] = value
    return out


SAMPLINGS = [
    Sampling(presence_penalty=0.7),
    Sampling(frequency_penalty=-1.3),
    Sampling(repetition_penalty=1.2),
    Sampling(repetition_penalty=0.8, presence_penalty=-2.0, frequency_penalty=2.0),
    Sampling(logit_bias=((5, 100.0), (7, -100.0), (11, 0.5))),
    Sampling(repetition_penalty=1.5, logit_bias=((3, -9.0), (20, 9.0)), frequency_penalty=0.25),
    Sampling(),
]


def some_rows(count: int) -> list[tuple[SampleRow, dict[str, Sequence[int] | None]]]:
    rng = random.Random(4)
    found = []
    for index in range(count):
        sampling = SAMPLINGS[index % len(SAMPLINGS)]
        facts: dict[str, Sequence[int] | None] = {
            "prompt": rng.choices(range(60), k=rng.randint(1, 30)),
            "emitted": rng.choices(range(40), k=rng.randint(0, 50)),
            "allowed": sorted(rng.sample(range(VOCAB), 30)) if index % 3 == 0 else None,
        }
        found.append((row(sampling, **facts), facts))  # type: ignore[arg-type]
    return found


def test_every_change_is_that_of_the_book() -> None:
    rows = some_rows(35)
    logits = random_logits(35)
    got = adjust(logits, [each for each, _ in rows])
    for index, (each, facts) in enumerate(rows):
        want = by_the_book(logits[index], each.sampling, **facts)  # type: ignore[arg-type]
        assert torch.equal(got[index], want), index


def test_rows_that_ask_for_nothing_get_the_very_tensor() -> None:
    logits = random_logits(3)
    assert adjust(logits, [row(Sampling())] * 3) is logits
    before = logits.clone()
    assert adjust(logits, [row(Sampling(presence_penalty=1.0), emitted=[3])] * 3) is not logits
    assert torch.equal(logits, before)


def test_R12_a_changed_row_does_not_depend_on_the_rows_beside_it() -> None:
    rows = [each for each, _ in some_rows(32)]
    logits = random_logits(32)
    together = adjust(logits, rows)
    for index, each in enumerate(rows):
        assert torch.equal(adjust(logits[index : index + 1], [each])[0], together[index])
    drawn = sample(logits, rows)
    assert drawn == [sample(logits[i : i + 1], rows[i : i + 1])[0] for i in range(32)]


def test_R5_counts_of_a_sequence_taken_over_are_those_of_one_that_stayed() -> None:
    rng = random.Random(1)
    prompt, emitted = rng.choices(range(50), k=20), rng.choices(range(70), k=60)
    stayed = TokenCounts(prompt, [])
    for place, token in enumerate(emitted):
        stayed.push(token)
        moved = TokenCounts(prompt, emitted[: place + 1])
        assert dict(zip(*map(list, moved.columns()), strict=True)) == dict(
            zip(*map(list, stayed.columns()), strict=True)
        )


def test_presence_counts_once_and_frequency_each_time() -> None:
    logits = torch.zeros(1, VOCAB)
    emitted = [4, 4, 4, 9]
    got = adjust(logits, [row(Sampling(presence_penalty=0.5), prompt=[8], emitted=emitted)])[0]
    assert [got[t].item() for t in (4, 8, 9)] == [-0.5, 0.0, -0.5]
    got = adjust(logits, [row(Sampling(frequency_penalty=0.5), prompt=[8], emitted=emitted)])[0]
    assert [got[t].item() for t in (4, 8, 9)] == [-1.5, 0.0, -0.5]


def test_repetition_penalty_sees_the_prompt_too_and_both_signs() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 8], logits[0, 9] = 3.0, -3.0
    got = adjust(logits, [row(Sampling(repetition_penalty=2.0), prompt=[8], emitted=[9])])[0]
    assert (got[8].item(), got[9].item()) == (1.5, -6.0)


def test_a_bias_forces_or_bans_a_token() -> None:
    logits = random_logits(1)
    best = int(logits.argmax())
    forced = Sampling(temperature=0.0, logit_bias=((17, 100.0),))
    banned = Sampling(temperature=0.0, logit_bias=((best, -100.0), (VOCAB + 3, 100.0)))
    assert sample(logits, [row(forced)])[0].token == 17
    assert sample(logits, [row(banned)])[0].token != best


def test_a_bias_does_not_bring_back_what_the_grammar_forbids() -> None:
    sampling = Sampling(seed=3, logit_bias=((17, 100.0), (200, -100.0)), presence_penalty=-2.0)
    drawn = sample(random_logits(200), [row(sampling, emitted=[17], allowed=[200, 201])] * 200)
    assert {each.token for each in drawn} <= {200, 201}


def test_a_grammar_at_its_end_wins_over_min_tokens() -> None:
    sampling = Sampling(min_tokens=9, eos_token_ids=(2,), temperature=0.0)
    assert sample(random_logits(1), [row(sampling, allowed=[2])])[0].token == 2
    assert sample(torch.eye(VOCAB)[2:3], [row(sampling)])[0].token != 2


def test_logprobs_are_those_of_the_model_whatever_is_changed() -> None:
    logits = random_logits(1)
    sampling = Sampling(temperature=0.0, logprobs=3, logit_bias=((17, 100.0),))
    (drawn,) = sample(logits, [row(sampling, allowed=[17, 18])])
    assert drawn.logprobs is not None
    assert drawn.logprobs.logprob == pytest.approx(float(logits.log_softmax(-1)[0, 17]), abs=1e-5)
    assert drawn.logprobs.top_ids == tuple(logits[0].topk(3).indices.tolist())
