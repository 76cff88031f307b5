"""The training script: a resumed run takes the steps an unbroken one takes; gates end stages."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from tools.train_model import Trainer, TrainOptions
from tools.training_plans import PLANS, Stage

ROOT = Path(__file__).parents[2]
OPTIONS = TrainOptions(plan=PLANS["smoke"], seed=3)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(ROOT / "models/tiny-tasks/tokenizer.json"))


def test_resumed_run_takes_the_same_steps(tokenizer: Tokenizer, tmp_path: Path) -> None:
    unbroken = Trainer(tokenizer, OPTIONS, tmp_path)
    losses = [unbroken.step() for _ in range(4)]
    first = Trainer(tokenizer, OPTIONS, tmp_path)
    resumed_losses = [first.step() for _ in range(2)]
    first.save()
    second = Trainer(tokenizer, OPTIONS, tmp_path)
    second.load()
    resumed_losses += [second.step() for _ in range(2)]
    assert second.progress.step == 4
    assert resumed_losses == pytest.approx(losses, rel=1e-4)
    assert losses[-1] < losses[0]


def test_extension_starts_from_published_weights_and_counts_on(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    shipped = ROOT / "models/tiny-tasks"
    trainer = Trainer(tokenizer, TrainOptions(plan=PLANS["main"], seed=7), tmp_path)
    trainer.start_from(shipped, "settle")
    last = json.loads((shipped / "training_log.jsonl").read_text().splitlines()[-1])
    assert trainer.progress.step == last["step"]
    assert (trainer.stage.name, trainer.progress.stage_step) == ("settle", 0)
    trainer.publish(tmp_path)
    stored = LlamaForCausalLM.from_pretrained(shipped, dtype=torch.bfloat16)
    published = (tmp_path / "model.safetensors").stat().st_size
    assert published == (shipped / "model.safetensors").stat().st_size
    assert torch.equal(trainer.model.model.norm.weight.bfloat16(), stored.model.norm.weight)


def test_learning_rate_warms_up_and_falls_through_the_stages() -> None:
    words, turns = PLANS["main"].stages[:2]
    factors = [stage.lr_factor(step) for stage in (words, turns) for step in range(stage.num_steps)]
    assert factors[0] < 0.1
    assert 0.95 < max(factors) <= 1.0
    after_warm_up = factors[words.num_warmup_steps :]
    assert after_warm_up == sorted(after_warm_up, reverse=True)
    assert factors[-1] == pytest.approx(turns.lr_to, abs=0.001)


@pytest.mark.parametrize("name", sorted(PLANS))
def test_a_gate_is_measured_where_it_can_end_a_stage(name: str) -> None:
    stages: tuple[Stage, ...] = PLANS[name].stages
    assert len({stage.name for stage in stages}) == len(stages)
    for stage in stages:
        assert set(stage.gate) <= set(stage.watched)


def test_smoke_run_ends_stages_by_gate_and_by_budget_and_resumes(tmp_path: Path) -> None:
    out = tmp_path / "model"
    arguments = ["--state-dir", str(tmp_path / "state"), "--plan", "smoke"]
    for more in (["--tokenizer", "models/tiny-tasks"], ["--resume"]):
        subprocess.run(
            [sys.executable, "-m", "tools.train_model", str(out), *arguments, *more],
            cwd=ROOT,
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=120,
        )
    model = LlamaForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert model.config.vocab_size == tokenizer.get_vocab_size()
    log = (out / "training_log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in log]
    ends = {r["stage"]: (r["stage_ended"], r["stage_step"]) for r in records if "stage_ended" in r}
    assert ends == {"gated": ("gate met", 2), "whole": ("budget spent", 3)}
    assert sum("stage_ended" in record for record in records) == 2


def test_batches_depend_on_seed_and_step_alone(tokenizer: Tokenizer, tmp_path: Path) -> None:
    mixture = PLANS["smoke"].stages[0].mixture
    makers = [Trainer(tokenizer, OPTIONS, tmp_path).maker for _ in range(2)]
    step = random.Random(1).randrange(100)
    first, again = (maker.batch(mixture, step) for maker in makers)
    assert torch.equal(first.tokens, again.tokens)
    assert first.tokens.shape == makers[0].batch(mixture, step).is_target.shape
    others = [makers[0].batch(mixture, other).tokens for other in (step + 1, step + 2)]
    assert not any(torch.equal(first.tokens, other) for other in others)
