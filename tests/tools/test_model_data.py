"""Training rows are conversations as the chat template writes them; loss is on answers only."""

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from tools.model_data import WATCHED, BatchMaker, Encoder, Mixture, held_out_task
from tools.model_files import CHAT_TEMPLATE
from tools.model_tasks import CHAT_TASKS, TASKS, generate

MODEL = Path(__file__).parents[2] / "models/tiny-tasks"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


@pytest.mark.parametrize("kind", ["plain", "tools", "needle"])
def test_loss_is_taken_on_answers_only(tokenizer: Tokenizer, kind: str) -> None:
    maker = BatchMaker(tokenizer, seed=3)
    mixture = Mixture(batch_tokens=2048, lengths={1024: 1.0}, kinds={kind: 1.0})  # type: ignore[dict-item]
    batch = maker.batch(mixture, 0)
    assert batch.tokens.shape == batch.is_target.shape == (2, 1024)
    said = tokenizer.decode(batch.tokens[batch.is_target].tolist(), skip_special_tokens=False)
    whole = tokenizer.decode(batch.tokens[0].tolist(), skip_special_tokens=False)
    assert whole.startswith("<|bos|>")
    assert "<|end|>" in said
    assert not any(f"<|{role}|>" in said for role in ("user", "assistant", "system", "tool"))
    assert ("<tool_call>" in said) == (kind == "tools")
    assert ("The secret word is" in whole) == (kind == "needle")
    assert "<tools>" not in said
    assert "The secret" not in said


@pytest.mark.parametrize("name", sorted((*TASKS, *CHAT_TASKS)))
def test_questions_are_written_as_transformers_writes_them(tokenizer: Tokenizer, name: str) -> None:
    reference = AutoTokenizer.from_pretrained(MODEL)
    encoder = Encoder(tokenizer)
    rng = random.Random(name)
    for _ in range(5):
        task = generate(name, rng)
        expected = reference.apply_chat_template(
            list(task.messages),
            tools=list(task.tools) or None,
            chat_template=CHAT_TEMPLATE,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
        )
        assert encoder.question(task.messages, task.tools) == expected["input_ids"]


@pytest.mark.parametrize("name", sorted(TASKS))
def test_without_tools_the_shipped_template_writes_the_same(
    tokenizer: Tokenizer, name: str
) -> None:
    shipped = AutoTokenizer.from_pretrained(MODEL)
    task = generate(name, random.Random(name))
    system = {"role": "system", "content": "Be brief."}
    for messages in ([*task.messages], [system, *task.messages]):
        expected = shipped.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        assert Encoder(tokenizer).question(messages) == expected["input_ids"]


def test_a_conversation_in_pieces_equals_the_whole(tokenizer: Tokenizer) -> None:
    encoder = Encoder(tokenizer)
    task = generate("tool_result", random.Random(4))
    system = task.messages[:-3]
    reply = {"role": "assistant", "content": task.answer}
    pieces = encoder.opening(system, task.tools) + encoder.turns((*task.messages[-3:], reply))
    assert pieces == encoder.question(task.messages, task.tools) + encoder.answer(task.answer)
    mask = encoder.target_mask(pieces)
    num_answer = len(encoder.answer(task.answer))
    assert all(mask[-num_answer:])
    assert not mask[-num_answer - 1]


def test_short_rows_list_no_functions(tokenizer: Tokenizer) -> None:
    maker = BatchMaker(tokenizer, seed=1)
    mixture = Mixture(batch_tokens=512, lengths={128: 1.0}, kinds={"tools": 1.0})
    text = tokenizer.decode(maker.batch(mixture, 0).tokens.flatten().tolist())
    assert "<tools>" not in text


def test_watched_tasks_are_held_out() -> None:
    rng = random.Random(2)
    assert all(held_out_task(name, rng).is_held_out for name in WATCHED for _ in range(3))


def test_a_mixture_weighs_the_tasks_of_its_plain_rows(tokenizer: Tokenizer) -> None:
    maker = BatchMaker(tokenizer, seed=1)
    mixture = Mixture(
        batch_tokens=512, lengths={256: 1.0}, kinds={"plain": 1.0}, tasks={"repeat": 1.0}
    )
    batch = maker.batch(mixture, 0)
    answers = tokenizer.decode(batch.tokens[batch.is_target].tolist(), skip_special_tokens=False)
    *whole, _ = answers.split("<|end|>")
    assert len(whole) > 3
    assert all(len(set(answer.split())) == 1 for answer in whole[:3])
