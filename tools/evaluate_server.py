"""Measure the bundled model through HTTP: the prompts of `tools.evaluate_model`, asked of a server.

Every prompt is a request to `/v1/chat/completions` as any client would send it, at temperature 0,
with its tools where the task has them; calls come back as `tool_calls` and are judged by value.
With `--expect` the shares are compared with those that transformers reached on the same prompts:
equal seeds and numbers of prompts draw equal conversations.

    appliance start
    python -m tools.evaluate_server http://127.0.0.1:8000 --num-prompts 200 \
        --expect models/tiny-tasks/eval.json --json docs/results/accuracy.json
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from tokenizers import Tokenizer

from tools.evaluate_model import CASES, MAX_NEW_TOKENS, conversations
from tools.model_data import Encoder
from tools.model_tasks import Task, check
from tools.task_record import Message
from tools.tool_tasks import call_text

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_SECONDS = 600.0


class Server(msgspec.Struct, frozen=True):
    """A running server: its address, the model it serves, how many requests it gets at once."""

    url: str
    model: str
    session: aiohttp.ClientSession
    turns: asyncio.Semaphore

    async def answer(self, task: Task, messages: Sequence[Message]) -> str:
        """What the server answers, as text. Raises `aiohttp.ClientResponseError`."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": list(messages),
            "temperature": 0,
            "max_tokens": MAX_NEW_TOKENS,
        }
        if task.tools:
            body["tools"] = list(task.tools)
        async with (
            self.turns,
            self.session.post(self.url + "/v1/chat/completions", json=body) as reply,
        ):
            reply.raise_for_status()
            document = await reply.json()
        return answer_text(document["choices"][0]["message"])


def answer_text(message: Mapping[str, Any]) -> str:
    """A message of the API as the model wrote it: its content, then its calls."""
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    content = [message["content"]] if message.get("content") else []
    return "\n".join(
        [*content, *(call_text(call["name"], json.loads(call["arguments"])) for call in calls)]
    )


async def accuracy(
    server: Server, encoder: Encoder, name: str, setting: str, *, num_prompts: int, seed: int
) -> dict[str, Any]:
    """Share of right answers of a case under a setting."""
    drawn = conversations(encoder, name, setting, num_prompts=num_prompts, seed=seed)
    asked = list(drawn)
    answers = await asyncio.gather(*(server.answer(task, messages) for task, messages in asked))
    right = [check(task, text) for (task, _), text in zip(asked, answers, strict=True)]
    return {"count": len(right), "accuracy": round(sum(right) / len(right), 4)}


async def evaluate_server(
    url: str, *, names: Sequence[str], num_prompts: int, seed: int, at_once: int
) -> dict[str, Any]:
    """Accuracy per case and setting of the model that the server at `url` serves."""
    tokenizer = ROOT / "models" / "tiny-tasks" / "tokenizer.json"
    encoder = Encoder(Tokenizer.from_file(str(tokenizer)))
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
    connector = aiohttp.TCPConnector(limit=0)
    cases: dict[str, Any] = {}
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        async with session.get(url + "/v1/models") as reply:
            model = (await reply.json())["data"][0]["id"]
        server = Server(url, model, session, asyncio.Semaphore(at_once))
        for name in names:
            cases[name] = {
                setting: await accuracy(
                    server, encoder, name, setting, num_prompts=num_prompts, seed=seed
                )
                for setting in CASES[name].settings
            }
            print(name, {key: value["accuracy"] for key, value in cases[name].items()}, flush=True)
    return cases


def differences(cases: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Where `cases` differ from `expected`, a line each; the number of prompts counts too."""
    return [
        f"{name}, {setting}: {found} here, {expected.get(name, {}).get(setting)} expected"
        for name, settings in cases.items()
        for setting, found in settings.items()
        if found != expected.get(name, {}).get(setting)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; 1 if an expected share is not met to the digit."""
    parser = argparse.ArgumentParser(description="Measure the bundled model through a server.")
    parser.add_argument("url", help="where the server listens")
    parser.add_argument("--num-prompts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=30_000)
    parser.add_argument("--at-once", type=int, default=16, help="requests at a time")
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--expect", type=Path, help="an eval.json to compare with")
    parser.add_argument("--json", type=Path, help="where to write the result")
    parsed = parser.parse_args(arguments)
    cases = asyncio.run(
        evaluate_server(
            parsed.url.rstrip("/"),
            names=parsed.only,
            num_prompts=parsed.num_prompts,
            seed=parsed.seed,
            at_once=parsed.at_once,
        )
    )
    if parsed.json:
        result = {
            "command": f"python -m tools.evaluate_server URL --num-prompts {parsed.num_prompts} "
            f"--seed {parsed.seed} --at-once {parsed.at_once}",
            "cases": cases,
        }
        parsed.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if not parsed.expect:
        return 0
    lines = differences(cases, json.loads(parsed.expect.read_bytes())["cases"])
    total = sum(len(settings) for settings in cases.values())
    print("\n".join(lines) or f"all {total} shares equal those of {parsed.expect}")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
