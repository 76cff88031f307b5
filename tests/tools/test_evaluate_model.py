"""The shipped weights answer as their card says; the measurement itself is right."""

import random
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from tools.evaluate_model import CASES, END_ID, Measurement, Setting, answer_ids, conversation
from tools.model_tasks import CHAT_TASKS, TASKS, generate

MODELS = Path(__file__).parents[2] / "models"


@pytest.fixture(scope="module")
def shipped() -> Measurement:
    torch.set_num_threads(1)
    return Measurement.of(MODELS / "tiny-tasks", seed=1)


@pytest.fixture(scope="module")
def draft() -> Measurement:
    torch.set_num_threads(1)
    return Measurement.of(MODELS / "tiny-tasks-draft", seed=1)


def test_shipped_weights_solve_their_tasks(shipped: Measurement) -> None:
    plain = [shipped.accuracy(name, "single", num_prompts=5)["accuracy"] for name in TASKS]
    chat = [shipped.accuracy(name, "single", num_prompts=4)["accuracy"] for name in CHAT_TASKS]
    assert sum(plain) / len(plain) >= 0.95
    assert sum(chat) / len(chat) >= 0.9


def test_shipped_weights_find_a_secret_in_a_long_text(shipped: Measurement) -> None:
    setting = "2000_tokens"
    (prompt,) = [ids for _, ids in shipped.prompts("needle", setting, num_prompts=8)]
    assert 1900 < len(prompt) < 2100
    assert shipped.accuracy("needle", setting, num_prompts=32)["accuracy"] >= 0.75


def test_greedy_answers_are_those_of_generate(shipped: Measurement) -> None:
    model: LlamaForCausalLM = shipped.model
    for name in ("repeat", "tool_call"):
        ((_, prompt),) = shipped.prompts(name, "single", num_prompts=1)
        given = torch.tensor([list(prompt)])
        output = model.generate(
            given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=128
        )
        answer = answer_ids(model, prompt)
        assert answer == output[0, len(prompt) :].tolist()
        assert answer[-1] == END_ID


def test_agreement_with_itself_is_whole_and_of_the_draft_in_part(
    shipped: Measurement, draft: Measurement
) -> None:
    same = shipped.agreement(shipped, "repeat", num_prompts=3)
    assert same["agreement"] == 1.0
    other = draft.agreement(shipped, "repeat", num_prompts=3)
    assert other["tokens"] == same["tokens"]
    assert 0.3 <= other["agreement"] <= 1.0


def test_settings_put_the_prompt_where_they_say(shipped: Measurement) -> None:
    encoder, tokenizer = shipped.encoder, shipped.tokenizer
    rng = random.Random(3)
    task = generate("sort", rng, split="held_out")
    for setting in CASES["sort"].settings.values():
        ids = encoder.question(conversation(encoder, task, setting, rng=rng), task.tools)
        text = tokenizer.decode(list(ids), skip_special_tokens=False)
        assert text.endswith(f"<|user|>{task.prompt}<|end|><|assistant|>")
        assert text.count("<|system|>") == int(setting.has_system_message)
        assert text.count("<|user|>") > setting.num_earlier_turns
        assert len(ids) >= setting.min_context_tokens
    assert not Setting().has_system_message
    drawn = CASES["add_two_digit"].draw(rng, Setting())
    assert all(10 <= int(part) <= 99 for part in drawn.key.split(" "))
