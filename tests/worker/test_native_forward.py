"""The native forward pass: its logits are those of transformers, and a row's bits are its own."""

import os
import platform
import random
from pathlib import Path

import pytest
import torch

from appliance.worker.engine import EngineError
from appliance.worker.native.build import Library, NativeUnavailable, ensure_built
from tests.modeling.checkpoints import VARIANTS, CheckpointStore, Variant, load_oracle
from tests.modeling.checkpoints import write_checkpoint as write
from tests.worker.engine_rig import need_native
from tests.worker.native_runner import NativeRunner

VOCAB = 199
LENGTHS = (1, 3, 17, 64, 130, 290)
WIDE = Variant(
    "Llama",
    {
        "hidden_size": 96,
        "head_dim": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "intermediate_size": 2100,
        "num_hidden_layers": 3,
    },
)
"""Longer than what stays in the caches at once, and heads that fill whole vectors."""


def random_tokens(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=length)


@pytest.fixture(scope="module")
def library() -> Library:
    return need_native()


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("wide"), WIDE)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def runner(request: pytest.FixtureRequest, library: Library, wide: Path) -> NativeRunner:
    return NativeRunner(wide, library, dtype=request.param)


def check_oracle(runner: NativeRunner, directory: Path) -> None:
    tokens = random_tokens(1, 300)
    with torch.inference_mode():
        oracle = load_oracle(directory, dtype=torch.float64)
        want = oracle(torch.tensor([tokens])).logits[0].float()
    for length in (*LENGTHS, 300):
        found = runner.whole(tokens[:length])
        assert float((found - want[length - 1]).abs().max()) < 1e-4


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_float32_logits_are_within_1e_4_of_the_float64_oracle(
    checkpoint: CheckpointStore, library: Library, name: str
) -> None:
    check_oracle(NativeRunner(checkpoint(name), library), checkpoint(name))


@pytest.mark.parametrize("block_tokens", [1, 3, 16, 128])
def test_long_products_and_blocks_of_any_size_give_the_oracles_logits(
    library: Library, wide: Path, block_tokens: int
) -> None:
    blocks = 2000 // block_tokens
    runner = NativeRunner(wide, library, block_tokens=block_tokens, num_blocks=blocks)
    check_oracle(runner, wide)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_bfloat16_logits_are_nearer_than_those_of_transformers(
    checkpoint: CheckpointStore, library: Library, name: str
) -> None:
    tokens = random_tokens(1, 200)
    oracle = load_oracle(checkpoint(name), dtype=torch.float32)
    ids = torch.tensor([tokens])
    with torch.inference_mode():
        want = oracle(ids).logits[0, -1]
        theirs = oracle.bfloat16()(ids).logits[0, -1].float()
    got = NativeRunner(checkpoint(name), library, dtype="bfloat16").whole(tokens)
    assert float((got - want).abs().mean()) < float((theirs - want).abs().mean())


def test_R12_a_row_has_the_same_bits_in_batches_of_1_to_33(runner: NativeRunner) -> None:
    sequences = [random_tokens(i, 3 + 5 * i) for i in range(33)]
    alone = [runner.whole(tokens) for tokens in sequences]
    for size in range(1, 34):
        runner.forget()
        order = random.Random(size).sample(range(33), size)
        ahead = [(i, 0, len(sequences[i]) - 1) for i in order]
        runner.step(sequences, ahead)
        last = [(i, len(sequences[i]) - 1, 1) for i in order]
        for i, logits in zip(order, runner.step(sequences, last), strict=True):
            assert torch.equal(logits, alone[i])


@pytest.mark.parametrize("seed", range(3))
def test_R12_logits_do_not_depend_on_batch_mates_or_chunk_borders(
    runner: NativeRunner, seed: int
) -> None:
    rng = random.Random(seed)
    sequences = [random_tokens(seed * 100 + i, length) for i, length in enumerate(LENGTHS)]
    alone = [runner.whole(tokens) for tokens in sequences]
    runner.forget()
    done = [0] * len(sequences)
    while running := [i for i, tokens in enumerate(sequences) if done[i] < len(tokens)]:
        chosen = [i for i in running if rng.random() < 0.7] or running[:1]
        rng.shuffle(chosen)
        sizes = {i: rng.choice((1, 1, 1, 2, 7, 16, 33, 64, 150)) for i in chosen}
        chunks = [(i, done[i], min(sizes[i], len(sequences[i]) - done[i])) for i in chosen]
        for (i, start, count), logits in zip(chunks, runner.step(sequences, chunks), strict=True):
            done[i] = start + count
            if done[i] == len(sequences[i]):
                assert torch.equal(logits, alone[i])


def test_R12_decoding_one_by_one_leaves_the_bits_of_one_prefill(runner: NativeRunner) -> None:
    tokens = random_tokens(7, 140)
    alone = runner.whole(tokens)
    state = runner.state(0)
    runner.forget()
    logits = torch.stack([runner.step([tokens], [(0, i, 1)])[0] for i in range(len(tokens))])
    assert torch.equal(logits[-1], alone)
    assert torch.equal(runner.state(0), state)


def test_the_largest_logit_is_found_as_torch_finds_it_and_nan_is_told(
    runner: NativeRunner,
) -> None:
    sequences = [random_tokens(i, 40) for i in range(20)]
    runner.forget()
    logits = runner.step(sequences, [(i, 0, 40) for i in range(20)])
    assert runner.best == logits.argmax(-1).tolist()
    assert len(set(runner.best)) > 1
    runner.pool.blocks[runner.blocks[3][0]] = float("nan")
    logits = runner.step([[*tokens, 5] for tokens in sequences], [(i, 39, 1) for i in range(20)])
    assert [i for i, best in enumerate(runner.best) if best < 0] == [3]
    assert logits[3].isnan().any()
    assert logits[4].isfinite().all()
    runner.pool.blocks.zero_()


def test_what_is_out_of_bounds_is_refused_and_not_read(runner: NativeRunner) -> None:
    good = random_tokens(1, 40)
    for bad in (VOCAB, -1, 1 << 30):
        runner.forget()
        with pytest.raises(EngineError, match="request 1 has a token, position or block out of"):
            runner.step([good, [*good[:7], bad]], [(0, 0, 40), (1, 0, 8)])
    for block in (runner.pool.num_blocks, -1):
        runner.forget()
        runner.step([good], [(0, 0, 8)])
        runner.blocks[0][0] = block
        with pytest.raises(EngineError, match="request 0 has a"):
            runner.step([good], [(0, 8, 8)])
        runner.blocks[0].clear()
    runner.forget()
    with pytest.raises(EngineError, match="request 0 has a"):
        runner.step([good], [(0, runner.shape.max_positions, 1)])
    runner.forget()
    assert runner.step([good], [(0, 0, 40)]).isfinite().all()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86 processors")
@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3", "x86-64-v4"])
def test_narrower_vectors_give_the_oracles_logits_and_keep_rows_apart(
    library: Library, wide: Path, tmp_path: Path, processor: str
) -> None:
    if processor == "x86-64-v4" and "avx512f" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this machine has no AVX-512")
    environ = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    environ["CC"] = f"{library.compiler.split()[0]} -march={processor}"
    try:
        other = ensure_built(environ=environ)
    except NativeUnavailable as error:
        pytest.skip(f"the compiler does not know {processor}: {error}")
    check_oracle(NativeRunner(wide, other), wide)
    for dtype in ("float32", "bfloat16"):
        runner = NativeRunner(wide, other, dtype=dtype)
        sequences = [random_tokens(i, 20 + i) for i in range(7)]
        alone = [runner.whole(tokens) for tokens in sequences]
        runner.forget()
        together = runner.step(sequences, [(i, 0, len(t)) for i, t in enumerate(sequences)])
        assert torch.equal(together, torch.stack(alone))
