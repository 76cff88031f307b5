"""Fit the coefficients of the paced engine's `cpu` profile to steps of the real CPU engine.

Runs prompt chunks and decode batches of the bundled model over a grid of sizes in this process,
takes the least CPU time of several repeats of each (other load on the machine then hardly matters),
and solves for base and one non-negative coefficient per count. Prints the coefficients and how far
the fit is off.

    python tools/fit_cpu_profile.py
"""

import argparse
import itertools
import json
import os
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from appliance.core.model_shape import kv_slab_bytes, parse_dtype, slab_bytes
from appliance.core.payload import Sampling, SequenceState
from appliance.core.start import WorkerStart
from appliance.core.types import BatcherConfig, Phase, RequestId, SeqWork, StepPlan, WorkerId
from appliance.worker.torch_engine import TorchEngine, read_shape

MODEL = Path(__file__).resolve().parents[1] / "models" / "tiny-tasks"
BLOCK_TOKENS = 16
NUM_BLOCKS = 4096
NAMES = ("base", "per_token", "per_sample", "per_pair", "per_kv_token")


class Shape(NamedTuple):
    """A step of equal sequences."""

    num_seqs: int
    start: int
    num_tokens: int
    """Per sequence."""

    def counts(self) -> list[float]:
        """1, tokens, samples, pairs, KV tokens."""
        n, s, k = self.num_seqs, self.start, self.num_tokens
        return [1.0, n * k, n, n * (k * s + k * (k + 1) // 2), n * (s + k)]


GRID = [
    *(
        Shape(batch, context, 1)
        for batch, context in itertools.product((1, 4, 16, 32), (16, 256, 1024))
    ),
    *(Shape(1, start, chunk) for start, chunk in itertools.product((0, 512), (16, 64, 256, 512))),
    *(Shape(4, 0, chunk) for chunk in (16, 64)),
]


def open_engine(dtype: str) -> TorchEngine:
    """The engine on the bundled model, on one thread, with slabs of its own."""
    shape, kind = read_shape(MODEL), parse_dtype(dtype)
    weights, kv = os.memfd_create("weights"), os.memfd_create("kv")
    os.ftruncate(weights, slab_bytes(shape, kind))
    os.ftruncate(kv, kv_slab_bytes(shape, kind, num_blocks=NUM_BLOCKS, block_tokens=BLOCK_TOKENS))
    start = WorkerStart(
        worker=WorkerId(0),
        epoch=1,
        devices=("cpu",),
        engine="torch",
        model_dir=str(MODEL),
        dtype=dtype,
        batcher=BatcherConfig(max_model_len=2048, max_num_seqs=64, max_batch_tokens=512),
        block_tokens=BLOCK_TOKENS,
        num_blocks=NUM_BLOCKS,
        has_weights_fd=True,
        load_weights=True,
        hash_key=b"fit",
    )
    engine = TorchEngine.open(start, weights_fd=weights, kv_fd=kv)
    os.close(weights)
    os.close(kv)
    return engine


def step_seconds(engine: TorchEngine, shape: Shape, *, repeats: int) -> float:
    """The least CPU time of a step of this shape. What the KV before it holds does not matter."""
    blocks = -(-(shape.start + shape.num_tokens) // BLOCK_TOKENS)
    known = shape.start + shape.num_tokens
    best = float("inf")
    for repeat in range(repeats):
        for index in range(shape.num_seqs):
            ids = array("i", [8 + (index + at) % 1000 for at in range(known)])
            state = SequenceState(prompt=ids.tobytes(), sampling=Sampling(temperature=0.0))
            engine.add(RequestId(index), state)
        work = tuple(
            SeqWork(
                id=RequestId(index),
                start=shape.start,
                num_tokens=shape.num_tokens,
                phase=Phase.DECODE if shape.num_tokens == 1 else Phase.PREFILL,
                samples=True,
                fresh=True,
                new_blocks=(tuple(range(index * blocks, (index + 1) * blocks)),),
            )
            for index in range(shape.num_seqs)
        )
        began = time.thread_time()
        engine.execute(StepPlan(step=repeat + 1, work=work))
        best = min(best, time.thread_time() - began)
        for index in range(shape.num_seqs):
            engine.drop(RequestId(index))
    return best


def fit(shapes: Sequence[Shape], seconds: Sequence[float]) -> npt.NDArray[np.float64]:
    """Coefficients of `NAMES`, none negative, that make the least relative error: the best least
    squares over all subsets of the counts (there are only 32)."""
    rows = np.array([shape.counts() for shape in shapes]) / np.array(seconds)[:, None]
    best, least = np.zeros(len(NAMES)), float("inf")
    for size in range(1, len(NAMES) + 1):
        for chosen in itertools.combinations(range(len(NAMES)), size):
            found = np.linalg.lstsq(rows[:, chosen], np.ones(len(rows)), rcond=None)[0]
            if (found < 0).any():
                continue
            error = float(np.square(rows[:, chosen] @ found - 1).sum())
            if error < least:
                best, least = np.zeros(len(NAMES)), error
                best[list(chosen)] = found
    return best


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = parser.parse_args()
    engine = open_engine(args.dtype)
    seconds = [step_seconds(engine, shape, repeats=args.repeats) for shape in GRID]
    coefficients = fit(GRID, seconds)
    for shape, measured in zip(GRID, seconds, strict=True):
        fitted = float(np.dot(shape.counts(), coefficients))
        print(
            f"{shape.num_seqs:3} x {shape.num_tokens:4} tokens at {shape.start:5}: "
            f"{1e3 * measured:8.2f} ms, fitted {1e3 * fitted:8.2f} ms "
            f"({fitted / measured - 1:+.0%})"
        )
    print(json.dumps(dict(zip(NAMES, coefficients.tolist(), strict=True)), indent=1))


if __name__ == "__main__":
    main()
