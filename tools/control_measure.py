"""One measurement of the control plane: a load, a window, all figures of it.

Steps and computed tokens are the server's own counters. With every sequence alive and no prefix
shared, the computed tokens of a worker are the tokens whose KV it reads, so what the profile says
for exactly these steps is a sum without an estimate.
"""

import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

from appliance.core.profiles import Profile, device_profile
from appliance.core.types import Record
from tools.control_kit import ROOT, Client, Metrics, Options, Server, quantile, running_server
from tools.control_probe import LongPrompt, Probe

SAMPLE_SECONDS = 0.5
WARM_SECONDS = 1.0
ANCHOR_SECONDS = 2.0
"""Steps of a roofline get longer with each token; where in the table a stream stands is known to a
step or two only, which adds up to milliseconds in a run and to nothing in this time."""
MODEL = ROOT / "models" / "tiny-tasks"
LONGEST = 4096
ALL_CORES = tuple(range(os.cpu_count() or 1))


class Load(Record, frozen=True, kw_only=True):
    """What is measured. `sampled` streams are read at once, the rest are swept; 0: all at once."""

    num_workers: int
    profile: str
    num_streams: int
    seconds: float
    sweep_seconds: float = 0.02
    prompt_tokens: int = 32
    sampled: int = 0
    spare: int = 0
    """Sequences that a worker could run beyond its share. With none, and more than a few hundred
    streams, the scheduler's queues at the workers decide when the last ones begin."""
    server_cores: tuple[int, ...] = ALL_CORES
    worker_cores: tuple[int, ...] = ALL_CORES
    client_cores: tuple[int, ...] = ALL_CORES
    assignments: tuple[str, ...] = ()
    priority: int = 0
    """Autogroup nice value of server and workers."""
    worker_priority: int = 0
    """Of the workers, beyond that."""
    slo_class: str = ""
    probe: bool = False
    """Ask for /version fifty times a second meanwhile."""
    long_prompt: int = 0
    """Tokens of a prompt that is posted as text in the middle of the window; 0: none."""
    model_dir: str = str(MODEL)

    @property
    def batch(self) -> int:
        """Sequences of each worker."""
        return self.num_streams // self.num_workers


class Sampler:
    """CPU shares of the server's processes and the client over a window."""

    def __init__(self, server: Server, client: Client) -> None:
        self._server = server
        self._client = client
        self.shares: dict[str, list[float]] = {}
        self.totals: dict[str, float] = {}

    def _now(self) -> dict[str, float]:
        return {**self._server.cpu(), "client": self._client.cpu()}

    def run(self, seconds: float) -> None:
        """Sample for so long."""
        begun = since = time.monotonic()
        first = before = self._now()
        while since < begun + seconds:
            time.sleep(max(0.0, since + SAMPLE_SECONDS - time.monotonic()))
            now, used = time.monotonic(), self._now()
            for name, value in used.items():
                self.shares.setdefault(name, []).append((value - before[name]) / (now - since))
            since, before = now, used
        self.totals = {name: before[name] - first[name] for name in before}

    def summary(self) -> dict[str, Any]:
        """Mean and p90 of each share, in percent of one core; "workers" is the sum of them."""
        workers = [shares for name, shares in self.shares.items() if name.isdigit()]
        all_workers = [sum(shares) for shares in zip(*workers, strict=True)]
        return {
            name: {
                "mean": round(100 * statistics.fmean(shares), 1),
                "p90": round(100 * quantile(shares, 0.9), 1),
            }
            for name, shares in {**self.shares, "workers": all_workers}.items()
        }


def measure(load: Load) -> dict[str, Any]:
    """Start everything, measure one window, stop everything."""
    profile = device_profile(load.profile)
    options = Options(
        devices=f"paced:{load.num_workers}@{load.profile}",
        model=load.model_dir,
        assignments=(
            f"batch.max_num_seqs={load.batch + load.spare}",
            "batch.max_batch_tokens=8192",
            "queue.max_requests=100000",
            *load.assignments,
        ),
        server_cores=load.server_cores,
        worker_cores=load.worker_cores,
        priority=load.priority,
        worker_priority=load.worker_priority,
    )
    with running_server(options, num_workers=load.num_workers) as server:
        client = Client(_client_spec(load, server.port), cores=load.client_cores)
        client.wait_steady()
        time.sleep(WARM_SECONDS)
        sampler = Sampler(server, client)
        before, begun = server.metrics()
        probe = Probe(server.port) if load.probe else None
        prompt = long_prompt(load, server.port)
        if prompt is not None:
            prompt.post_after(load.seconds / 3)
        sampler.run(load.seconds)
        after, ended = server.metrics()
        busy = os.getloadavg()[0]
        least = profile.step_seconds(num_tokens=1, num_samples=1, num_pairs=1, num_kv_tokens=1)
        plan = schedule(
            profile,
            batch=load.batch,
            kv_tokens=computed(before, 0),
            num_steps=int(2 * load.seconds / least) + 100,
        )
        window = {"begin": begun, "end": ended, "schedule": plan, "anchor_seconds": ANCHOR_SECONDS}
        figures = client.stop(window)
    result: dict[str, Any] = {
        "load_average": busy,
        "seconds": ended - begun,
        "workers": [
            rate_of(load, worker, before=before, after=after, seconds=ended - begun)
            for worker in range(load.num_workers)
        ],
        "cpu_percent": sampler.summary(),
        "client": figures,
        **totals(load, sampler, before=before, after=after, seconds=ended - begun),
    }
    if probe is not None:
        result["probe_ms"] = probe.figures()
    if prompt is not None:
        result["long_prompt"] = prompt.figures()
    return result


def long_prompt(load: Load, port: int) -> LongPrompt | None:
    """The request with the long prompt, if there is to be one."""
    if not load.long_prompt:
        return None
    return LongPrompt(port, load.long_prompt, tokenizer=MODEL / "tokenizer.json")


def _client_spec(load: Load, port: int) -> dict[str, Any]:
    return {
        "port": port,
        "num_streams": load.num_streams,
        "prompt_tokens": load.prompt_tokens,
        "max_tokens": LONGEST - load.prompt_tokens,
        "sampled": load.sampled or load.num_streams,
        "sweep_seconds": load.sweep_seconds,
        "profile": load.profile,
        "model_dir": load.model_dir,
        "slo_class": load.slo_class,
    }


def totals(
    load: Load, sampler: Sampler, *, before: Metrics, after: Metrics, seconds: float
) -> dict[str, Any]:
    """Tokens per second, CPU per token, lag of the loop."""
    tokens = difference(after, before, "appliance_generation_tokens_total")[()]
    return {
        "tokens_per_second": tokens / seconds,
        "server_us_per_token": 1e6 * sampler.totals["server"] / tokens,
        "workers_us_per_token": 1e6
        * sum(sampler.totals[str(worker)] for worker in range(load.num_workers))
        / tokens,
        "loop_lag_p99_ms": 1e3 * histogram_p99(after, before, "appliance_loop_lag_seconds"),
    }


def difference(after: Metrics, before: Metrics, name: str) -> dict[tuple[str, ...], float]:
    """Growth of a counter by labels."""
    old = before.get(name, {})
    return {labels: value - old.get(labels, 0.0) for labels, value in after[name].items()}


def histogram_p99(after: Metrics, before: Metrics, name: str) -> float:
    """The bound of the bucket that holds the 99th percentile of what was observed meanwhile."""
    counts = difference(after, before, f"{name}_bucket")
    bounds = sorted((float(labels[0]), count) for labels, count in counts.items())
    total = bounds[-1][1]
    return next(bound for bound, count in bounds if count >= 0.99 * total)


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


def rate_of(
    load: Load, worker: int, *, before: Metrics, after: Metrics, seconds: float
) -> dict[str, float]:
    """Steps of one worker against what the profile says for exactly these steps, if they were full
    (`sequences_per_step`)."""
    steps = difference(after, before, "appliance_worker_steps_total")[(str(worker),)]
    decoded = difference(after, before, "appliance_worker_tokens_total")["decode", str(worker)]
    plan = schedule(
        device_profile(load.profile),
        batch=load.batch,
        kv_tokens=computed(before, worker),
        num_steps=int(steps) + 1,
    )
    return {
        "steps": steps,
        "sequences_per_step": decoded / steps if steps else 0.0,
        "steps_per_second": steps / seconds,
        "profile_steps_per_second": steps / plan[-1] if steps else 0.0,
        "ratio": plan[-1] / seconds,
    }


def spread(values: Sequence[float]) -> str:
    """Median and range, for a table."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"
