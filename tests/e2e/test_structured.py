"""R21: answers of a fixed form on the real model, with the official client: every one is valid.

The small model likes to repeat itself, and the fraction of a number may be as long as it likes; a
frequency penalty makes it come to an end. An answer that is cut for its length counts as a failure.
"""

import asyncio
import json
import os
import signal
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jsonschema
import openai
import pytest

from tests.random_schemas import random_schema

pytestmark = [pytest.mark.procs, pytest.mark.timeout(900)]

PROMPT: Any = [{"role": "user", "content": "Make a JSON object with name turtle, color green."}]
AT_ONCE = 16


def client_of(server: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=600
    )


async def ask(client: openai.AsyncOpenAI, **fields: Any) -> Any:
    fields = {"messages": PROMPT, "max_tokens": 1000, "temperature": 0, **fields}
    return await client.chat.completions.create(model="tiny-tasks", **fields)


def strictly(schema: Any) -> Any:
    return {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": schema, "strict": True},
    }


def check_valid(schema: Any, text: str) -> None:
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    jsonschema.Draft202012Validator(schema, format_checker=checker).validate(json.loads(text))


async def answers_of(server: Any, seeds: Sequence[int]) -> list[str]:
    """One answer per schema; greedy ones and drawn ones take turns. All must end by themselves."""
    turns = asyncio.Semaphore(AT_ONCE)
    async with client_of(server) as client:

        async def one(seed: int) -> str:
            schema, _ = random_schema(seed)
            temperature = 0.0 if seed % 2 else 0.8
            async with turns:
                answer = await ask(
                    client,
                    response_format=strictly(schema),
                    temperature=temperature,
                    seed=seed,
                    frequency_penalty=1.0,
                )
            (choice,) = answer.choices
            assert choice.finish_reason == "stop", (seed, schema, choice.message.content)
            check_valid(schema, choice.message.content)
            return str(choice.message.content)

        return await asyncio.gather(*(one(seed) for seed in seeds))


async def test_R21_answers_to_random_schemas_are_valid(serve: Any) -> None:
    server = serve("--devices", "cpu:1")
    answers = await answers_of(server, range(24))
    assert len(set(answers)) > 18


@pytest.mark.slow
async def test_R21_answers_to_200_random_schemas_are_valid(serve: Any) -> None:
    kinds = Counter[str]()
    for seed in range(200):
        kinds.update(random_schema(seed)[1])
    assert min(kinds.values()) > 25, kinds
    assert len(kinds) == 17
    answers = await answers_of(serve("--devices", "cpu:1"), range(200))
    assert len(answers) == 200
    print(f"200 answers, all valid; schemas with {dict(kinds)}")


LONG = {
    "type": "array",
    "items": {"type": "string", "pattern": "^[a-z]{3,5}$"},
    "minItems": 40,
    "maxItems": 50,
}


@pytest.mark.parametrize("devices", ["cpu:2", "paced:2"])
async def test_R4_R5_a_lost_worker_costs_no_answer_of_a_fixed_form_a_token(
    serve: Any, streaming: Any, new_answer: Any, devices: str
) -> None:
    server = serve("--devices", devices, workers=2)
    work = [
        {
            "model": "tiny-tasks",
            "prompt": f"words {index}",
            "max_tokens": 600,
            "temperature": 0.9 * (index % 2),
            "seed": index,
            "frequency_penalty": 0.6,
            "repetition_penalty": 1.05,
            "logit_bias": {"200": 0.5},
            "response_format": strictly(LONG),
        }
        for index in range(8)
    ]
    expected = await asyncio.gather(*(streaming(server.url, body) for body in work))
    victim = server.pid(1)
    answers = [new_answer() for _ in work]
    tasks = [
        asyncio.create_task(streaming(server.url, body, answer))
        for body, answer in zip(work, answers, strict=True)
    ]
    await asyncio.gather(*(answer.first_token.wait() for answer in answers[:6]))
    os.kill(victim, signal.SIGKILL)
    await asyncio.gather(*tasks)
    assert server.state()["workers"][1]["deaths"] == 1
    assert server.state()["totals"]["replaced"] > 0
    for answer, reference in zip(answers, expected, strict=True):
        assert (answer.error, answer.finish) == (None, ["stop"])
        assert answer.text == reference.text
        check_valid(LONG, answer.text)
