"""Do paced workers keep the profile's rate, and what do they cost?

Starts workers of the paced engine as processes, drives each through its socket (no HTTP, no node)
with a constant batch of decodes, and compares the time their steps took with what the profile says
for exactly these steps. CPU shares are taken from /proc at equal intervals. All ratios come from
one run, side by side.

    python tools/bench_paced.py --workers 2 --profile h200-8b --batch 32 --seconds 20
"""

import argparse
import json
import os
import resource
import selectors
import socket
import struct
import subprocess
import sys
import time
from array import array
from collections.abc import Sequence
from pathlib import Path

import msgspec

from appliance.core.messages import Assign, Report, StepReported, WorkerUp
from appliance.core.payload import Sampling, SequenceState, StepOutputs
from appliance.core.profiles import (
    DEFAULT_PROFILE,
    Profile,
    device_profile,
    paced_kv_slab_bytes,
)
from appliance.core.start import WorkerStart
from appliance.core.types import BatcherConfig, Record, Request, RequestId, WorkerId
from appliance.core.wire import FrameBuffer, command_codec, report_codec

MODEL = Path(__file__).resolve().parents[1] / "models" / "tiny-tasks"
BLOCK_TOKENS = 16
CODE = (
    "import socket, sys; from appliance.worker.main import run; "
    "run(socket.socket(fileno=int(sys.argv[1])))"
)
SAMPLE_SECONDS = 0.5
WARM_STEPS = 50


class Load(Record, frozen=True, kw_only=True):
    """What each worker is given."""

    profile: str
    batch: int
    prompt_tokens: int
    seconds: float
    depth: int


class Bench:
    """One worker process and the node's end of its channel."""

    def __init__(self, number: int, load: Load) -> None:
        self.number = number
        self._load = load
        self._profile: Profile = device_profile(load.profile)
        self._codec, self._buffer = report_codec(), FrameBuffer()
        self._contexts: dict[RequestId, int] = {}
        self.up = False
        self.num_steps = self.num_tokens = 0
        self.predicted = 0.0
        self.began = self.ended = 0.0
        self.gaps: list[float] = []
        self.cpu: list[float] = []
        max_tokens = 40 * int(load.seconds / self._step_seconds()) + 1000
        self._max_model_len = load.prompt_tokens + max_tokens
        self._max_tokens = max_tokens
        self._launch()

    def _step_seconds(self) -> float:
        batch, context = self._load.batch, self._load.prompt_tokens + 1
        return self._profile.step_seconds(
            num_tokens=batch,
            num_samples=batch,
            num_pairs=batch * context,
            num_kv_tokens=batch * context,
        )

    def _launch(self) -> None:
        num_blocks = self._profile.kv_tokens // BLOCK_TOKENS
        start = WorkerStart(
            worker=WorkerId(self.number),
            epoch=1,
            devices=(f"paced:{self.number}",),
            engine="paced",
            model_dir=str(MODEL),
            dtype="bfloat16",
            batcher=BatcherConfig(
                max_model_len=self._max_model_len,
                max_num_seqs=max(64, self._load.batch),
                max_batch_tokens=8192,
                depth=self._load.depth,
            ),
            block_tokens=BLOCK_TOKENS,
            num_blocks=num_blocks,
            has_weights_fd=False,
            load_weights=False,
            hash_key=b"bench",
            profile=self._load.profile,
            log_level="warning",
        )
        self.sock, theirs = socket.socketpair()
        record = msgspec.msgpack.encode(start)
        slab = os.memfd_create("kv")
        os.ftruncate(slab, paced_kv_slab_bytes(num_blocks=num_blocks, block_tokens=BLOCK_TOKENS))
        socket.send_fds(self.sock, [struct.pack("<I", len(record)) + record], [slab])
        os.close(slab)
        with theirs:
            command = [sys.executable, "-c", CODE, str(theirs.fileno())]
            self.process = subprocess.Popen(command, pass_fds=(theirs.fileno(),))

    def assign_all(self) -> None:
        """Fill the batch with different prompts that never end by themselves."""
        encode = command_codec().encode
        for index in range(self._load.batch):
            ids = array(
                "i", [8 + (index * 7 + at) % 1000 for at in range(self._load.prompt_tokens)]
            )
            ids[0] = 8 + index
            sampling = Sampling(seed=index, eos_token_ids=(2,), ignore_eos=True)
            state = SequenceState(prompt=ids.tobytes(), sampling=sampling)
            request = Request(
                id=RequestId(index),
                arrived=time.monotonic(),
                prompt_tokens=len(ids),
                max_tokens=self._max_tokens,
            )
            self._contexts[request.id] = len(ids)
            command = Assign(worker=WorkerId(self.number), request=request)
            self.sock.sendall(encode([command], msgspec.msgpack.encode(state)))

    def read(self) -> None:
        """Take in what has arrived; book full steps after the warm-up."""
        data = self.sock.recv(1 << 18)
        if not data:
            raise SystemExit(f"worker {self.number} has ended with {self.process.wait()}")
        for frame in self._buffer.feed(data):
            reports, payload = self._codec.decode(frame)
            for report in reports:
                self._take(report, payload)

    def _take(self, report: Report, payload: bytes) -> None:
        if isinstance(report, WorkerUp):
            self.up = True
        if not isinstance(report, StepReported):
            return
        outputs = msgspec.msgpack.decode(payload, type=StepOutputs)
        now = time.monotonic()
        full = report.decode_tokens == self._load.batch and not report.prefill_tokens
        if full and report.step > WARM_STEPS:
            if self.began:
                self._book(report)
                self.gaps.append(now - self.ended)
            else:
                self.began = now
            self.ended = now
        for id_ in outputs.ids:
            self._contexts[id_] += 1

    def _book(self, report: StepReported) -> None:
        context = sum(self._contexts[id_] for id_ in report.ids)
        batch = len(report.ids)
        self.predicted += self._profile.step_seconds(
            num_tokens=batch, num_samples=batch, num_pairs=context, num_kv_tokens=context
        )
        self.num_steps += 1
        self.num_tokens += batch

    def cpu_seconds(self) -> float:
        """User and system time of the process so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end(self) -> None:
        """Close our writing side; the worker exits in order."""
        self.sock.shutdown(socket.SHUT_WR)
        while self.sock.recv(1 << 18):
            pass
        self.process.wait(30)
        self.sock.close()

    def result(self) -> dict[str, float | int]:
        """The figures of this worker."""
        wall = self.ended - self.began
        return {
            "worker": self.number,
            "steps": self.num_steps,
            "steps_per_second": self.num_steps / wall,
            "profile_steps_per_second": self.num_steps / self.predicted,
            "rate_ratio": self.predicted / wall,
            "tokens_per_second": self.num_tokens / wall,
            "gap_p50_ms": 1e3 * quantile(self.gaps, 0.5),
            "gap_p99_ms": 1e3 * quantile(self.gaps, 0.99),
            "cpu_mean": sum(self.cpu) / len(self.cpu),
            "cpu_p90": quantile(self.cpu, 0.9),
            "cpu_ms_per_step": 1e3 * sum(self.cpu) / len(self.cpu) * wall / self.num_steps,
        }


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which this share of `values` lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def pump(workers: Sequence[Bench], *, seconds: float, sample_cpu: bool) -> None:
    """Read all workers for a while, sampling their CPU shares."""
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            selector.register(worker.sock, selectors.EVENT_READ, worker)
        end = time.monotonic() + seconds
        used = [worker.cpu_seconds() for worker in workers]
        since = time.monotonic()
        while (now := time.monotonic()) < end:
            for key, _ in selector.select(min(end - now, SAMPLE_SECONDS)):
                key.data.read()
            if (passed := time.monotonic() - since) >= SAMPLE_SECONDS:
                for index, worker in enumerate(workers):
                    total = worker.cpu_seconds()
                    if sample_cpu:
                        worker.cpu.append((total - used[index]) / passed)
                    used[index] = total
                since += passed


def measure(num_workers: int, load: Load) -> dict[str, object]:
    """Run the load on that many workers; all figures of the run."""
    workers = [Bench(number, load) for number in range(num_workers)]
    try:
        while not all(worker.up for worker in workers):
            pump(workers, seconds=0.1, sample_cpu=False)
        for worker in workers:
            worker.assign_all()
        while not all(worker.began for worker in workers):
            pump(workers, seconds=0.1, sample_cpu=False)
        own = resource.getrusage(resource.RUSAGE_SELF)
        pump(workers, seconds=load.seconds, sample_cpu=True)
        spent = resource.getrusage(resource.RUSAGE_SELF)
    finally:
        for worker in workers:
            worker.end()
    driver = spent.ru_utime + spent.ru_stime - own.ru_utime - own.ru_stime
    return {
        "load": msgspec.to_builtins(load),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "driver_cpu": driver / load.seconds,
        "workers": [worker.result() for worker in workers],
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--profile", default=DEFAULT_PROFILE)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--depth", type=int, default=0)
    args = parser.parse_args()
    load = Load(
        profile=args.profile,
        batch=args.batch,
        prompt_tokens=args.prompt_tokens,
        seconds=args.seconds,
        depth=args.depth,
    )
    result = measure(args.workers, load)
    print(json.dumps(result, indent=1))
    workers = result["workers"]
    assert isinstance(workers, list)
    for worker in workers:
        print(
            f"worker {worker['worker']}: {worker['steps_per_second']:.1f} steps/s, "
            f"{100 * worker['rate_ratio']:.2f} % of the profile; CPU mean "
            f"{100 * worker['cpu_mean']:.1f} %, p90 {100 * worker['cpu_p90']:.1f} % of a core"
        )


if __name__ == "__main__":
    main()
