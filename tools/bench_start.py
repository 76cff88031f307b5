"""Time from process start to the first token of the bundled model, with the server's own timeline.

    python tools/bench_start.py [--runs 3] [--devices cpu:2] [--json OUT]

A client asks for one token over and over from the moment the process starts; the clock stops when
the first answer arrives. Times are wall seconds of this machine; report them with their spread.
"""

import argparse
import json
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def first_answer(port: int, begun: float, limit: float) -> float:
    """Seconds from `begun` to the first answered token; raises TimeoutError after `limit`."""
    body = json.dumps({"prompt": "spell", "max_tokens": 1, "ignore_eos": True}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        data=body,
        headers={"content-type": "application/json"},
    )
    while time.monotonic() - begun < limit:
        try:
            with urllib.request.urlopen(request, timeout=limit) as reply:
                reply.read()
            return time.monotonic() - begun
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.02)
    raise TimeoutError(f"no token within {limit} s")


def one_run(devices: str) -> tuple[float, str]:
    """Start, wait for the first token, stop; the seconds and what the server printed."""
    port = free_port()
    begun = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "appliance", "start", "--port", str(port), "--devices", devices],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        seconds = first_answer(port, begun, 60)
    finally:
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=30)
    return seconds, output.decode()


def main() -> None:
    """Run, print the last timeline and the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--devices", default="cpu:2")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    seconds: list[float] = []
    output = ""
    for _ in range(options.runs):
        took, output = one_run(options.devices)
        seconds.append(round(took, 3))
    print(output)
    result: dict[str, Any] = {
        "command": "python tools/bench_start.py " + " ".join(sys.argv[1:]),
        "seconds_to_first_token": seconds,
        "median": statistics.median(seconds),
        "worst": max(seconds),
    }
    print(json.dumps(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
