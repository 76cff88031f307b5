"""Answers through HTTP are those of transformers on the same checkpoint, one by one (R12)."""

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from tools import model_tasks as tasks
from tools.evaluate_server import answer_text

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "tiny-tasks"
pytestmark = [pytest.mark.procs, pytest.mark.timeout(900)]


def oracle(conversations: list[tuple[Any, Any]], max_tokens: int) -> list[str]:
    """Greedy answers of transformers, float32, one conversation (messages, tools) at a time."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    answers = []
    for messages, functions in conversations:
        encoded = tokenizer.apply_chat_template(
            list(messages),
            tools=list(functions) or None,
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.inference_mode():
            output = model.generate(**encoded, max_new_tokens=max_tokens, do_sample=False)
        new = output[0, encoded["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(new, skip_special_tokens=True))
    return answers


def questions(per_task: int) -> list[tuple[str, Any]]:
    rng = random.Random(20)
    return [(name, tasks.generate(name, rng)) for name in tasks.TASKS for _ in range(per_task)]


async def ask(session: Any, url: str, messages: Any, max_tokens: int, **more: Any) -> str:
    body = {"model": "tiny-tasks", "messages": messages, "temperature": 0, **more}
    body |= {"max_tokens": max_tokens}
    async with session.post(url + "/v1/chat/completions", json=body) as reply:
        document = await reply.json()
        assert reply.status == 200, document
        return answer_text(document["choices"][0]["message"])


@pytest.mark.parametrize(
    "per_task", [6, pytest.param(40, marks=pytest.mark.slow)], ids=["small", "full"]
)
async def test_R12_answers_equal_transformers_one_by_one(
    serve: Any, session: Any, per_task: int
) -> None:
    drawn = questions(per_task)
    expected = oracle([(item.messages, ()) for _, item in drawn], 64)
    server = serve("--devices", "cpu:2", workers=2)
    answers = await asyncio.gather(
        *(ask(session, server.url, item.messages, 64) for _, item in drawn)
    )
    assert answers == expected

    right = dict.fromkeys(tasks.TASKS, 0)
    for (name, item), answer in zip(drawn, answers, strict=True):
        right[name] += tasks.check(item, answer)
    print({name: f"{count}/{per_task}" for name, count in right.items()})
    assert sum(right.values()) >= 0.95 * len(drawn), right


@pytest.mark.parametrize(
    "per_task", [4, pytest.param(30, marks=pytest.mark.slow)], ids=["small", "full"]
)
async def test_R12_answers_with_tools_and_to_long_texts_equal_transformers(
    serve: Any, session: Any, per_task: int
) -> None:
    """The prompt of a conversation with tools is the one that transformers renders, too."""
    rng = random.Random(21)
    drawn = [tasks.generate(name, rng) for name in tasks.CHAT_TASKS for _ in range(per_task)]
    expected = oracle([(item.messages, item.tools) for item in drawn], 96)
    server = serve("--devices", "cpu:2", workers=2)
    answers = await asyncio.gather(
        *(
            ask(
                session,
                server.url,
                item.messages,
                96,
                **({"tools": item.tools} if item.tools else {}),
            )
            for item in drawn
        )
    )
    assert answers == expected
    right = sum(tasks.check(item, text) for item, text in zip(drawn, answers, strict=True))
    assert right >= 0.85 * len(drawn)
