"""The fork server: quick, nameless, and never leaving a child behind."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from appliance.live.forkserver import describe_exit
from appliance.live.spawner import Spawner, SpawnRequest
from tests.live.node_kit import until

pytestmark = pytest.mark.procs


class Process:
    """Hears of one spawned process."""

    def __init__(self) -> None:
        self.pid = 0
        self.exits: list[int | None] = []

    def spawned(self, pid: int) -> None:
        self.pid = pid

    def exited(self, status: int | None) -> None:
        self.exits.append(status)


def greet(sock: socket.socket) -> None:
    """Says who it is, waits for the end."""
    modules = sorted(name for name in sys.modules if name in ("decimal", "pytest", "__mp_main__"))
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    sock.sendall(f"{os.getppid()} {','.join(modules)} {ignored}".encode())
    sock.recv(1)


def leave(sock: socket.socket) -> None:
    sys.exit(5)


def spawn(spawner: Spawner, entry: str) -> tuple[Process, socket.socket]:
    """Fork a worker with this entry point; our end of its channel."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    process = Process()
    with open(os.devnull, "wb") as sink:
        request = SpawnRequest(
            entry=f"tests.live.test_spawner:{entry}",
            name="test-worker",
            channel=theirs.fileno(),
            stderr=sink.fileno(),
        )
        spawner.spawn(request, process)
    theirs.close()
    return process, ours


async def test_a_worker_has_the_imports_and_not_the_main_module_of_the_server() -> None:
    spawner = Spawner(["decimal", "no_such_module_anywhere"])
    ready = asyncio.Event()
    loop = asyncio.get_running_loop()
    spawner.attach(loop, ready.set)
    try:
        await asyncio.wait_for(ready.wait(), 30)
        process, channel = spawn(spawner, "greet")
        with channel:
            said = (await loop.sock_recv(channel, 100)).decode().split()
        # this test module imports pytest itself; the server's main module is not run again
        assert said == [str(spawner.pid), "decimal,pytest", "True"]
        await until(lambda: process.exits == [0])
    finally:
        spawner.close()


async def test_exits_come_with_their_status() -> None:
    spawner = Spawner([])
    spawner.attach(asyncio.get_running_loop(), lambda: None)
    try:
        process, channel = spawn(spawner, "leave")
        killed, other = spawn(spawner, "greet")
        with channel, other:
            await until(lambda: bool(process.exits and killed.pid))
            os.kill(killed.pid, signal.SIGKILL)
            await until(lambda: bool(killed.exits))
        assert [describe_exit(status or 0) for status in process.exits] == ["exit code 5"]
        assert [describe_exit(status or 0) for status in killed.exits] == ["killed by SIGKILL"]
    finally:
        spawner.close()


async def test_a_fork_server_that_dies_takes_its_workers_along_and_is_replaced() -> None:
    spawner = Spawner([])
    spawner.attach(asyncio.get_running_loop(), lambda: None)
    try:
        process, channel = spawn(spawner, "greet")
        with channel:
            await until(lambda: process.pid > 0)
            first = spawner.pid
            os.kill(first, signal.SIGKILL)
            await until(lambda: process.exits == [None])
            await until(lambda: not psutil.pid_exists(process.pid))
        again, channel = spawn(spawner, "greet")
        with channel:
            await until(lambda: again.pid > 0)
        assert spawner.pid != first
        await until(lambda: bool(again.exits))
    finally:
        spawner.close()


async def test_closing_while_the_imports_run_leaves_nothing() -> None:
    spawner = Spawner(["torch"])
    pid = spawner.pid
    spawner.close()
    assert not psutil.pid_exists(pid)


def test_r7_a_fork_server_ends_with_a_server_that_dies_during_the_imports() -> None:
    program = (
        "import os, signal\n"
        "from appliance.live.spawner import Spawner\n"
        "print(Spawner(['torch']).pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    pid, end = int(done.stdout), time.monotonic() + 10
    while psutil.pid_exists(pid) and time.monotonic() < end:
        time.sleep(0.01)
    assert not psutil.pid_exists(pid)
