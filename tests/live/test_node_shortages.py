"""The machine says no, or nobody listens: starts that fail, a stderr that has gone; the node serves
on."""

import asyncio
import errno
import os
import signal
from typing import Any

import msgspec
import psutil
import pytest

from appliance.core.types import ErrorKind, FinishReason, WorkerId
from appliance.live.node import Node
from appliance.live.records import Rejected
from appliance.live.spawner import ProcessEvents, Spawner, SpawnRequest
from appliance.policy import make_policy
from tests.live.node_kit import PRELOAD, make_settings, running, submit, until

pytestmark = pytest.mark.procs

ZERO, ONE = WorkerId(0), WorkerId(1)


class Reluctant(Spawner):
    """Out of descriptors for the calls with these numbers."""

    def __init__(self, preload: Any, fails: set[int]) -> None:
        self._fails = fails
        self._calls = 0
        super().__init__(preload)

    def spawn(self, request: SpawnRequest, events: ProcessEvents) -> None:
        self._calls += 1
        if self._calls in self._fails:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        super().spawn(request, events)


@pytest.mark.parametrize("fails", [{1}, {2}], ids=["loader", "held"])
async def test_r6_a_launch_that_fails_is_tried_again_and_leaves_nothing(fails: set[int]) -> None:
    settings = make_settings(engine="torch", num_blocks=160)
    async with running(settings, spawner=Reluctant(PRELOAD["torch"], fails)) as node:
        assert {worker["state"] for worker in node.state()["workers"]} == {"ready"}
        tried = sum(node.stats.workers[each].starts for each in (ZERO, ONE))
        assert tried == 2 + len(fails)
        descriptors = psutil.Process().num_fds()
        os.kill(node.workers.living[ZERO].pid or 0, signal.SIGKILL)
        await until(lambda: node.stats.workers[ZERO].deaths > 0)
        await node.wait_ready(2)
        await until(lambda: psutil.Process().num_fds() == descriptors)


async def test_a_worker_that_cannot_be_forked_dies_alone_and_says_why() -> None:
    spawner = Spawner([*PRELOAD["paced"], "tests.live.no_second_fork"])
    async with running(make_settings(), spawner=spawner) as node:
        deaths = {each: node.stats.workers[each].deaths for each in (ZERO, ONE)}
        assert sorted(deaths.values()) == [0, 1]
        unlucky = max(deaths, key=lambda each: deaths[each])
        cause = node.dispatcher.last_cause(unlucky)
        assert cause.startswith("exit code 1: cannot fork: Cannot allocate memory; use fewer")


async def test_r1_a_stderr_that_nobody_reads_any_more_costs_no_answer() -> None:
    def broken(_: str) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    async with running(make_settings(), stderr=broken) as node:
        node.stderr(ZERO, "said while the frame of a death is handled")
        ticket, (answer,) = await submit(node, "go on")
        await ticket.done
        assert answer.the_end.reason is FinishReason.LENGTH


async def test_r8_an_idle_worker_that_gets_many_requests_at_once_is_no_stall() -> None:
    settings = make_settings(stall_seconds=1.0)
    watch = msgspec.structs.replace(settings.watch, silence_seconds=5.0)
    async with running(msgspec.structs.replace(settings, watch=watch)) as node:
        await asyncio.sleep(1.3)
        ticket, answers = await submit(node, "four of a kind", n=4, max_tokens=200)
        await asyncio.gather(*(answer.first.wait() for answer in answers))
        busy = [each for each, slot in node.dispatcher.view.workers.items() if slot.assigned]
        (served,) = busy
        idle = ONE if served == ZERO else ZERO
        idle_pid = node.workers.living[idle].pid or 0
        os.kill(idle_pid, signal.SIGSTOP)
        try:
            os.kill(node.workers.living[served].pid or 0, signal.SIGKILL)
            await until(lambda: node.dispatcher.view.workers[idle].assigned == 4)
            assert node.health().ok, node.health().reason
        finally:
            os.kill(idle_pid, signal.SIGCONT)
        await ticket.done


async def test_r1_a_scheduler_that_fails_between_two_answers_ends_both() -> None:
    policy = make_policy("fcfs", {})
    nodes: list[Node] = []

    def admit(*args: Any) -> Any:
        if nodes and nodes[0].num_open == 2:
            raise ZeroDivisionError("a defect")
        return policy.dispatch.admit(*args)

    slots = msgspec.structs.replace(policy.dispatch, admit=admit)
    async with running(
        make_settings(num_workers=1), policy=msgspec.structs.replace(policy, dispatch=slots)
    ) as node:
        nodes.append(node)
        ticket, answers = await submit(node, "three answers", n=3)
        assert ticket.done.done()
        assert [answer.the_end.error for answer in answers] == [ErrorKind.INTERNAL] * 3
        assert node.num_open == 0
        with pytest.raises(Rejected, match="a defect"):
            await submit(node, "more")
