"""R12 through the real Batcher: however a batch is cut, cached, preempted or planned ahead, the
tokens are those of transformers (checked in float64, up to the first near tie)."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from appliance.core.batcher import Batcher
from appliance.core.hashes import chain, root_hash
from appliance.core.invariants import BatchWatch
from appliance.core.messages import Assign, Preempted, Refused, StepReported
from appliance.core.payload import Sampling
from appliance.core.types import (
    BatcherConfig,
    CacheGroupSpec,
    Request,
    RequestId,
    SeqResult,
    StepResult,
    WorkerId,
)
from appliance.policy import make_policy
from appliance.worker.torch_engine import TorchEngine
from tests.modeling.checkpoints import VARIANTS, CheckpointStore, load_oracle
from tests.worker.engine_rig import Slabs, state_of

BLOCK, NEW, KEY, W = 16, 36, b"key", WorkerId(0)
LENGTHS = [5, 33, 64, 2, 16, 90, 140, 17] * 4
SHARED = random.Random(99).choices(range(199), k=70)


def prompts(count: int) -> list[list[int]]:
    """Prompts of mixed lengths; every third begins with the same 70 tokens (prefix hits)."""
    found = []
    for index, length in enumerate(LENGTHS[:count]):
        own = random.Random(index).choices(range(199), k=length)
        found.append([*SHARED, *own] if index % 3 == 0 else own)
    return found


class Loop:
    """The step loop without its process: Batcher and engine over one small pool."""

    def __init__(
        self, engine: TorchEngine, *, budget: int, depth: int, num_blocks: int, max_seqs: int
    ) -> None:
        config = BatcherConfig(
            max_model_len=512, max_num_seqs=max_seqs, max_batch_tokens=budget, depth=depth
        )
        self.engine = engine
        self.batcher = Batcher(
            W,
            config,
            groups=[CacheGroupSpec(num_blocks=num_blocks, block_tokens=BLOCK)],
            policy=make_policy("fcfs", {}).batch,
        )
        self.watch = BatchWatch(self.batcher)
        self.known: dict[int, list[int]] = {}
        self.num_preempted = self.num_cached = self.num_chunks = 0

    def add(self, index: int, prompt: Sequence[int], *, sampling: Sampling | None = None) -> None:
        self.known[index] = list(prompt)
        self.engine.add(RequestId(index), state_of(prompt, sampling=sampling))
        request = Request(
            id=RequestId(index),
            arrived=float(index),
            prompt_tokens=len(prompt),
            max_tokens=NEW,
            prefix_hashes=tuple(self._hashes(index)),
        )
        answers = self.batcher.handle(Assign(worker=W, request=request), 0.0)
        assert not any(isinstance(answer, Refused) for answer in answers)

    def _hashes(self, index: int) -> list[int]:
        ids = np.array(self.known[index], "<i4").tobytes()
        return chain(ids, BLOCK, key=KEY, parent=root_hash(key=KEY))

    def run(self) -> None:
        """Step until nothing is left, planning as far ahead as the depth allows."""
        plans = []
        while self.batcher.has_work() or plans:
            while plan := self.batcher.next_step(0.0):
                plans.append(plan)
                self.num_chunks += sum(not item.samples for item in plan.work)
            plan = plans.pop(0)
            results = []
            for token in self.engine.execute(plan):
                if not self.batcher.is_live(token.id):
                    continue
                known = self.known[token.id]
                known.append(token.token)
                full = tuple(self._hashes(token.id)[-1:]) if len(known) % BLOCK == 0 else ()
                results.append(SeqResult(id=token.id, num_tokens=1, hashes=full))
            result = StepResult(step=plan.step, results=tuple(results), elapsed=0.0)
            for report in self.batcher.finish_step(result, 0.0):
                self.num_preempted += isinstance(report, Preempted)
                if isinstance(report, StepReported):
                    self.num_cached += sum(end.cached_tokens for end in report.finished)
            self.watch.check()


def answers(
    loop: Loop, all_prompts: Sequence[Sequence[int]], **options: Sampling
) -> list[list[int]]:
    for index, prompt in enumerate(all_prompts):
        loop.add(index, prompt, **options)
    loop.run()
    return [loop.known[index][len(prompt) :] for index, prompt in enumerate(all_prompts)]


def check_tokens(oracle: Any, all_prompts: Sequence[Any], found: Sequence[list[int]]) -> None:
    """Every token is the float64 argmax after those before it; a near tie ends the comparison,
    and there may be at most one in 10,000 tokens (none in these fixed prompts)."""
    for prompt, answer in zip(all_prompts, found, strict=True):
        with torch.inference_mode():
            ids = torch.tensor([[*prompt, *answer[:-1]]])
            logits = oracle(ids).logits[0, len(prompt) - 1 :]
        assert logits.argmax(-1).tolist() == answer


ALWAYS_IN_TORCH = ("llama-biased-mha", "qwen3")
CASES = [
    pytest.param(name, native, id=f"{name}-{native}", marks=[pytest.mark.slow] * slow)
    for name in sorted(VARIANTS)
    for native, slow in (("required", False), ("off", name not in ALWAYS_IN_TORCH))
]


@pytest.mark.parametrize(("name", "native"), CASES)
def test_R12_tokens_do_not_depend_on_batch_chunks_cache_preemption_or_depth(
    checkpoint: CheckpointStore, name: str, native: str
) -> None:
    slabs = Slabs(checkpoint(name), num_blocks=400, native=native)
    engine = slabs.engine()
    many = prompts(32)
    reference = answers(
        Loop(engine, budget=4096, depth=0, num_blocks=400, max_seqs=1), many
    )  # batch 1, whole prompts
    check_tokens(load_oracle(checkpoint(name), dtype=torch.float64), many, reference)
    assert all(len(answer) == NEW for answer in reference)
    for depth in (0, 1, 2):
        together = Loop(engine, budget=4096, depth=depth, num_blocks=400, max_seqs=32)
        assert answers(together, many) == reference
        chunked = Loop(engine, budget=48, depth=depth, num_blocks=400, max_seqs=32)
        assert answers(chunked, many) == reference
        assert chunked.num_cached >= 64  # somebody found the shared beginning
        assert chunked.num_chunks > 32
        short = Loop(engine, budget=64, depth=depth, num_blocks=20, max_seqs=32)
        assert answers(short, many) == reference
        assert short.num_preempted > 0
    slabs.close()


@pytest.mark.parametrize(
    ("dtype", "native"), [("float32", "off"), ("float32", "required"), ("bfloat16", "required")]
)
def test_R12_seeded_answers_do_not_depend_on_batch_preemption_or_depth(
    checkpoint: CheckpointStore, dtype: str, native: str
) -> None:
    slabs = Slabs(checkpoint("qwen3"), num_blocks=400, native=native, dtype=dtype)
    engine = slabs.engine()
    many = prompts(32)
    drawn = Sampling(temperature=1.2, top_p=0.9, seed=7)
    alone = Loop(engine, budget=4096, depth=0, num_blocks=400, max_seqs=1)
    reference = answers(alone, many, sampling=drawn)
    greedy = answers(Loop(engine, budget=4096, depth=0, num_blocks=400, max_seqs=8), many)
    assert reference != greedy
    for depth in (0, 1, 2):
        short = Loop(engine, budget=64, depth=depth, num_blocks=20, max_seqs=32)
        assert answers(short, many, sampling=drawn) == reference
        assert short.num_preempted > 0
    slabs.close()
