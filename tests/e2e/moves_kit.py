"""Answers compared token by token while the workers that compute them change (R1, R12, R25).

A reference is what one mixed worker answers; the same work is then done by other fleets, which
flip, park and die meanwhile.
"""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import aiohttp

from tests.e2e.conftest import Server

MODEL = "tiny-tasks"
CLIENTS = 24
"""Requests under way at one time."""


class Reply:
    """One streamed answer, token by token."""

    def __init__(self) -> None:
        self.tokens: list[str] = []
        self.logprobs: list[float] = []
        self.text = ""
        self.finish: list[str] = []
        self.usage: Mapping[str, int] | None = None
        self.num_done = 0

    def line(self, line: bytes) -> None:
        """Take one line of the event stream. Raises `AssertionError` for anything after the end."""
        if not line.startswith(b"data: "):
            return
        data = line[6:].strip()
        assert not self.num_done, f"after the end: {data!r}"
        if data == b"[DONE]":
            self.num_done += 1
            return
        event = json.loads(data)
        assert "error" not in event, event
        self.usage = event.get("usage") or self.usage
        for choice in event["choices"]:
            assert not self.finish or not choice["text"], "text after the finish reason"
            self.text += choice["text"]
            if choice["logprobs"]:
                self.tokens += choice["logprobs"]["tokens"]
                self.logprobs += choice["logprobs"]["token_logprobs"]
            if choice["finish_reason"]:
                self.finish.append(choice["finish_reason"])

    def checked(self, body: Mapping[str, Any]) -> tuple[str, list[str], str]:
        """Text, tokens and finish reason, once it is sure that the answer ended exactly once, with
        as many tokens as the server counted (R1)."""
        assert (self.num_done, len(self.finish)) == (1, 1), (self.num_done, self.finish)
        assert self.usage is not None
        assert len(self.tokens) == self.usage["completion_tokens"]
        if self.finish == ["length"]:
            assert len(self.tokens) == body["max_tokens"]
        return self.text, self.tokens, self.finish[0]


def work(count: int, *, seed: int = 1) -> list[dict[str, Any]]:
    """Requests of mixed lengths, every 20th very long; a third begins as the one before, every
    seventh asks the same as one before; greedy and sampled with a seed in turn, half of them until
    the model ends."""
    rng = random.Random(seed)
    found: list[dict[str, Any]] = []
    for index in range(count):
        length = rng.choice((3, 17, 40, 90, 250)) if index % 20 != 10 else rng.randrange(1000, 1800)
        prompt = [rng.randrange(8, 1000) for _ in range(length)]
        if index % 3 == 2 and len(found[-1]["prompt"]) < 1500:
            prompt = found[-1]["prompt"] + prompt[:60]
        elif index % 7 == 6:
            prompt = found[rng.randrange(index)]["prompt"]
        body: dict[str, Any] = {
            "model": MODEL,
            "prompt": prompt,
            "max_tokens": rng.choice((1, 2, 20, 40, 70)),
            "stream": True,
            "stream_options": {"include_usage": True},
            "logprobs": 1,
        }
        body |= {"temperature": 0} if index % 2 else {"temperature": 0.9, "seed": index}
        if index % 4 > 1:
            body |= {"ignore_eos": True}
        found.append(body)
    return found


Answer = tuple[str, list[str], str]


async def ask(session: aiohttp.ClientSession, url: str, body: Mapping[str, Any]) -> Answer:
    """One answer, checked for itself."""
    reply = Reply()
    async with session.post(url + "/v1/completions", json=body) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            reply.line(line)
    return reply.checked(body)


async def answers(
    server: Server,
    bodies: Sequence[Mapping[str, Any]],
    *,
    meanwhile: Callable[["Progress"], Awaitable[None]] | None = None,
) -> list[Answer]:
    """Ask all of it, `CLIENTS` at a time; do something `meanwhile`."""
    progress = Progress(len(bodies))
    found: list[Answer | None] = [None] * len(bodies)
    todo = iter(enumerate(bodies))
    timeout = aiohttp.ClientTimeout(total=300)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:

        async def client() -> None:
            for index, body in todo:
                found[index] = await ask(session, server.url, body)
                progress.ended += 1

        async with asyncio.TaskGroup() as group:
            for _ in range(min(CLIENTS, len(bodies))):
                group.create_task(client())
            if meanwhile is not None:
                await meanwhile(progress)
    return [answer for answer in found if answer is not None]


class Progress:
    """How far the clients are."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.ended = 0

    async def until(self, share: float) -> bool:
        """Wait until that share has ended; False if everything has."""
        while self.ended < share * self.total:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        return self.ended < self.total


def check_same(found: Sequence[Answer], expected: Sequence[Answer]) -> None:
    """Token for token (R12). Says the first difference, not all the answers."""
    assert len(found) == len(expected)
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        if one != other:
            pairs = zip(one[1], other[1], strict=False)
            where = next((i for i, (a, b) in enumerate(pairs) if a != b), -1)
            raise AssertionError(
                f"request {index} from token {where}: {one[1][where:][:8]} ({one[2]}) for "
                f"{other[1][where:][:8]} ({other[2]})"
            )


async def post(server: Server, path: str, body: Any = None) -> dict[str, Any]:
    """An operator's change; its document with `status`."""
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{server.url}/admin/{path}", json=body or {}) as reply,
    ):
        return {**(await reply.json()), "status": reply.status}


def computed(server: Server) -> dict[int, tuple[int, int]]:
    """Tokens (prefill, decode) that each worker has computed so far (R25)."""
    workers = server.state()["workers"]
    return {w["id"]: (w["tokens"]["prefill"], w["tokens"]["decode"]) for w in workers}


def since(server: Server, before: Mapping[int, tuple[int, int]]) -> dict[int, tuple[int, int]]:
    """The same, after an earlier count."""
    return {
        worker: (prefill - before[worker][0], decode - before[worker][1])
        for worker, (prefill, decode) in computed(server).items()
    }


def moved(server: Server) -> Counter[str]:
    """Moves that are over, by kind and outcome."""
    moves = server.state()["transfers"]["moves"]
    return Counter({f"{move['kind']} {move['outcome']}": move["count"] for move in moves})


async def settle(server: Server, seconds: float = 20.0) -> None:
    """Every worker is up again, nothing moves, no block is held or leased (R2)."""

    def faults() -> list[Any]:
        state = server.state()
        bad = [w for w in state["workers"] if w["state"] not in ("ready", "parked")]
        bad += [w for w in state["workers"] if w["blocks"]["free"] != w["blocks"]["total"]]
        return [*bad, *state["moves"]]

    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while left := faults():
        assert loop.time() < end, left
        await asyncio.sleep(0.05)


async def linked(server: Server, count: int) -> None:
    """Every pair of workers can copy."""
    async with asyncio.timeout(20):
        while len(server.state()["links"]) < count:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 40}, "n": {"type": "integer"}},
    "required": ["name", "n"],
    "additionalProperties": False,
}
REMEMBERED: Sequence[Mapping[str, Any]] = (
    {"guided_json": SCHEMA, "temperature": 1.0},
    {"guided_regex": "([a-f]{3,9} ){12}end", "temperature": 1.0},
    {"repetition_penalty": 1.3, "temperature": 0},
    {"presence_penalty": 1.5, "frequency_penalty": 0.7, "temperature": 0.8},
    {"stop": ["th", "the "], "temperature": 1.0, "ignore_eos": True},
    {"min_tokens": 30, "temperature": 1.0},
    {"logit_bias": {"40": 4, "90": 3}, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
    {"stop_token_ids": list(range(100, 140)), "include_stop_str_in_output": True},
)
"""Options that look at the tokens before, or at where in a grammar an answer is."""


def demanding_work(count: int) -> list[dict[str, Any]]:
    """Requests whose next token depends on more than KV: what was emitted must have moved, too."""
    rng = random.Random(5)
    found = []
    for index in range(count):
        options = REMEMBERED[index % len(REMEMBERED)]
        body: dict[str, Any] = {
            "model": MODEL,
            "prompt": [rng.randrange(8, 1000) for _ in range(rng.choice((5, 60, 200)))],
            "max_tokens": rng.choice((40, 90)),
            "stream": True,
            "stream_options": {"include_usage": True},
            "logprobs": 1,
            "seed": index,
        }
        found.append(body | dict(options))
    return found
