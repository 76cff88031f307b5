"""What the benchmarks of the control plane share: a real server process, its cores, its CPU time.

CPU time is what the kernel's scheduler accounted to all threads of a process, in nanoseconds
(/proc/PID/task/TID/schedstat), so short windows are exact.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from appliance.core.types import Record

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 60.0
Metrics = Mapping[str, Mapping[tuple[str, ...], float]]
"""Sample name -> values of its labels, in the order of their names -> value."""


class Options(Record, frozen=True, kw_only=True):
    """How a server is started. `assignments` are `--set` arguments."""

    devices: str
    model: str = "tiny-tasks"
    assignments: tuple[str, ...] = ()
    server_cores: tuple[int, ...] = (0, 1)
    worker_cores: tuple[int, ...] = (0, 1)
    priority: int = 0
    worker_priority: int = 0
    """Of the workers, beyond `priority`."""


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which this share of `values` lies; 0 of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def pin(pid: int, cores: Sequence[int]) -> None:
    """Let every thread of the process run on these cores only."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(task.name), cores)


def prefer(pid: int, priority: int) -> None:
    """Give the session of that process this autogroup nice value, so that other jobs on the machine
    disturb less; 0 leaves it as it is. Below 0 it needs root."""
    if priority:
        Path(f"/proc/{pid}/autogroup").write_text(str(priority))


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads that the process has now."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


class Server:
    """A running `appliance start` and what can be read of it from outside."""

    def __init__(self, process: "subprocess.Popen[bytes]", port: int) -> None:
        self.process = process
        self.port = port
        self.workers: dict[int, int] = {}
        """Pids by worker id."""

    def get(self, path: str) -> bytes:
        """The body of a GET."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as reply:
            return bytes(reply.read())

    def metrics(self) -> tuple[Metrics, float]:
        """All samples of /metrics, and when they had come (monotonic clock)."""
        samples: dict[str, dict[tuple[str, ...], float]] = {}
        text, when = self.get("/metrics").decode(), time.monotonic()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = tuple(value for _, value in sorted(sample.labels.items()))
                samples.setdefault(sample.name, {})[labels] = sample.value
        return samples, when

    def wait_ready(self, num_workers: int) -> None:
        """Return when that many workers are ready. Raises `SystemExit` with what is wrong."""
        limit = time.monotonic() + START_SECONDS
        while time.monotonic() < limit:
            if self.process.poll() is not None:
                raise SystemExit(f"the server has ended with {self.process.returncode}")
            with suppress(urllib.error.URLError, ConnectionError):
                workers = json.loads(self.get("/admin/state"))["workers"]
                if sum(worker["state"] == "ready" for worker in workers) >= num_workers:
                    self.workers = {worker["id"]: worker["pid"] for worker in workers}
                    return
            time.sleep(0.1)
        raise SystemExit(f"the server was not ready within {START_SECONDS:g} s")

    def cpu(self) -> dict[str, float]:
        """CPU seconds so far of the server process ("server") and each worker ("0", "1", ...)."""
        return {"server": cpu_seconds(self.process.pid)} | {
            str(worker): cpu_seconds(pid) for worker, pid in self.workers.items()
        }


@contextmanager
def running_server(options: Options, *, num_workers: int) -> Iterator[Server]:
    """A server with all its workers ready and pinned; ended by SIGTERM."""
    port = free_port()
    command = [
        sys.executable, "-m", "appliance", "start", "--port", str(port),
        "--devices", options.devices, "--model", options.model, "--log-level", "warning",
        "--set", "server.drain_seconds=0.0",
        *(part for each in options.assignments for part in ("--set", each)),
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        server = Server(process, port)
        server.wait_ready(num_workers)
        pin(process.pid, options.server_cores)
        prefer(process.pid, options.priority)
        for pid in server.workers.values():
            pin(pid, options.worker_cores)
            prefer(pid, options.priority + options.worker_priority)
        yield server
    finally:
        end(process)


def end(process: "subprocess.Popen[bytes]") -> None:
    """SIGTERM, and SIGKILL if that takes long."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Client:
    """The client process. See `tools.control_client` for what it is told and what it answers."""

    def __init__(self, spec: Mapping[str, Any], *, cores: Sequence[int]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tools.control_client"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        pin(self.process.pid, cores)
        self._say(spec)

    def wait_steady(self) -> None:
        """Return when every stream has had its first chunk. Raises `SystemExit` if it fails."""
        words = self._hear()
        if not words.get("steady"):
            raise SystemExit(f"the client has failed: {words}")

    def stop(self, window: Mapping[str, Any]) -> dict[str, Any]:
        """Close all streams; the client's figures of this window."""
        self._say(window)
        figures = self._hear()
        self.process.wait(30)
        return figures

    def cpu(self) -> float:
        """Its CPU seconds so far."""
        return cpu_seconds(self.process.pid)

    def _say(self, record: Mapping[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(record).encode() + b"\n")
        self.process.stdin.flush()

    def _hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the client has ended with {self.process.wait()}")
        words: dict[str, Any] = json.loads(line)
        return words


def machine() -> dict[str, Any]:
    """The hardware and how busy it is."""
    names = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "cpu": names[0].partition(":")[2].strip() if names else "unknown",
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
    }
