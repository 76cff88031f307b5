"""What a step costs beside the engine: the step loop on its own, without a node.

    python -m tools.bench_step MODEL_DIR [--dtype float32] [--native off] [--batch 1 8 32]
        [--json OUT]

The loop runs as in a worker: the real channel over a socket pair, the real Batcher, engine and
text; this program plays the node's end between two steps. Measured is each step in which all
sequences decode and none starts or ends: from the end of the step before to its own end ("step"),
and the engine's part of it ("execute"). The rest, "loop", is reading the channel, planning, text,
books, one frame. CPU seconds of the thread, medians with quartiles; other load on the machine
matters little.

`--profile` prints the functions that take the most time in a run instead.
"""

import argparse
import cProfile
import json
import os
import pstats
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from appliance.core.batcher import Batcher
from appliance.core.faults import FaultPlan
from appliance.core.messages import Assign
from appliance.core.model_shape import kv_slab_bytes, parse_dtype, slab_bytes
from appliance.core.payload import Sampling, SequenceState
from appliance.core.start import WorkerStart
from appliance.core.types import BatcherConfig, Record, Request, RequestId, StepPlan, WorkerId
from appliance.core.wire import command_codec
from appliance.policy import make_policy
from appliance.worker.channel import Channel, Progress
from appliance.worker.engine import EngineInfo, SampledToken
from appliance.worker.fault_actions import FaultPoints
from appliance.worker.loop import StepLoop
from appliance.worker.text import TokenText
from appliance.worker.torch_engine import TorchEngine, read_shape

BLOCK_TOKENS = 16
PROMPT_TOKENS = 128
WARM_STEPS = 10
DECODE_STEPS = 200
RECEIVE_BYTES = 1 << 20


class TimedEngine:
    """An engine and the CPU time of its last `execute`."""

    def __init__(self, engine: TorchEngine) -> None:
        self._engine = engine
        self.seconds = 0.0
        self.plan: StepPlan | None = None

    @property
    def info(self) -> EngineInfo:
        """See `Engine`."""
        return self._engine.info

    def add(self, request_id: RequestId, state: SequenceState) -> None:
        """See `Engine`."""
        self._engine.add(request_id, state)

    def drop(self, request_id: RequestId) -> None:
        """See `Engine`."""
        self._engine.drop(request_id)

    def execute(self, plan: StepPlan) -> Sequence[SampledToken]:
        """See `Engine`."""
        self.plan = plan
        began = time.thread_time()
        sampled = self._engine.execute(plan)
        self.seconds = time.thread_time() - began
        return sampled


class Figures(Record, frozen=True, kw_only=True):
    """CPU seconds: (lower quartile, median, upper quartile)."""

    batch: int
    steps: int
    step: tuple[float, float, float]
    execute: tuple[float, float, float]
    loop: tuple[float, float, float]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4)
    return low, middle, high


class Bench:
    """One loop, its engine, and the node's end of its channel."""

    def __init__(self, start: WorkerStart, engine: TorchEngine) -> None:
        self._engine = TimedEngine(engine)
        self._node, theirs = socket.socketpair()
        self._node.setblocking(False)
        self._steps: list[tuple[float, float]] = []
        self._batch = self._left = 0
        self._began = 0.0
        policy = make_policy(start.policy, start.policy_settings)
        batcher = Batcher(
            start.worker, start.batcher, groups=engine.info.groups, policy=policy.batch
        )
        self._loop = StepLoop(
            start,
            channel=Channel(theirs),
            engine=self._engine,
            batcher=batcher,
            tokens=TokenText.load(start.model_dir),
            faults=FaultPoints(FaultPlan((), worker=start.worker, epoch=start.epoch)),
            progress=Progress(),
            after_step=self._after_step,
        )
        self._vocab_size = engine.info.vocab_size

    def run(self, batch: int) -> Figures:
        """Serve `batch` sequences and end."""
        encode, rng = command_codec().encode, np.random.default_rng(0)
        self._batch, self._left = batch, WARM_STEPS + DECODE_STEPS
        self._node.setblocking(True)
        for number in range(batch):
            ids = rng.integers(8, self._vocab_size, PROMPT_TOKENS).astype("<i4")
            sampling = Sampling(temperature=0.0, eos_token_ids=(2,), ignore_eos=True)
            state = SequenceState(prompt=ids.tobytes(), sampling=sampling)
            request = Request(
                id=RequestId(number),
                arrived=time.monotonic(),
                prompt_tokens=PROMPT_TOKENS,
                max_tokens=2 * (WARM_STEPS + DECODE_STEPS),
            )
            command = Assign(worker=WorkerId(0), request=request)
            self._node.sendall(encode([command], msgspec.msgpack.encode(state)))
        self._node.setblocking(False)
        self._began = time.thread_time()
        self._loop.run()
        step, execute = zip(*self._steps[WARM_STEPS:], strict=True)
        loop = [whole - part for whole, part in zip(step, execute, strict=True)]
        return Figures(
            batch=batch,
            steps=len(step),
            step=quartiles(step),
            execute=quartiles(execute),
            loop=quartiles(loop),
        )

    def _after_step(self) -> None:
        """Book the step, then play the node's part outside of the measured time."""
        seconds = time.thread_time() - self._began
        plan = self._engine.plan
        if plan is not None and self._is_plain(plan):
            self._steps.append((seconds, self._engine.seconds))
            self._left -= 1
        with suppress(BlockingIOError):
            self._node.recv(RECEIVE_BYTES)
        if self._left == 0:
            self._node.shutdown(socket.SHUT_WR)
            self._left = -1
        self._began = time.thread_time()

    def _is_plain(self, plan: StepPlan) -> bool:
        return len(plan.work) == self._batch and all(
            each.num_tokens == 1 and each.samples for each in plan.work
        )


def make_bench(directory: Path, *, dtype: str, native: str, batch: int) -> Bench:
    """A fresh engine with room for `batch` sequences; `native` as in `WorkerStart`."""
    shape, kind = read_shape(directory), parse_dtype(dtype)
    longest = PROMPT_TOKENS + 2 * (WARM_STEPS + DECODE_STEPS)
    num_blocks = batch * (-(-longest // BLOCK_TOKENS) + 1)
    weights, kv = os.memfd_create("weights"), os.memfd_create("kv")
    os.ftruncate(weights, slab_bytes(shape, kind))
    os.ftruncate(kv, kv_slab_bytes(shape, kind, num_blocks=num_blocks, block_tokens=BLOCK_TOKENS))
    start = WorkerStart(
        worker=WorkerId(0),
        epoch=1,
        devices=("cpu",),
        engine="torch",
        model_dir=str(directory),
        dtype=dtype,
        batcher=BatcherConfig(max_model_len=longest),
        block_tokens=BLOCK_TOKENS,
        num_blocks=num_blocks,
        has_weights_fd=True,
        load_weights=True,
        hash_key=b"bench",
        native=native,
    )
    try:
        engine = TorchEngine.open(start, weights_fd=weights, kv_fd=kv)
    finally:
        os.close(weights)
        os.close(kv)
    return Bench(start, engine)


def show(figures: Figures) -> str:
    """One line of microseconds."""

    def cell(values: tuple[float, float, float]) -> str:
        low, middle, high = (1e6 * value for value in values)
        return f"{middle:6.0f} ({low:.0f} to {high:.0f})"

    return (
        f"batch {figures.batch:>2}: step {cell(figures.step)}, execute {cell(figures.execute)}, "
        f"loop {cell(figures.loop)} us = {figures.loop[1] / figures.step[1]:.1%}, "
        f"{1e6 * figures.loop[1] / figures.batch:.1f} us per token"
    )


def profiled(work: Callable[[], Any]) -> None:
    """Run and print the functions with the most time of their own."""
    profile = cProfile.Profile()
    profile.runcall(work)
    pstats.Stats(profile).sort_stats("tottime").print_stats(35)


def main() -> None:
    """Measure each batch with a fresh engine."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--native", default="auto", choices=["auto", "off", "required"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for batch in options.batch:
        bench = make_bench(options.model, dtype=options.dtype, native=options.native, batch=batch)
        if options.profile:
            profiled(partial(bench.run, batch))
            continue
        found.append(bench.run(batch))
        print(show(found[-1]), flush=True)
    if options.json:
        result = {
            "model": options.model.name,
            "dtype": options.dtype,
            "native": options.native,
            "figures": [msgspec.to_builtins(each) for each in found],
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
