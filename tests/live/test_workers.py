"""Starting, watching, killing and ending processes that misbehave (R4, R8)."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest

from appliance.core.messages import Heartbeat, Report, WorkerUp
from appliance.core.start import WorkerStart
from appliance.core.types import Role, WorkerId
from appliance.live.incarnation import MAX_LINE_BYTES, Incarnation
from appliance.live.settings import NodeSettings
from appliance.live.spawner import Spawner
from appliance.live.workers import WatchSettings, Workers
from tests.live.node_kit import greedy, make_settings, running, submit, until

pytestmark = pytest.mark.procs

ZERO = WorkerId(0)
KILLED = "killed by the node"


class Listener:
    """Keeps what a pool of workers says."""

    def __init__(self) -> None:
        self.reports: list[Report] = []
        self.payloads: list[bytes] = []
        self.deaths: list[tuple[int, int, str]] = []
        self.lines: list[str] = []

    def frame(self, worker: WorkerId, reports: list[Report], payload: bytes) -> None:
        self.reports += reports
        self.payloads.append(payload)

    def down(self, worker: WorkerId, epoch: int, cause: str) -> None:
        self.deaths.append((worker, epoch, cause))

    def stderr(self, worker: WorkerId, line: str) -> None:
        self.lines.append(line)

    def steps(self) -> list[int]:
        return [report.step for report in self.reports if isinstance(report, Heartbeat)]

    @property
    def ups(self) -> int:
        return sum(isinstance(report, WorkerUp) for report in self.reports)


def settings_for(stub: str, **more: object) -> NodeSettings:
    return make_settings(num_workers=1, entry=f"tests.live.stub_workers:{stub}", **more)


@asynccontextmanager
async def pool(stub: str, **watch: float) -> AsyncIterator[tuple[Workers, Listener]]:
    """A pool with one worker of that kind, up."""
    settings = settings_for(stub)

    def make_start(worker: WorkerId, epoch: int, *, load_weights: bool) -> WorkerStart:
        del worker
        return settings.worker_start(
            settings.workers[0],
            epoch,
            role=Role.MIXED,
            hash_key=b"k" * 16,
            load_weights=load_weights,
        )

    loop, listener = asyncio.get_running_loop(), Listener()
    spawner = Spawner(["appliance.worker.channel", "tests.live.stub_workers"])
    spawner.attach(loop, lambda: None)
    plan = msgspec.structs.replace(settings.pool, weight_bytes=0)
    workers = Workers(
        plan,
        spawner,
        make_start=make_start,
        events=listener,
        watch=WatchSettings(**{"interval": 0.05, "silence_seconds": 0.2, **watch}),
        clock=loop.time,
    )
    workers.open()
    workers.start(ZERO, 1)
    try:
        await until(lambda: listener.ups == 1 or bool(listener.deaths))
        yield workers, listener
    finally:
        await workers.close()
        spawner.close()


@pytest.mark.parametrize(
    ("stub", "cause"),
    [
        (
            "garbled",
            "killed by the node: it broke the protocol: impossible frame length 4294967295",
        ),
        ("hangs_up", f"{KILLED}: it closed its channel and did not exit"),
        ("half_a_frame", "killed by SIGKILL"),
        ("last_words", "exit code 7: the disk is full; free some space"),
        ("raises", "exit code 1: RuntimeError: a bug"),
    ],
)
async def test_r4_every_way_to_die_is_one_death_with_its_cause(stub: str, cause: str) -> None:
    async with pool(stub) as (workers, listener):
        await until(lambda: bool(listener.deaths))
        assert listener.deaths == [(0, 1, cause)]
        assert not workers.living
        assert listener.steps() == []


async def test_an_entry_that_does_not_exist_is_a_death_with_the_import_error() -> None:
    async with pool("no_such_function") as (_, listener):
        await until(lambda: bool(listener.deaths))
        ((_, _, cause),) = listener.deaths
        assert cause.startswith("exit code 1: AttributeError:")


async def test_r4_a_silent_process_is_killed_after_the_limit_and_not_before() -> None:
    async with pool("mute", kill_seconds=0.6) as (workers, listener):
        life = workers.living[ZERO]
        silent_since = life.heard_at
        await until(lambda: bool(listener.deaths))
        assert asyncio.get_running_loop().time() - silent_since >= 0.6
        assert "it hung" in listener.deaths[0][2]


async def test_r4_a_stopped_process_is_gone_when_its_death_is_reported() -> None:
    async with pool("deaf") as (workers, listener):
        pid = workers.living[ZERO].pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        await until(lambda: bool(listener.deaths))
        assert "it was stopped" in listener.deaths[0][2]
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_nothing_of_a_killed_worker_is_heard() -> None:
    async with pool("deaf") as (workers, listener):
        await until(lambda: len(listener.steps()) > 2)
        workers.kill(ZERO, "for a test")
        heard = len(listener.reports)
        await until(lambda: bool(listener.deaths))
        assert len(listener.reports) == heard
        assert listener.deaths == [(0, 1, "killed by the node: for a test")]


async def test_a_worker_that_does_not_end_is_killed_at_the_close() -> None:
    async with pool("never_ends", close_seconds=0.2) as (workers, listener):
        life: Incarnation = workers.living[ZERO]
        await workers.close()
        assert not workers.living
        assert life.pid is not None
        with pytest.raises(ProcessLookupError):
            os.kill(life.pid, 0)
        assert listener.deaths == []


async def test_an_orderly_end_needs_no_kill() -> None:
    async with pool("counts_lives") as (workers, listener):
        await until(lambda: listener.steps() == [1])
        began = asyncio.get_running_loop().time()
        await workers.close()
        assert asyncio.get_running_loop().time() - began < 5.0
        assert listener.deaths == []


async def test_a_kv_slab_outlives_its_worker_and_a_pool_starts_with_a_fresh_one() -> None:
    for _ in range(2):
        async with pool("counts_lives") as (workers, listener):
            await until(lambda: listener.steps() == [1])
            workers.kill(ZERO, "for a test")
            await until(lambda: bool(listener.deaths))
            workers.start(ZERO, 2)
            await until(lambda: listener.steps() == [1, 2])
            assert workers.kv_resident_bytes() >= 4096


async def test_stderr_of_a_worker_comes_line_by_line() -> None:
    async with pool("last_words") as (_, listener):
        await until(lambda: bool(listener.deaths))
        assert listener.lines == ["first line", "the disk is full; free some space"]


async def test_r8_a_worker_that_has_work_and_does_not_move_is_reported() -> None:
    watch = WatchSettings(close_seconds=0.2)
    async with running(settings_for("deaf", stall_seconds=0.3, watch=watch)) as node:
        assert node.health().ok
        ticket, (answer,) = await submit(node, "anybody?", sampling=greedy())
        assert node.health().ok
        await until(lambda: not node.health().ok)
        assert "worker 0 has work and has made no step" in node.health().reason
        node.cancel(ticket)
    assert ticket.done.done()
    assert len(answer.ends) == 1


async def test_a_payload_that_does_not_decode_costs_the_worker_its_life() -> None:
    settings = settings_for("bad_payload")
    dispatcher = msgspec.structs.replace(settings.dispatcher, quarantine_deaths=2)
    settings = msgspec.structs.replace(settings, dispatcher=dispatcher)
    async with running(settings, ready=0) as node:
        await until(lambda: node.state()["workers"][0]["state"] == "quarantined")
        assert "it broke the protocol" in node.dispatcher.last_cause(ZERO)
        assert not node.health().ok


async def test_r19_lives_and_deaths_leave_no_descriptor() -> None:
    async with pool("deaf", close_seconds=0.2) as (workers, listener):

        def open_files() -> int:
            return len(os.listdir("/proc/self/fd"))

        before = open_files()
        for life in range(1, 8):
            pid = workers.living[ZERO].pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            await until(lambda life=life: len(listener.deaths) == life)
            workers.start(ZERO, life + 1)
            await until(lambda life=life: listener.ups == life + 1)
        assert open_files() == before


async def test_r4_a_worker_that_a_stopped_fork_server_never_forks_is_a_death() -> None:
    async with pool("deaf", kill_seconds=0.6, silence_seconds=30.0) as (workers, listener):
        stuck = workers._spawner.pid
        os.kill(stuck, signal.SIGSTOP)
        workers.kill(ZERO, "for a test")
        await until(lambda: len(listener.deaths) == 1)
        workers.start(ZERO, 2)
        await until(lambda: len(listener.deaths) == 2)
        assert listener.deaths[1] == (0, 2, "the fork server died")
        workers.start(ZERO, 3)
        await until(lambda: listener.ups == 2)
        assert workers._spawner.pid != stuck


async def test_r26_a_line_without_an_end_on_stderr_is_cut() -> None:
    async with pool("chatters") as (workers, listener):
        await until(lambda: len(listener.lines) >= 2)
        assert all(len(line) <= 2 * MAX_LINE_BYTES for line in listener.lines)
        assert len(workers.living[ZERO]._half_line) <= MAX_LINE_BYTES
