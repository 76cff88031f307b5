"""The shipped weights answer as their card says; the measurement itself is right."""

import random
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from tools.evaluate_model import CASES, END_ID, Measurement, Setting, answer_ids, conversation
from tools.model_tasks import TASKS, generate

MODELS = Path(__file__).parents[2] / "models"


@pytest.fixture(scope="module")
def shipped() -> Measurement:
    torch.set_num_threads(1)
    return Measurement.of(MODELS / "tiny-tasks", seed=1)


def test_shipped_weights_solve_their_tasks(shipped: Measurement) -> None:
    plain = [shipped.accuracy(name, "single", num_prompts=5)["accuracy"] for name in TASKS]
    assert sum(plain) / len(plain) >= 0.95


def test_texts_with_a_secret_have_the_length_of_their_setting(shipped: Measurement) -> None:
    (prompt,) = [ids for _, ids in shipped.prompts("needle", "2000_tokens", num_prompts=8)]
    assert 1900 < len(prompt) < 2100


def test_greedy_answers_are_those_of_generate(shipped: Measurement) -> None:
    model: LlamaForCausalLM = shipped.model
    for name in ("repeat", "json"):
        ((_, prompt),) = shipped.prompts(name, "single", num_prompts=1)
        given = torch.tensor([list(prompt)])
        output = model.generate(
            given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=128
        )
        answer = answer_ids(model, prompt)
        assert answer == output[0, len(prompt) :].tolist()
        assert answer[-1] == END_ID


def test_agreement_with_itself_is_whole(shipped: Measurement) -> None:
    same = shipped.agreement(shipped, "repeat", num_prompts=3)
    assert same["agreement"] == 1.0
    assert same["tokens"] >= 6


def test_settings_put_the_prompt_where_they_say(shipped: Measurement) -> None:
    encoder, tokenizer = shipped.encoder, shipped.tokenizer
    rng = random.Random(3)
    task = generate("sort", rng, split="held_out")
    for setting in CASES["sort"].settings.values():
        ids = conversation(encoder, task, setting, rng=rng)
        text = tokenizer.decode(list(ids), skip_special_tokens=False)
        assert text.endswith(f"<|user|>{task.prompt}<|end|><|assistant|>")
        assert text.count("<|system|>") == int(setting.has_system_message)
        assert text.count("<|user|>") > setting.num_earlier_turns
        assert len(ids) >= setting.min_context_tokens
    assert not Setting().has_system_message
    drawn = CASES["add_two_digit"].draw(rng, Setting())
    assert all(10 <= int(part) <= 99 for part in drawn.key.split(" "))
