"""Workers that die, stop, crash in a loop or never start; the node serves on (R4-R6, R27)."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable

import msgspec
import pytest
import uvloop

from appliance.core.faults import FaultRule
from appliance.core.types import ErrorKind, FinishReason, WorkerId
from appliance.live.node import Node, StartFailed
from appliance.live.spawner import Spawner
from appliance.live.workers import is_stopped
from tests.live.node_kit import (
    PRELOAD,
    Answer,
    greedy,
    make_settings,
    make_text,
    running,
    seeded,
    settled,
    submit,
    until,
)

pytestmark = pytest.mark.procs

NUM_STREAMS = 16


async def sixteen(
    node: Node, disturb: Callable[[Node], Awaitable[None]] | None = None
) -> list[Answer]:
    """Sixteen answers, greedy and seeded, of different lengths; `disturb` once all have begun."""
    work = []
    for index in range(NUM_STREAMS):
        sampling = greedy() if index % 2 else seeded(1000 + index)
        prompt = f"a prompt with number {index} " * (1 + index % 4)
        work.append(await submit(node, prompt, max_tokens=60 + index, sampling=sampling))
    await asyncio.gather(*(answers[0].first.wait() for _, answers in work))
    if disturb is not None:
        await disturb(node)
    await asyncio.gather(*(ticket.done for ticket, _ in work))
    await settled(node)
    return [answers[0] for _, answers in work]


def pid_of(node: Node, worker: int) -> int:
    pid = node.workers.living[WorkerId(worker)].pid
    assert pid is not None
    return pid


async def kill_one(node: Node) -> None:
    os.kill(pid_of(node, 1), signal.SIGKILL)


async def stop_one(node: Node) -> None:
    os.kill(pid_of(node, 1), signal.SIGSTOP)


async def segv_one(node: Node) -> None:
    os.kill(pid_of(node, 1), signal.SIGSEGV)


async def kill_both(node: Node) -> None:
    for worker in (0, 1):
        os.kill(pid_of(node, worker), signal.SIGKILL)


Disturb = Callable[[Node], Awaitable[None]]


async def undisturbed_and_disturbed(disturb: Disturb) -> None:
    """The same sixteen answers twice, once with a fault in their middle: no token may differ."""
    async with running(make_settings()) as node:
        undisturbed = await sixteen(node)
        disturbed = await sixteen(node, disturb)
        assert [answer.tokens for answer in disturbed] == [answer.tokens for answer in undisturbed]
        assert [answer.text for answer in disturbed] == [answer.text for answer in undisturbed]
        for index, answer in enumerate(disturbed):
            assert answer.the_end.reason is FinishReason.LENGTH
            assert answer.the_end.emitted_tokens == len(answer.tokens) == 60 + index
        assert node.stats.replaced >= 1
        await node.wait_ready(2)
        assert node.state()["workers"][1]["deaths"] == 1


@pytest.mark.parametrize("disturb", [segv_one, kill_both])
async def test_r5_answers_go_on_identically_after_a_death(disturb: Disturb) -> None:
    await undisturbed_and_disturbed(disturb)


@pytest.mark.parametrize("disturb", [kill_one, stop_one])
def test_r5_answers_go_on_identically_on_the_loop_of_the_product(disturb: Disturb) -> None:
    uvloop.run(undisturbed_and_disturbed(disturb))


async def test_r4_a_stopped_worker_is_noticed_and_killed_before_its_requests_move() -> None:
    async with running(make_settings()) as node:
        pid = pid_of(node, 0)
        os.kill(pid, signal.SIGSTOP)
        await until(lambda: is_stopped(pid), 2)
        began = asyncio.get_running_loop().time()
        await until(lambda: node.stats.workers[WorkerId(0)].deaths == 1, 5)
        assert "stopped" in node.dispatcher.last_cause(WorkerId(0))
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        assert asyncio.get_running_loop().time() - began < 5
        await node.wait_ready(2)


async def test_r4_the_cause_of_a_death_names_signal_or_exit_and_last_words() -> None:
    rule = FaultRule(point="worker.before_step", action="oom", worker=WorkerId(0), epoch=1)
    async with running(make_settings(num_workers=1, faults=[rule])) as node:
        os.kill(pid_of(node, 0), 0)
        ticket, (answer,) = await submit(node, "hello")
        await ticket.done
        assert answer.the_end.reason is FinishReason.LENGTH
        cause = node.dispatcher.last_cause(WorkerId(0))
        assert "exit code" in cause
        assert "memory" in cause
        await node.wait_ready(1)
        os.kill(pid_of(node, 0), signal.SIGKILL)
        await until(lambda: node.stats.workers[WorkerId(0)].deaths == 2)
        assert node.dispatcher.last_cause(WorkerId(0)) == "killed by SIGKILL"
        await node.wait_ready(1)


async def test_r6_a_crash_loop_ends_in_quarantine_and_the_service_stays_up() -> None:
    rule = FaultRule(point="worker.start", action="kill", worker=WorkerId(0), repeat=True)
    async with running(make_settings(faults=[rule]), ready=1) as node:
        await until(lambda: node.state()["workers"][0]["state"] == "quarantined")
        assert node.stats.workers[WorkerId(0)].deaths == 3
        assert node.ready() == (True, "ready")
        assert node.health().ok
        ticket, (answer,) = await submit(node, "still here?")
        await ticket.done
        assert answer.the_end.reason is FinishReason.LENGTH


async def test_a_node_whose_workers_all_crash_says_why_and_ends_what_waits() -> None:
    rule = FaultRule(point="worker.start", action="exit", repeat=True)
    async with running(make_settings(faults=[rule]), ready=0) as node:
        ticket, (answer,) = await submit(node, "anyone?")
        with pytest.raises(StartFailed, match="exit code"):
            await node.wait_ready()
        await ticket.done
        assert answer.the_end.error is ErrorKind.NO_WORKER
        assert not node.health().ok
        assert node.ready() == (False, "no worker is ready")


async def test_r20_workers_that_the_kernel_kills_at_their_start_are_named_with_a_fix() -> None:
    rule = FaultRule(point="worker.start", action="kill", repeat=True)
    async with running(make_settings(faults=[rule]), ready=0) as node:
        with pytest.raises(StartFailed) as caught:
            await node.wait_ready()
    words = str(caught.value)
    assert "worker 0 (paced:0): killed by SIGKILL; worker 1 (paced:1): killed by SIGKILL" in words
    assert "out-of-memory killer" in words
    assert "set kv.memory lower or use fewer workers (--devices)" in words


async def test_r20_a_refused_start_names_cause_and_fix() -> None:
    settings = make_settings(num_workers=1, profile="no-such-device")
    async with running(settings, ready=0) as node:
        with pytest.raises(StartFailed, match="unknown device profile 'no-such-device'; use one"):
            await node.wait_ready()


async def test_r27_one_poison_among_many_fails_alone() -> None:
    text = make_text(make_settings())
    poison = (await text.encode("%", add_special_tokens=False)).ids[0]
    text.close()
    rule = FaultRule(point="worker.before_step", action="kill", token=poison, repeat=True)
    async with running(make_settings(num_workers=3, faults=[rule])) as node:
        work = [await submit(node, f"harmless {index}") for index in range(24)]
        bad_ticket, (bad,) = await submit(node, "the % poison")
        work += [await submit(node, f"harmless {index}") for index in range(24)]
        await asyncio.gather(bad_ticket.done, *(ticket.done for ticket, _ in work))
        assert bad.the_end.error is ErrorKind.POISON
        assert all(a.the_end.reason is FinishReason.LENGTH for _, answers in work for a in answers)
        await node.wait_ready(3)


async def test_the_fork_server_may_die_too() -> None:
    spawner = Spawner(PRELOAD["paced"])
    async with running(make_settings(), spawner=spawner) as node:
        undisturbed = await sixteen(node)

        async def kill_fork_server(node: Node) -> None:
            os.kill(spawner.pid, signal.SIGKILL)

        disturbed = await sixteen(node, kill_fork_server)
        assert [a.tokens for a in disturbed] == [a.tokens for a in undisturbed]
        await node.wait_ready(2)


async def test_r8_a_long_step_is_healthy_and_is_not_killed() -> None:
    rule = FaultRule(point="worker.before_step", action="delay", seconds=2.5)
    settings = make_settings(num_workers=1, faults=[rule], stall_seconds=0.5)
    watch = msgspec.structs.replace(settings.watch, kill_seconds=10.0)
    async with running(msgspec.structs.replace(settings, watch=watch)) as node:
        ticket, (answer,) = await submit(node, "slow")
        verdicts = []
        while not ticket.done.done():
            verdicts.append(node.health())
            await asyncio.sleep(0.1)
        assert len(verdicts) > 10
        assert all(verdict.ok for verdict in verdicts)
        assert answer.the_end.reason is FinishReason.LENGTH
        assert node.stats.workers[WorkerId(0)].deaths == 0
