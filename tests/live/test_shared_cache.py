"""What workers have computed outlives them and is everybody's: successors and peers (R6, R10)."""

import os
import signal
from typing import Any

import msgspec
import pytest

from appliance.core.asks import Outcome
from appliance.core.messages import HOST_TIER
from appliance.core.types import Role, WorkerId
from appliance.live.node import Node
from tests.live.node_kit import make_settings, running, settled, submit, until

pytestmark = [pytest.mark.procs, pytest.mark.timeout(120)]

ZERO, ONE = WorkerId(0), WorkerId(1)
PROMPT = "the same long beginning of many words " * 24


async def served(node: Node, prompt: str = PROMPT, **more: Any) -> tuple[int, list[int]]:
    """Serve one request: prompt tokens found in a cache, and its tokens."""
    ticket, (answer,) = await submit(node, prompt, **more)
    await ticket.done
    assert answer.the_end.error is None, answer.the_end
    await settled(node)
    return answer.the_end.cached_tokens, answer.tokens


def worker(node: Node, number: int) -> dict[str, Any]:
    return dict(node.state()["workers"][number])


@pytest.mark.parametrize("engine", ["paced", "torch"])
async def test_R6_a_successor_has_the_complete_blocks_of_its_predecessor(engine: str) -> None:
    settings = make_settings(num_workers=1, engine=engine, num_blocks=256)
    async with running(settings) as node:
        first, tokens = await served(node)
        assert first == 0
        for life in (2, 3):
            os.kill(worker(node, 0)["pid"], signal.SIGKILL)
            await until(lambda life=life: node.dispatcher.epoch(ZERO) == life)
            await node.wait_ready(1)
            cached, again = await served(node)
            assert cached >= 16 * 8
            assert again == tokens


async def test_R10_a_peer_s_blocks_are_copied_instead_of_computed_again() -> None:
    async with running(make_settings(num_workers=2)) as node:
        await until(lambda: len(node.moves.links) == 2)
        _, tokens = await served(node)
        (home,) = [w["id"] for w in node.state()["workers"] if w["blocks"]["cached"]]
        other = WorkerId(1 - home)
        answer = await node.asks.park(WorkerId(home))
        assert answer.outcome is Outcome.DONE
        computed = worker(node, other)["tokens"]["prefill"]
        cached, again = await served(node)
        assert again == tokens
        assert cached >= 16 * 8
        assert worker(node, other)["tokens"]["prefill"] - computed < 32
        assert node.moves.prefixes == {"all": 1}
        ((kind, path, source, target, count),) = node.moves.counts()
        assert (kind, path, source, target) == ("prefix", "shared memory", home, other)
        assert count.num_bytes > 0


async def test_R10_a_flip_keeps_the_cache() -> None:
    async with running(make_settings(num_workers=1)) as node:
        await served(node)
        before = worker(node, 0)["blocks"]["cached"]
        for role in (Role.DECODE, Role.PREFILL, Role.MIXED):
            assert (await node.asks.roles([(ZERO, role)])).outcome is Outcome.DONE
            assert worker(node, 0)["blocks"]["cached"] == before
            cached, _ = await served(node)
            assert cached >= 16 * 8


async def test_an_answer_that_was_computed_elsewhere_is_not_computed_again() -> None:
    """The second turn of a conversation: prompt and answer of the first are in the cache of the
    worker that decoded, and come from there."""
    settings = make_settings(num_workers=2)
    specs = [
        msgspec.structs.replace(spec, role=role)
        for spec, role in zip(settings.workers, (Role.PREFILL, Role.DECODE), strict=True)
    ]
    async with running(msgspec.structs.replace(settings, workers=tuple(specs))) as node:
        await until(lambda: len(node.moves.links) == 2)
        encoded = await node.text.encode(PROMPT, add_special_tokens=True)
        ids = list(encoded.ids)
        for turn in range(4):
            ticket, (answer,) = await submit(node, ids, max_tokens=100)
            await ticket.done
            await settled(node)
            new_tokens = len(ids) - answer.the_end.cached_tokens
            if turn:
                assert new_tokens <= 20 + 16, f"turn {turn} computed {new_tokens} tokens"
            ids += [*answer.tokens, *range(100 + 20 * turn, 120 + 20 * turn)]


async def test_R10_what_was_evicted_comes_back_from_host_memory() -> None:
    """Two prompts that do not fit into the pool together, each asked for again."""
    settings = make_settings(num_workers=1, num_blocks=40, max_model_len=640)
    async with running(msgspec.structs.replace(settings, host_blocks=256)) as node:
        prompts = [f"{name} {PROMPT}" for name in ("one", "two")]
        answers = [await served(node, prompt) for prompt in prompts]
        assert [cached for cached, _ in answers] == [0, 0]
        assert worker(node, 0)["host_tier_blocks"] > 0
        for prompt, (_, tokens) in zip(prompts, answers, strict=True):
            cached, again = await served(node, prompt)
            assert cached >= 16 * 8
            assert again == tokens
        paths = {(path, source) for _, path, source, _, _ in node.moves.counts()}
        assert paths == {("host memory", HOST_TIER)}
