"""R21: answers of a fixed form on the real model, with the official client: every one is valid.

The small model likes to repeat itself, and the fraction of a number may be as long as it likes; a
frequency penalty makes it come to an end. An answer that is cut for its length counts as a failure.
"""

import asyncio
import json
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
