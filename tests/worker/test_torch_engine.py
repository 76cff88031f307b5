"""The CPU engine over both forward passes: tokens equal to transformers', slabs, refusals."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs

from appliance.core.model_shape import UnsupportedModel
from appliance.core.payload import Sampling
from appliance.core.types import Phase, RequestId, SeqWork, StepPlan
from appliance.modeling.errors import WeightError
from appliance.modeling.slab import STATE_FILLING
from appliance.worker.engine import EngineError
from appliance.worker.torch_engine import TorchEngine, read_shape
from tests.modeling.checkpoints import VARIANTS, CheckpointStore, load_oracle
from tests.worker.engine_rig import Driver, Slabs, state_of

NUM_BLOCKS = 400
NEW = 12
LENGTHS = [5, 33, 64, 1, 16, 90, 140, 17] * 4


def random_prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(199), k=length)


PROMPTS = [random_prompt(i, length) for i, length in enumerate(LENGTHS)]


class Rig:
    """An engine of one checkpoint and fresh drivers for it."""

    def __init__(self, directory: Path, *, native: str) -> None:
        self.directory = directory
        self.slabs = Slabs(directory, num_blocks=NUM_BLOCKS, native=native)
        self.engine = self.slabs.engine()

    def driver(self, seed: int = 0) -> Driver:
        for name in range(100):
            self.engine.drop(RequestId(name))
        return Driver(self.engine, num_blocks=NUM_BLOCKS, seed=seed)

    def alone(self, prompt: Sequence[int], sampling: Sampling | None = None) -> list[int]:
        """The answer of a prompt that has the engine to itself, prompt in one chunk."""
        driver = self.driver()
        driver.add(0, prompt, sampling=sampling)
        driver.generate({0: len(prompt) + NEW})
        return driver.known[0][len(prompt) :]


BOTH = pytest.mark.parametrize("native", ["off", "required"])


@pytest.fixture(scope="module", params=["off", "required"])
def rig(request: pytest.FixtureRequest, checkpoint: CheckpointStore) -> Iterator[Rig]:
    made = Rig(checkpoint("qwen3"), native=request.param)
    yield made
    made.slabs.close()


def check_against_oracle(oracle: Any, prompt: Sequence[int], answer: Sequence[int]) -> int:
    """R12: each token is the float64 argmax given those before it, up to the first near tie.

    Returns how many tokens were compared."""
    with torch.inference_mode():
        logits = oracle(torch.tensor([[*prompt, *answer[:-1]]])).logits[0, len(prompt) - 1 :]
    best = logits.topk(2, -1)
    for i, token in enumerate(answer):
        if token != best.indices[i, 0]:
            gap = float(best.values[i, 0] - best.values[i, 1])
            assert gap < 1e-4, f"token {i}: {token} != {int(best.indices[i, 0])}, gap {gap}"
            return i
    return len(answer)


@BOTH
@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_R12_greedy_tokens_equal_those_of_transformers_alone_and_among_32(
    checkpoint: CheckpointStore, name: str, native: str
) -> None:
    rig = Rig(checkpoint(name), native=native)
    oracle = load_oracle(checkpoint(name), dtype=torch.float64)
    answers: dict[str, list[list[int]]] = {"alone": [rig.alone(p) for p in PROMPTS[:8]]}
    for kind, chunk in (("whole", 512), ("chunked", 13)):
        driver = rig.driver(seed=chunk)
        for i, prompt in enumerate(PROMPTS):
            driver.add(i, prompt)
        driver.generate({i: len(p) + NEW for i, p in enumerate(PROMPTS)}, chunk=chunk)
        answers[kind] = [driver.known[i][len(p) :] for i, p in enumerate(PROMPTS)]
    rig.slabs.close()
    assert answers["whole"] == answers["chunked"]
    assert answers["alone"] == answers["whole"][:8]
    compared = sum(
        check_against_oracle(oracle, prompt, answer)
        for prompt, answer in zip(PROMPTS, answers["whole"], strict=True)
    )
    assert compared == len(PROMPTS) * NEW  # no near tie in these fixed prompts


def test_R12_a_prefix_hit_changes_no_token(rig: Rig) -> None:
    prompt = random_prompt(50, 70)
    want = rig.alone(prompt)
    driver = rig.driver()
    driver.add(0, [*prompt[:64], 3, 4, 5])
    driver.step([0])
    driver.add(1, prompt, hit=driver.tables[0][:4])
    assert driver.computed[1] == 64
    driver.generate({0: 80, 1: len(prompt) + NEW})
    assert driver.known[1][len(prompt) :] == want


def test_R12_preemption_by_recompute_changes_no_token(rig: Rig) -> None:
    prompt = random_prompt(51, 40)
    sampling = Sampling(temperature=1.0, seed=11, top_p=0.95)
    want = rig.alone(prompt, sampling)
    driver = rig.driver()
    driver.add(0, prompt, sampling=sampling)
    driver.add(1, random_prompt(52, 30))
    driver.generate({0: 45, 1: 38})
    driver.preempt(0)
    driver.step([1])
    driver.generate({0: len(prompt) + NEW}, chunk=24)
    assert driver.known[0][len(prompt) :] == want


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=0.8, seed=5, top_k=50)])
def test_R5_another_engine_goes_on_from_the_emitted_tokens(
    rig: Rig, sampling: Sampling | None
) -> None:
    prompt = random_prompt(53, 21)
    want = rig.alone(prompt, sampling)
    successor = rig.slabs.engine(load=False)
    assert successor.info.weights_source == "slab"
    driver = Driver(successor, num_blocks=NUM_BLOCKS, seed=9)
    driver.add(0, prompt, emitted=want[:7], sampling=sampling)
    driver.generate({0: len(prompt) + NEW}, chunk=8)
    assert driver.known[0][len(prompt) :] == want


def test_a_step_mixes_prompt_chunks_and_decodes_and_samples_only_what_is_complete(rig: Rig) -> None:
    driver = rig.driver()
    driver.add(0, random_prompt(54, 10))
    driver.step([0])
    driver.add(1, random_prompt(55, 50))
    assert [s.id for s in driver.step([1, 0], chunk=30)] == [0]
    assert [s.id for s in driver.step([1, 0], chunk=30)] == [1, 0]
    only_chunk = driver.engine
    driver.add(2, random_prompt(56, 60))
    assert driver.step([2], chunk=5) == []
    assert driver.engine is only_chunk


def test_logprobs_come_with_the_token(rig: Rig) -> None:
    driver = rig.driver()
    driver.add(0, random_prompt(57, 10), sampling=Sampling(temperature=0.0, logprobs=2))
    driver.add(1, random_prompt(58, 10))
    first, second = driver.step([0, 1])
    assert first.logprobs is not None
    assert first.logprobs.top_ids[0] == first.token
    assert first.logprobs.logprob == first.logprobs.top_logprobs[0] < 0
    assert second.logprobs is None


def test_dropped_sequences_are_skipped_and_their_rows_used_again(rig: Rig) -> None:
    driver = rig.driver()
    for name in range(40):  # more than max_num_seqs: the tables grow
        driver.add(name, random_prompt(name, 20))
    work = tuple(driver.work(name, chunk=512) for name in range(40))
    for name in range(0, 40, 2):
        rig.engine.drop(RequestId(name))
    rig.engine.drop(RequestId(999))
    sampled = rig.engine.execute(StepPlan(step=1, work=work))
    assert [s.id for s in sampled] == list(range(1, 40, 2))
    assert rig.engine.execute(StepPlan(step=2, work=work[:1])) == []
    driver.add(0, PROMPTS[1])
    driver.generate({0: len(PROMPTS[1]) + NEW})
    assert driver.known[0][len(PROMPTS[1]) :] == rig.alone(PROMPTS[1])


def test_R13_non_finite_state_is_named_and_never_reaches_the_blocks_next_owner(rig: Rig) -> None:
    want = rig.alone(PROMPTS[2])
    driver = rig.driver()
    driver.add(7, random_prompt(60, 30))
    driver.add(8, random_prompt(61, 30))
    driver.step([7, 8])
    rig.engine.pool.blocks[driver.tables[7][0]] = float("nan")
    with pytest.raises(EngineError, match=r"request 7 are not finite.*checkpoint"):
        driver.step([8, 7])
    blocks = driver.tables[7]
    rig.engine.pool.blocks[blocks] = float("nan")
    driver = rig.driver()
    driver.free = [b for b in driver.free if b not in blocks] + blocks
    driver.add(0, PROMPTS[2])
    driver.generate({0: len(PROMPTS[2]) + NEW})
    assert set(blocks) & set(driver.tables[0])
    assert driver.known[0][len(PROMPTS[2]) :] == want


def test_a_plan_beyond_known_tokens_or_blocks_is_refused(rig: Rig) -> None:
    driver = rig.driver()
    driver.add(0, random_prompt(62, 20))
    work = driver.work(0, chunk=20)
    for wrong in (
        structs.replace(work, num_tokens=21),
        structs.replace(work, new_blocks=((1,),)),
        structs.replace(work, new_blocks=(tuple(range(60)),)),
    ):
        with pytest.raises(EngineError, match="disagree about request 0"):
            rig.engine.execute(StepPlan(step=0, work=(wrong,)))


@pytest.mark.parametrize("block_tokens", [1, 7, 256])
def test_blocks_of_any_size_hold_the_longest_sequence(
    checkpoint: CheckpointStore, block_tokens: int
) -> None:
    slabs = Slabs(checkpoint("llama"), num_blocks=NUM_BLOCKS, native="required")
    num_blocks = -(-512 // block_tokens)
    start = structs.replace(slabs.start(), block_tokens=block_tokens, num_blocks=num_blocks)
    engine = TorchEngine.open(start, weights_fd=slabs.weights, kv_fd=slabs.kv)
    engine.add(RequestId(0), state_of(random_prompt(8, 512)))
    new = tuple(range(num_blocks))
    for begin in range(0, 512, 128):
        work = SeqWork(
            id=RequestId(0),
            start=begin,
            num_tokens=128,
            phase=Phase.PREFILL,
            samples=begin == 384,
            fresh=begin == 0,
            new_blocks=(new,) if begin == 0 else ((),),
        )
        sampled = engine.execute(StepPlan(step=0, work=(work,)))
    assert [token.id for token in sampled] == [0]
    slabs.close()


def test_the_engine_says_what_it_can_hold_and_which_kernels_it_chose(rig: Rig) -> None:
    info = rig.engine.info
    assert [(g.num_blocks, g.block_tokens) for g in info.groups] == [(NUM_BLOCKS, 16)]
    assert (info.vocab_size, info.max_positions, info.weights_source) == (199, 512, "disk")
    assert "row-invariant at 1 thread(s)" in info.notes[0]


@BOTH
def test_bfloat16_serves(checkpoint: CheckpointStore, native: str) -> None:
    slabs = Slabs(checkpoint("llama"), dtype="bfloat16", num_blocks=NUM_BLOCKS, native=native)
    engine = slabs.engine()
    driver = Driver(engine, num_blocks=NUM_BLOCKS)
    driver.add(0, PROMPTS[1])
    driver.generate({0: len(PROMPTS[1]) + NEW})
    slabs.close()
    assert ("not row-invariant" in engine.info.notes[0]) == (native == "off")
    assert all(0 <= token < 199 for token in driver.known[0])


def test_R6_a_slab_whose_loader_died_is_refused_or_filled_again(
    checkpoint: CheckpointStore,
) -> None:
    slabs = Slabs(checkpoint("llama"), num_blocks=NUM_BLOCKS)
    with pytest.raises(WeightError, match=r"not complete.*load the weights again"):
        slabs.engine(load=False)
    assert slabs.engine().info.weights_source == "disk"
    assert slabs.engine().info.weights_source == "slab"
    with open(f"/proc/self/fd/{slabs.weights}", "r+b") as slab:
        slab.seek(12)
        slab.write(STATE_FILLING.to_bytes(4, "little"))
    with pytest.raises(WeightError, match="load the weights again"):
        slabs.engine(load=False)
    assert slabs.engine().info.weights_source == "disk"
    slabs.close()


def test_lengths_and_directories_that_cannot_work_are_refused(
    checkpoint: CheckpointStore, tmp_path: Path
) -> None:
    slabs = Slabs(checkpoint("llama"), num_blocks=NUM_BLOCKS)
    with pytest.raises(UnsupportedModel, match=r"max_model_len=513.*512"):
        slabs.engine(max_model_len=513)
    start = structs.replace(slabs.start(), num_blocks=NUM_BLOCKS + 1)
    with pytest.raises(ValueError, match=r"KV slab"):
        TorchEngine.open(start, weights_fd=slabs.weights, kv_fd=slabs.kv)
    slabs.close()
    with pytest.raises(UnsupportedModel, match=r"no config\.json"):
        read_shape(tmp_path)
