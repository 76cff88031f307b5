"""The training script: a resumed run takes the steps an unbroken one takes; the loss falls."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from tools.model_tasks import generate
from tools.train_model import BatchMaker, Trainer, TrainOptions, lr_factor

ROOT = Path(__file__).parents[2]
OPTIONS = TrainOptions(num_steps=8, seed=3, batch_tokens=256, num_warmup_steps=2)


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


def test_loss_is_taken_on_answers_only(tokenizer: Tokenizer) -> None:
    maker = BatchMaker(tokenizer, OPTIONS)
    batch = maker.batch(0)
    assert batch.tokens.shape == batch.is_target.shape == (2, 128)
    target_text = tokenizer.decode(
        batch.tokens[batch.is_target].tolist(), skip_special_tokens=False
    )
    assert "<|end|>" in target_text
    assert "<|user|>" not in target_text
    assert "<|assistant|>" not in target_text
    assert torch.equal(batch.tokens, BatchMaker(tokenizer, OPTIONS).batch(0).tokens)
    assert not torch.equal(batch.tokens, maker.batch(1).tokens)


def test_turns_are_encoded_as_the_chat_template_writes_them(tokenizer: Tokenizer) -> None:
    task = generate("add", random.Random(0))
    prompt, answer = BatchMaker(tokenizer, OPTIONS).encode_turn(task)
    text = f"<|user|>{task.prompt}<|end|><|assistant|>{task.answer}<|end|>"
    assert prompt + answer == tokenizer.encode(text).ids


def test_learning_rate_warms_up_and_falls() -> None:
    options = TrainOptions(num_steps=2000, seed=0)
    factors = [lr_factor(step, options) for step in range(2000)]
    assert factors[0] < 0.1
    assert max(factors) == 1.0
    assert factors[-1] == options.final_lr_fraction


@pytest.mark.slow
def test_smoke_run_writes_a_loadable_model(tmp_path: Path) -> None:
    out = tmp_path / "model"
    state = str(tmp_path / "state")
    subprocess.run(
        [sys.executable, "-m", "tools.train_model", str(out), "--state-dir", state, "--smoke"],
        cwd=ROOT,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    model = LlamaForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert (
        model.config.vocab_size == Tokenizer.from_file(str(out / "tokenizer.json")).get_vocab_size()
    )
