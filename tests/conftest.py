"""Fixtures for all tests, and the promise that a `procs` test leaves nothing behind (R7)."""

import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
TINY_MODEL = ROOT / "models" / "tiny-tasks"

_MARK = "APPLIANCE_TEST_RUN"
_HELPERS = ("multiprocessing.forkserver", "multiprocessing.resource_tracker")
"""Servers of multiprocessing that live as long as this interpreter, by design of that package."""


def pytest_configure() -> None:
    """Mark this run's descendants, so that they are known even after their parent has died."""
    os.environ[_MARK] = uuid.uuid4().hex


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip `gpu` tests with the reason where there is no CUDA."""
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device, or a torch built without CUDA")


def _is_helper(process: psutil.Process) -> bool:
    command = " ".join(process.cmdline())
    # the fork server's own children have its command line too, but not this process as their parent
    return any(name in command for name in _HELPERS) and process.ppid() == os.getpid()


def _descendants() -> dict[int, str]:
    """Processes of this run except this one: pid -> command line (zombies of ours included)."""
    mark = f"{_MARK}={os.environ[_MARK]}".encode()
    found: dict[int, str] = {}
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        try:
            ours = process.ppid() == os.getpid() or (
                mark in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
            )
            if ours and not _is_helper(process):
                found[process.pid] = f"{' '.join(process.cmdline())} ({process.status()})"
        except (psutil.Error, OSError):  # it ended while we looked, or is another user's
            continue
    return found


def _shared_memory() -> set[str]:
    directory = Path("/dev/shm")
    return {entry.name for entry in directory.iterdir()} if directory.is_dir() else set()


def _memory_files() -> list[str]:
    """Anonymous memory files that this process holds open."""
    links = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(entry)
        except OSError:
            continue
        if target.startswith("/memfd:"):
            links.append(f"{entry.name} -> {target}")
    return links


def _new(before: Mapping[int, str]) -> dict[int, str]:
    """Processes of this run that were not there before. A server that was there (a fixture of wider
    scope) may have replaced its workers; its own end is looked at when the run ends."""
    found = {}
    for pid, line in _descendants().items():
        try:
            parents = {parent.pid for parent in psutil.Process(pid).parents()}
        except psutil.Error:
            continue
        if pid not in before and not parents & before.keys():
            found[pid] = line
    return found


def _wait_until(done: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not done() and time.monotonic() < deadline:
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """After a `procs` test: no process, no named shared memory, no open memory file is left."""
    if request.node.get_closest_marker("procs") is None:
        yield
        return
    processes, shared, files = _descendants(), _shared_memory(), len(_memory_files())
    yield
    _wait_until(
        lambda: not (_new(processes) or _shared_memory() - shared or len(_memory_files()) > files)
    )
    assert not (left := _new(processes)), f"processes left behind: {left}"
    assert not (named := _shared_memory() - shared), f"shared memory left behind: {sorted(named)}"
    assert len(open_files := _memory_files()) <= files, f"memory files left open: {open_files}"


@pytest.fixture(scope="session", autouse=True)
def nothing_left_at_the_end() -> Iterator[None]:
    """The same for servers that several tests shared."""
    before = _descendants()
    yield
    _wait_until(lambda: not _new(before))
    assert not (left := _new(before)), f"processes left behind by the run: {left}"


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """The directory of the bundled model."""
    assert (TINY_MODEL / "config.json").is_file(), f"the bundled model is missing: {TINY_MODEL}"
    return TINY_MODEL
