"""The whole product as users have it: `appliance start` in its own process, HTTP in front."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "tiny-tasks"


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """One running `appliance start`."""

    def __init__(self, log: Path, args: Sequence[str], env: Mapping[str, str]) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self._file = log.open("wb")
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "appliance", "start", "--port", str(self.port), *args],
            cwd=ROOT,
            env={**os.environ, **env},
            stdout=self._file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
        self._seen: set[int] = set()

    def get(self, path: str) -> tuple[int, Any]:
        """GET a JSON document; the status and the document."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=10) as reply:
                return reply.status, json.loads(reply.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read() or b"null")

    def state(self) -> Any:
        """The document of /admin/state."""
        status, document = self.get("/admin/state")
        assert status == 200, document
        for worker in document["workers"]:
            if worker.get("pid"):
                self._seen.add(worker["pid"])
        return document

    def pid(self, worker: int) -> int:
        """Process id of a worker."""
        return int(next(w["pid"] for w in self.state()["workers"] if w["id"] == worker))

    def wait_ready(self, workers: int, seconds: float = 90) -> None:
        """Return once `workers` workers are ready; fail with the log otherwise."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()
            try:
                if self.get("/ready")[0] == 200:
                    ready = [w for w in self.state()["workers"] if w["state"] == "ready"]
                    if len(ready) >= workers:
                        return
            except (ConnectionError, urllib.error.URLError):
                pass
            time.sleep(0.05)
        pytest.fail(f"{workers} workers were not ready in {seconds} s:\n{self.log.read_text()}")

    def stop(self, *, seconds: float = 30) -> int:
        """SIGTERM and the exit code; every process it ever named must be gone then."""
        if self.process.poll() is None:
            children = psutil.Process(self.process.pid).children(recursive=True)
            self._seen.update(child.pid for child in children)
            self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            pytest.fail(f"no end within {seconds} s of SIGTERM:\n{self.log.read_text()}")
        finally:
            self._file.close()
        self.wait_gone(5)
        return code

    def wait_gone(self, seconds: float) -> None:
        """Fail unless all processes of this server end within `seconds`."""
        end = time.monotonic() + seconds
        while alive := [pid for pid in self._seen if _running(pid)]:
            assert time.monotonic() < end, f"processes left behind: {alive}"
            time.sleep(0.02)

    def note_processes(self) -> None:
        """Remember all present processes of this server for `wait_gone`."""
        self._seen.add(self.process.pid)
        children = psutil.Process(self.process.pid).children(recursive=True)
        self._seen.update(child.pid for child in children)


def _running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Answer:
    """What one streamed completion gave."""

    def __init__(self) -> None:
        self.text = ""
        self.finish: list[str] = []
        self.error: dict[str, Any] | None = None
        self.status = 0
        self.done = False
        self.first_token = asyncio.Event()

    @property
    def terminal_events(self) -> int:
        """Finish reasons and errors seen: must be exactly one (R1)."""
        return len(self.finish) + (self.error is not None)


async def stream(url: str, body: Mapping[str, Any], answer: Answer | None = None) -> Answer:
    """POST a streaming completion and read it to its end."""
    answer = answer or Answer()
    timeout = aiohttp.ClientTimeout(total=180)
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.post(url + "/v1/completions", json={**body, "stream": True}) as reply,
    ):
        answer.status = reply.status
        if reply.status != 200:
            answer.error = (await reply.json())["error"]
            return answer
        async for line in reply.content:
            _take(line, answer)
    return answer


def _take(line: bytes, answer: Answer) -> None:
    if not line.startswith(b"data: "):
        return
    data = line[6:].strip()
    if data == b"[DONE]":
        answer.done = True
        return
    event = json.loads(data)
    if "error" in event:
        answer.error = event["error"]
        return
    for choice in event["choices"]:
        if choice["text"]:
            answer.text += choice["text"]
            answer.first_token.set()
        if choice["finish_reason"]:
            answer.finish.append(choice["finish_reason"])


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Start servers; each is stopped at the end and must leave nothing behind."""
    servers: list[Server] = []

    def start(*args: str, workers: int = 1, env: Mapping[str, str] | None = None) -> Server:
        server = Server(tmp_path / f"server{len(servers)}.log", args, env or {})
        servers.append(server)
        server.wait_ready(workers)
        return server

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def streaming() -> Callable[..., Any]:
    """The coroutine function that streams one completion."""
    return stream


@pytest.fixture
def new_answer() -> Callable[[], Answer]:
    """Makes an empty answer to watch while it streams."""
    return Answer


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """A client session."""
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=180)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as client:
        yield client
