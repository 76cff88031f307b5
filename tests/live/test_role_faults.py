"""A fault at every step of the protocols of moves and flips: no answer suffers (R1, R5, R9)."""

import asyncio
from contextlib import suppress
from typing import Any

import msgspec
import pytest

from appliance.core.asks import Outcome
from appliance.core.faults import POINTS, REFUSABLE, FaultRule
from appliance.core.types import FinishReason, Role, WorkerId, WorkerSpec
from appliance.live.node import Node
from appliance.live.settings import NodeSettings
from tests.live.node_kit import greedy, make_settings, running, seeded, settled, submit, until

pytestmark = [pytest.mark.procs, pytest.mark.timeout(120)]

P, D = WorkerId(0), WorkerId(1)
PROTOCOL = sorted(
    point for point in POINTS if point.partition(".")[0] in ("move", "role", "fetch", "link")
)
SIDES = {
    "move.migrate": P,
    "move.offered": P,
    "move.before_prefilled": P,
    "move.before_final": P,
    "move.after_final": P,
    "move.release": P,
    "move.resume": P,
}
"""Where a point of a move is reached in a hand-off; the others at the target."""
SMALL = [
    ("move.pull", "refuse"),
    ("move.before_prefilled", "kill"),
    ("move.before_final", "kill"),
    ("move.before_copy", "refuse"),
    ("move.after_copy", "refuse"),
    ("move.before_pulled", "kill"),
    ("move.after_pulled", "kill"),
    ("move.release", "kill"),
    ("role.set", "refuse"),
    ("role.changed", "kill"),
]


def settings(*rules: FaultRule) -> NodeSettings:
    """One prefill and one decode worker."""
    made = make_settings(num_workers=2, faults=rules)
    workers = tuple(
        WorkerSpec(id=worker, devices=(f"paced:{worker}",), role=role)
        for worker, role in ((P, Role.PREFILL), (D, Role.DECODE))
    )
    config = msgspec.structs.replace(
        made.dispatcher, lease_seconds=2.0, drain_seconds=0.5, flip_seconds=1.0
    )
    return msgspec.structs.replace(made, workers=workers, dispatcher=config)


async def linked(node: Node) -> None:
    await until(lambda: len(node.moves.links) == 2)


async def answered(node: Node, name: str, count: int = 10) -> list[list[int]]:
    """Serve some requests of different lengths; their tokens."""
    work = []
    for index in range(count):
        prompt = " ".join(f"word{index * 5 + k}" for k in range(3 + 11 * index))
        sampling = greedy() if index % 2 else seeded(index)
        work.append(
            await submit(
                node, prompt, name=f"{name}{index}", max_tokens=40 + index, sampling=sampling
            )
        )
    await asyncio.gather(*(ticket.done for ticket, _ in work))
    for index, (_, (answer,)) in enumerate(work):
        assert answer.the_end.reason is FinishReason.LENGTH, answer.the_end
        assert len(answer.tokens) == 40 + index
    return [answer.tokens for _, (answer,) in work]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """The answers of an undisturbed mixed worker."""

    async def serve() -> list[list[int]]:
        async with running(make_settings(num_workers=1)) as node:
            return await answered(node, "e")

    return asyncio.run(serve())


async def disturb(rule: FaultRule, expected: list[list[int]]) -> Node:
    """Serve, flip both ways and serve with this fault; nothing may be lost, doubled or left."""
    async with running(settings(rule)) as node:
        with suppress(TimeoutError):  # a fault of a link may keep it down
            async with asyncio.timeout(3):
                await linked(node)
        assert await answered(node, "a") == expected
        outcomes = []
        for roles in ((Role.DECODE, Role.PREFILL), (Role.PREFILL, Role.DECODE)):
            serving = asyncio.create_task(answered(node, "b"))
            await asyncio.sleep(0.05)
            asked = await node.asks.roles([(P, roles[0]), (D, roles[1])])
            outcomes.append(asked.outcome)
            assert await serving == expected
            await until(lambda: all(w["state"] == "ready" for w in node.state()["workers"]))
        assert set(outcomes) <= {Outcome.DONE, Outcome.ROLLED_BACK, Outcome.REFUSED}
        assert await answered(node, "c") == expected
        state = await settled(node)
        assert {worker["state"] for worker in state["workers"]} == {"ready"}
        assert all(worker["blocks"]["leased"] == 0 for worker in state["workers"])
        assert not node.moves.under_way
        return node


@pytest.mark.parametrize(("point", "action"), SMALL)
async def test_R9_a_fault_at_a_step_of_the_protocol_costs_no_answer(
    point: str, action: str, expected: Any
) -> None:
    worker = SIDES.get(point, D)
    await disturb(FaultRule(point=point, action=action, worker=worker, nth=2, epoch=1), expected)


@pytest.mark.slow
@pytest.mark.parametrize("action", ["kill", "raise", "stop", "delay", "refuse"])
@pytest.mark.parametrize("point", PROTOCOL)
@pytest.mark.parametrize("worker", [P, D])
async def test_R9_any_fault_at_any_step_costs_no_answer(
    point: str, action: str, worker: WorkerId, expected: Any
) -> None:
    if action == "refuse" and point not in REFUSABLE:
        pytest.skip("nothing is asked for here that could be refused")
    rule = FaultRule(point=point, action=action, worker=worker, nth=2, epoch=1, seconds=0.3)
    await disturb(rule, expected)


async def test_R9_a_worker_that_does_not_answer_is_rolled_back_and_serves(expected: Any) -> None:
    rule = FaultRule(point="role.set", action="delay", worker=D, seconds=2.5)
    async with running(settings(rule)) as node:
        await linked(node)
        asked = await node.asks.roles([(P, Role.DECODE), (D, Role.PREFILL)])
        assert asked.outcome is Outcome.ROLLED_BACK
        assert "did not answer" in asked.reason
        assert [w["role"] for w in node.state()["workers"]] == ["prefill", "decode"]
        assert await answered(node, "a") == expected
        (newest, *_) = node.asks.decisions(1)
        assert newest.outcome.startswith("rolled back")
        await until(lambda: node.stats.worker(D).flips == 2)  # it wakes, and hears both words
        again = await node.asks.roles([(P, Role.DECODE), (D, Role.PREFILL)])
        assert again.outcome is Outcome.DONE
        await settled(node)


async def test_R14_a_wrong_copy_is_noticed_and_made_good(expected: Any) -> None:
    rule = FaultRule(point="move.after_copy", action="refuse", worker=D, nth=1, repeat=True)
    async with running(settings(rule)) as node:
        await linked(node)
        assert await answered(node, "a") == expected
        state = await settled(node)
        ends = {(m["kind"], m["outcome"]) for m in state["transfers"]["moves"]}
        assert ("hand-off", "done") not in ends
        assert {outcome for _, outcome in ends} & {"failed", "resumed"}
