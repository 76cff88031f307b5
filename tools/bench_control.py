"""What the control plane costs: the real server, workers of the paced engine, a client process.

    python -m tools.bench_control rate [--devices paced:2] [--streams 64] [--seconds 15]

`rate`: do the workers keep their profile's rate behind the whole server, while clients stream?
Steps and computed tokens are the server's own counters; with every sequence alive and no prefix
shared, the computed tokens of a worker are the tokens whose KV it reads, so what the profile says
for exactly these steps is a sum without an estimate.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from appliance.worker.profiles import Profile, device_profile
from tools.control_kit import (
    ROOT,
    Client,
    Metrics,
    Options,
    Server,
    machine,
    quantile,
    running_server,
)

SAMPLE_SECONDS = 0.5
WARM_SECONDS = 1.0
ANCHOR_SECONDS = 2.0
"""Steps of a roofline get longer with each token; where in the table a stream stands is known to a
step or two only, which adds up to milliseconds in a run and to nothing in this time."""
MODEL = ROOT / "models" / "tiny-tasks"


class Sampler:
    """CPU shares of the server's processes and the client over a window."""

    def __init__(self, server: Server, client: Client) -> None:
        self._server = server
        self._client = client
        self.shares: dict[str, list[float]] = {}
        self.totals: dict[str, float] = {}

    def _now(self) -> dict[str, float]:
        return {**self._server.cpu(), "client": self._client.cpu()}

    def run(self, seconds: float) -> float:
        """Sample for so long; the exact duration."""
        begun = since = time.monotonic()
        first = before = self._now()
        while since < begun + seconds:
            time.sleep(max(0.0, since + SAMPLE_SECONDS - time.monotonic()))
            now, used = time.monotonic(), self._now()
            for name, value in used.items():
                self.shares.setdefault(name, []).append((value - before[name]) / (now - since))
            since, before = now, used
        self.totals = {name: before[name] - first[name] for name in before}
        return since - begun

    def summary(self) -> dict[str, Any]:
        """Mean and p90 of each share, in percent of one core."""
        return {
            name: {
                "mean": round(100 * statistics.fmean(shares), 1),
                "p90": round(100 * quantile(shares, 0.9), 1),
            }
            for name, shares in self.shares.items()
        }


def difference(after: Metrics, before: Metrics, name: str) -> dict[tuple[str, ...], float]:
    """Growth of a counter by labels."""
    old = before.get(name, {})
    return {labels: value - old.get(labels, 0.0) for labels, value in after[name].items()}


def computed(metrics: Metrics, worker: int) -> float:
    """All tokens that a worker has computed."""
    tokens = metrics["appliance_worker_tokens_total"]
    return tokens["decode", str(worker)] + tokens["prefill", str(worker)]


def schedule(profile: Profile, *, batch: int, kv_tokens: float, num_steps: int) -> list[float]:
    """Seconds from the end of step 0 to the end of each step: steps of `batch` decodes, `kv_tokens`
    in the KV before the first."""
    times, now, held = [], 0.0, int(kv_tokens)
    for _ in range(num_steps):
        times.append(now)
        held += batch
        now += profile.step_seconds(
            num_tokens=batch, num_samples=batch, num_pairs=held, num_kv_tokens=held
        )
    return times


def measure_rate(options: argparse.Namespace) -> dict[str, Any]:
    """One run of `rate`."""
    num_workers, name = parse_devices(options.devices)
    profile, batch = device_profile(name), options.streams // num_workers
    server_options = Options(
        devices=options.devices,
        assignments=(
            f"batch.max_num_seqs={batch}",
            "batch.max_batch_tokens=8192",
            "log.level=warning",
        ),
    )
    with running_server(server_options, num_workers=num_workers) as server:
        spec = {
            "port": server.port,
            "num_streams": options.streams,
            "prompt_tokens": options.prompt_tokens,
            "max_tokens": 4096 - options.prompt_tokens,
            "sampled": options.streams,
            "profile": name,
            "model_dir": str(MODEL),
        }
        client = Client(spec, cores=range(os.cpu_count() or 1))
        client.wait_steady()
        time.sleep(WARM_SECONDS)
        sampler = Sampler(server, client)
        before, begun = server.metrics()
        sampler.run(options.seconds)
        after, ended = server.metrics()
        load = os.getloadavg()[0]
        plan = schedule(
            profile,
            batch=batch,
            kv_tokens=computed(before, 0),
            num_steps=int(
                4
                * options.seconds
                / profile.step_seconds(num_tokens=1, num_samples=1, num_pairs=1, num_kv_tokens=1)
            ),
        )
        figures = client.stop(
            {"begin": begun, "end": ended, "schedule": plan, "anchor_seconds": ANCHOR_SECONDS}
        )
    return {
        "machine": {**machine(), "load_average": load},
        "profile": {"name": name, "note": profile.note},
        "seconds": ended - begun,
        "workers": [
            rate_of(worker, profile, batch=batch, before=before, after=after, seconds=ended - begun)
            for worker in range(num_workers)
        ],
        "cpu_percent": sampler.summary(),
        "server_us_per_token": 1e6
        * sampler.totals["server"]
        / difference(after, before, "appliance_generation_tokens_total")[()],
        "client": figures,
    }


def rate_of(
    worker: int,
    profile: Profile,
    *,
    batch: int,
    before: Metrics,
    after: Metrics,
    seconds: float,
) -> dict[str, float]:
    """Steps of one worker against what the profile says for exactly these steps."""
    label = (str(worker),)
    steps = difference(after, before, "appliance_worker_steps_total")[label]
    decoded = difference(after, before, "appliance_worker_tokens_total")["decode", str(worker)]
    if decoded != batch * steps:
        raise SystemExit(f"worker {worker}: {decoded} tokens in {steps} steps, not {batch} each")
    plan = schedule(
        profile, batch=batch, kv_tokens=computed(before, worker), num_steps=int(steps) + 1
    )
    return {
        "steps": steps,
        "steps_per_second": steps / seconds,
        "profile_steps_per_second": steps / plan[-1],
        "ratio": plan[-1] / seconds,
    }


def parse_devices(devices: str) -> tuple[int, str]:
    """Number of workers and profile of `paced:N@PROFILE`."""
    kind, _, rest = devices.partition(":")
    number, _, profile = rest.partition("@")
    if kind != "paced" or not number:
        raise SystemExit(f"--devices {devices}: write paced:N or paced:N@PROFILE")
    return int(number), profile or "h200-8b"


def repeat(measure: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All repeats, each shown as it ends."""
    runs = []
    for number in range(options.repeats):
        run = measure(options)
        print(json.dumps({"run": number, **run}), file=sys.stderr, flush=True)
        runs.append(run)
    return runs


def write(runs: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> None:
    """Print all runs, and keep them if asked."""
    text = json.dumps({"command": sys.argv[1:], "runs": runs}, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    rate = commands.add_parser("rate")
    rate.add_argument("--devices", default="paced:2")
    rate.add_argument("--streams", type=int, default=64)
    rate.add_argument("--prompt-tokens", type=int, default=100)
    rate.add_argument("--seconds", type=float, default=12.0)
    for command in (rate,):
        command.add_argument("--repeats", type=int, default=3)
        command.add_argument("--json", type=Path)
    options = parser.parse_args()
    write(repeat(measure_rate, options), options)


if __name__ == "__main__":
    main()
