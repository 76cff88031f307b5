"""R12 on whole models: a row's logits are the same bits however it is computed."""

import random

import pytest
import torch

from appliance.modeling import linear
from tests.modeling.checkpoints import VARIANTS, CheckpointStore, load_oracle
from tests.worker.model_runner import ModelRunner

LENGTHS = (1, 3, 17, 64, 130, 290)
VOCAB = 199


def random_tokens(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=length)


@pytest.fixture(scope="module", params=sorted(VARIANTS))
def runner(request: pytest.FixtureRequest, checkpoint: CheckpointStore) -> ModelRunner:
    return ModelRunner(checkpoint(request.param))


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_float32_logits_are_within_1e_4_of_transformers(
    checkpoint: CheckpointStore, name: str
) -> None:
    tokens = random_tokens(1, 300)
    with torch.inference_mode():
        want = load_oracle(checkpoint(name), dtype=torch.float32)(torch.tensor([tokens])).logits[0]
    got = ModelRunner(checkpoint(name)).whole(tokens)
    assert float((got - want).abs().max()) < 1e-4


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_bfloat16_logits_are_near_transformers(checkpoint: CheckpointStore, name: str) -> None:
    tokens = random_tokens(1, 200)
    oracle = load_oracle(checkpoint(name), dtype=torch.float32)
    with torch.inference_mode():
        want = oracle(torch.tensor([tokens])).logits[0]
        theirs = oracle.bfloat16()(torch.tensor([tokens])).logits[0].float()
    got = ModelRunner(checkpoint(name), dtype="bfloat16").whole(tokens)
    assert float((got - want).abs().mean()) < 1.5 * float((theirs - want).abs().mean())


def mixed_run(runner: ModelRunner, sequences: list[list[int]], rng: random.Random) -> int:
    """Compute all sequences in random steps; returns how many rows differ from computing alone."""
    alone = [runner.whole(tokens) for tokens in sequences]
    runner.forget()
    done = [0] * len(sequences)
    differing = 0
    while running := [i for i, tokens in enumerate(sequences) if done[i] < len(tokens)]:
        chosen = [i for i in running if rng.random() < 0.7] or running[:1]
        rng.shuffle(chosen)
        sizes = {i: rng.choice((1, 1, 1, 2, 7, 16, 33, 64, 150)) for i in chosen}
        chunks = [(i, done[i], min(sizes[i], len(sequences[i]) - done[i])) for i in chosen]
        for (i, start, count), logits in zip(chunks, runner.step(sequences, chunks), strict=True):
            differing += int((logits != alone[i][start : start + count]).any(-1).sum())
            done[i] = start + count
    return differing


@pytest.mark.parametrize("seed", [0, 1])
def test_R12_logits_do_not_depend_on_batch_mates_padding_or_chunk_borders(
    runner: ModelRunner, seed: int
) -> None:
    assert runner.decoder.rows, "the products of this machine were not proven row-invariant"
    assert runner.attention.invariant
    sequences = [random_tokens(seed * 100 + i, length) for i, length in enumerate(LENGTHS)]
    assert mixed_run(runner, sequences, random.Random(seed)) == 0


def test_R12_decoding_one_by_one_gives_the_bits_of_one_prefill(runner: ModelRunner) -> None:
    tokens = random_tokens(7, 140)
    alone = runner.whole(tokens)
    runner.forget()
    rows = [runner.step([tokens], [(0, i, 1)])[0] for i in range(len(tokens))]
    assert torch.equal(torch.cat(rows), alone)


def test_R12_holds_for_the_fall_back_product_too(
    checkpoint: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "_packed", lambda weight, bias: None)
    runner = ModelRunner(checkpoint("llama-biased-mha"))
    assert {path.name for path in runner.factory.paths.values()} == {"plain"}
    sequences = [random_tokens(i, length) for i, length in enumerate(LENGTHS)]
    assert mixed_run(runner, sequences, random.Random(3)) == 0


def test_R12_holds_when_a_step_exceeds_the_probed_rows(checkpoint: CheckpointStore) -> None:
    runner = ModelRunner(checkpoint("qwen2"), max_rows=64)
    sequences = [random_tokens(i, length) for i, length in enumerate((200, 150, 90))]
    alone = [runner.whole(tokens) for tokens in sequences]
    runner.forget()
    together = runner.step(sequences, [(i, 0, len(t)) for i, t in enumerate(sequences)])
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_R12_long_random_runs(runner: ModelRunner, seed: int) -> None:
    rng = random.Random(1000 + seed)
    lengths = [rng.choice((1, 5, 40, 127, 128, 129, 200, 400)) for _ in range(9)]
    sequences = [random_tokens(seed * 31 + i, length) for i, length in enumerate(lengths)]
    assert mixed_run(runner, sequences, rng) == 0
