"""R7: when the server is killed, nothing of it is left, whatever its workers were doing."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.procs


@contextmanager
def server(engine: str) -> Iterator[tuple[subprocess.Popen[bytes], dict[str, Any]]]:
    """A server process that has served, and its report."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.live.server_process", engine],
        cwd=ROOT,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        yield process, json.loads(process.stdout.readline())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def family(pid: int) -> list[psutil.Process]:
    """The fork server and the workers."""
    return psutil.Process(pid).children(recursive=True)


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def left_in_temp() -> set[str]:
    """What a program might leave behind under a name."""
    places = [Path(tempfile.gettempdir()), Path("/dev/shm")]
    names = ("pymp-", "listener", "torch_", "psm_", "sem.", "appliance")
    return {
        str(entry)
        for place in places
        if place.is_dir()
        for entry in place.iterdir()
        if entry.name.startswith(names)
    }


@pytest.mark.parametrize("beside", ["nobody", "a stopped worker", "a stopped fork server"])
def test_r7_sigkill_of_the_server_ends_everything(beside: str) -> None:
    before = left_in_temp()
    with server("paced") as (process, report):
        everyone = family(process.pid)
        assert len(everyone) == 3
        (fork_server,) = {child.pid for child in everyone} - set(report["workers"])
        if beside == "a stopped worker":
            os.kill(report["workers"][0], signal.SIGSTOP)
        elif beside == "a stopped fork server":
            os.kill(fork_server, signal.SIGSTOP)
        process.kill()
        process.wait()
        end = time.monotonic() + 10
        while alive(everyone) and time.monotonic() < end:
            time.sleep(0.01)
        assert alive(everyone) == []
    assert left_in_temp() == before


@pytest.mark.parametrize("engine", ["paced", "torch"])
def test_the_asyncio_process_never_loads_torch(engine: str) -> None:
    with server(engine) as (process, report):
        assert report["torch"] == []
        assert len(report["tokens"]) == 8
        assert report["sources"] == (["none"] * 2 if engine == "paced" else ["disk", "slab"])
        process.send_signal(signal.SIGKILL)


def test_ctrl_c_of_the_terminal_does_not_reach_the_workers() -> None:
    with server("paced") as (process, report):
        assert {os.getsid(pid) for pid in report["workers"]} != {os.getsid(process.pid)}
