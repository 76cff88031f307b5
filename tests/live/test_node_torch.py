"""The node's weight slab under the torch engine: loaded once, mapped by everybody after (R6)."""

import asyncio
import os
import signal

import msgspec
import pytest

from appliance.core.faults import FaultRule
from appliance.core.types import FinishReason, WorkerId
from appliance.live.node import Node
from tests.live.node_kit import make_settings, running, settled, submit

pytestmark = pytest.mark.procs


def sources(node: Node) -> list[str]:
    return [stats.weights_source for stats in node.stats.workers.values()]


async def eight(node: Node) -> list[list[int]]:
    work = [await submit(node, f"spell word{index}", max_tokens=24) for index in range(8)]
    await asyncio.gather(*(answers[0].first.wait() for _, answers in work))
    if node.stats.workers[WorkerId(0)].deaths == 0 and node.stats.submitted > 8:
        pid = node.workers.living[WorkerId(0)].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
    await asyncio.gather(*(ticket.done for ticket, _ in work))
    await settled(node)
    assert {answers[0].the_end.reason for _, answers in work} == {FinishReason.LENGTH}
    return [answers[0].tokens for _, answers in work]


async def test_r5_r6_a_successor_maps_the_slab_and_answers_are_identical() -> None:
    async with running(make_settings(engine="torch", num_blocks=160)) as node:
        assert sources(node) == ["disk", "slab"]
        undisturbed = await eight(node)
        disturbed = await eight(node)
        assert node.stats.workers[WorkerId(0)].deaths == 1
        await node.wait_ready(2)
        assert sources(node) == ["slab", "slab"]
        assert await eight(node) == disturbed == undisturbed


async def test_r6_when_the_loader_dies_another_worker_loads_into_a_fresh_slab() -> None:
    rule = FaultRule(point="worker.weights", action="kill", worker=WorkerId(0), epoch=1)
    settings = make_settings(engine="torch", num_blocks=160, faults=[rule])
    async with running(msgspec.structs.replace(settings, validate=False)) as node:
        assert sources(node) == ["slab", "disk"]
        ticket, (answer,) = await submit(node, "spell cat")
        await ticket.done
        assert answer.the_end.reason is FinishReason.LENGTH
