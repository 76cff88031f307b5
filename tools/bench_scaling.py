"""How long until one more worker answers: woken, respawned, added, or with the whole server.

    python -m tools.bench_scaling build/checkpoints/rand140m [--runs 5] [--share map] [--json OUT]

A real server over HTTP with one CPU worker, which is kept busy by a long answer, so that the next
request goes to the worker that is free. The clock starts with the command (the wake, the blow, the
order of a worker, the start of the process) and stops when the first token of a new request
arrives; the server's own counters must show that the worker in question computed it. A respawn
includes the wait before it (`workers.respawn_backoff_ms`, 100, which is not doubled here from death
to death as it would be by default). The floor is the same request at a worker that was free and
ready all the time.
"""

import argparse
import http.client
import itertools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tools.bench_start import ROOT, free_port

LIMIT = 120.0
LONG_TOKENS = 3000


class Server:
    """A server process and a client of it."""

    def __init__(self, model: str, *, share: str, log: Path) -> None:
        self.port = free_port()
        self._prompts = itertools.count()
        self._log = log.open("wb")
        self.began = time.monotonic()
        command = ["--port", str(self.port), "--devices", "cpu:1", "--model", model]
        settings = (
            "standby.workers=1",
            f"weights.share={share}",
            "workers.quarantine_deaths=1000",
            "workers.respawn_backoff_max_ms=100",
        )
        extra = [word for setting in settings for word in ("--set", setting)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "appliance", "start", *command, *extra],
            cwd=ROOT,
            stdout=self._log,
            stderr=self._log,
        )

    def close(self) -> None:
        """End it in order."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        self._log.close()

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """One request; status and document."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LIMIT)
        headers = {"content-type": "application/json"}
        data = None if body is None else json.dumps(body)
        connection.request(method, path, body=data, headers=headers)
        reply = connection.getresponse()
        document = json.loads(reply.read() or b"null")
        connection.close()
        return reply.status, document

    def do(self, path: str, body: Any = None) -> Any:
        """An order that must be carried out."""
        status, document = self.ask("POST", path, body)
        if status != 200 or document.get("outcome") != "done":
            raise RuntimeError(f"POST {path}: {status} {document}")
        return document

    def workers(self) -> dict[int, Any]:
        """The state of each worker."""
        return {each["id"]: each for each in self.ask("GET", "/admin/state")[1]["workers"]}

    def until(self, done: Callable[[dict[int, Any]], bool]) -> dict[int, Any]:
        """Poll the state until it is so."""
        deadline = time.monotonic() + LIMIT
        while not done(found := self.workers()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {LIMIT} s: {found}")
            time.sleep(0.002)
        return found

    def first_token(self) -> None:
        """A new streaming request; returns with its first token, then reads it to its end."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LIMIT)
        body = self._body(max_tokens=1)
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        reply = connection.getresponse()
        if reply.status != 200:
            raise ConnectionError(f"{reply.status} {reply.read()!r}")
        while not reply.readline().startswith(b"data: {"):
            pass
        self.told = time.monotonic()
        reply.read()
        connection.close()

    def cold(self) -> float:
        """Seconds from the start of the process to the first token of anything."""
        while time.monotonic() - self.began < LIMIT:
            try:
                self.first_token()
                return self.told - self.began
            except (ConnectionError, OSError):
                time.sleep(0.005)
        raise TimeoutError(f"no token within {LIMIT} s")

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Worker 0 has a long answer to compute."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LIMIT)
        body = self._body(max_tokens=LONG_TOKENS)
        reader = threading.Thread(target=_read_to_end, args=(connection, body), daemon=True)
        reader.start()
        self.until(lambda workers: workers[0]["running"] > 0)
        try:
            yield
        finally:
            with suppress(OSError, AttributeError):
                connection.sock.shutdown(socket.SHUT_RDWR)
            reader.join()
            connection.close()
            self.until(lambda workers: all(each["running"] == 0 for each in workers.values()))

    def _body(self, *, max_tokens: int) -> str:
        return json.dumps(
            {
                "prompt": f"{next(self._prompts)} the spoon and the",
                "max_tokens": max_tokens,
                "ignore_eos": True,
                "stream": True,
            }
        )


def _read_to_end(connection: http.client.HTTPConnection, body: str) -> None:
    with suppress(OSError, ValueError, http.client.HTTPException):
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        connection.getresponse().read()


class Times:
    """Seconds by name of a way and of a stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, dict[str, list[float]]] = {}

    def take(self, server: Server, name: str, worker: int, command: Callable[[], Any]) -> None:
        """Do it with worker 0 busy; note when the worker was in service and its first token."""
        with server.busy():
            before = server.workers().get(worker, {"tokens": {"prefill": 0}})
            began = time.monotonic()
            command()
            served = time.monotonic()
            server.first_token()
            after = server.workers()[worker]
        if after["tokens"]["prefill"] <= before["tokens"]["prefill"]:
            raise RuntimeError(f"{name}: the request was not computed by worker {worker}")
        stages = self.seconds.setdefault(name, {"in service": [], "first token": []})
        stages["in service"].append(served - began)
        stages["first token"].append(server.told - began)
        weights = after["weights"]
        print(
            f"{name:12} in service {served - began:6.3f} s, first token {server.told - began:6.3f} "
            f"s; its weights: {weights['source']} {1000 * weights['seconds']:.1f} ms",
            flush=True,
        )

    def summary(self) -> dict[str, Any]:
        """Median, least and most of all."""
        return {
            name: {
                stage: {
                    "median": round(statistics.median(each), 4),
                    "least": round(min(each), 4),
                    "most": round(max(each), 4),
                    "seconds": [round(one, 4) for one in each],
                }
                for stage, each in stages.items()
            }
            for name, stages in self.seconds.items()
        }


def respawn(server: Server) -> None:
    """Kill worker 1 and wait until its successor serves."""
    old = server.workers()[1]
    os.kill(old["pid"], signal.SIGKILL)
    server.until(
        lambda workers: workers[1]["epoch"] > old["epoch"] and workers[1]["state"] == "ready"
    )


def one_server(times: Times, model: str, *, share: str, runs: int, log: Path) -> None:
    """All ways at one server."""
    server = Server(model, share=share, log=log)
    try:
        seconds = server.cold()
        times.seconds.setdefault("cold server", {"first token": []})["first token"].append(seconds)
        print(f"{'cold server':12} first token {seconds:6.3f} s", flush=True)
        server.until(lambda workers: workers.get(1, {}).get("state") == "parked")
        for _ in range(runs):
            times.take(server, "woken", 1, lambda: server.do("/admin/workers/1/wake"))
            times.take(server, "floor", 1, lambda: None)
            times.take(server, "respawned", 1, lambda: respawn(server))
            server.do("/admin/workers/1/park")
        for added in range(2, 2 + runs):
            times.take(server, "added", added, lambda: server.do("/admin/workers", {}))
            server.do(f"/admin/workers/{added}/park")
    finally:
        server.close()


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", help="a directory, or the name of a bundled model")
    parser.add_argument("--runs", type=int, default=5, help="of each way at a running server")
    parser.add_argument("--starts", type=int, default=3, help="of cold servers")
    parser.add_argument("--share", choices=["map", "copy"], default="map")
    parser.add_argument("--log", type=Path, default=Path("bench_scaling.log"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    times = Times()
    for start in range(options.starts):
        runs = options.runs if start == 0 else 0
        one_server(times, options.model, share=options.share, runs=runs, log=options.log)
    summary = times.summary()
    print(json.dumps(summary, indent=1))
    if options.json:
        name = Path(options.model).name
        command = f"python -m tools.bench_scaling {name} --share {options.share}"
        document = {"command": f"{command} --runs {options.runs}", "seconds": summary}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
