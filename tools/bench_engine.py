"""Measure the CPU engine on one thread: decode step, prefill rate, and what the row probe found.

    python tools/bench_engine.py [--model DIR] [--dtype float32|bfloat16] [--context 256]

Without `--model` it writes a random 5M-parameter Llama (256 x 6, 8/2 heads, vocabulary 4096) to a
temporary directory. Times are CPU seconds of the one thread, lower quartile, so other load on the
machine matters little; they include planning, sampling and all Python.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from appliance.core.model_shape import kv_slab_bytes, parse_dtype, slab_bytes, weight_tensors
from appliance.core.payload import Sampling, SequenceState
from appliance.core.start import WorkerStart
from appliance.core.types import BatcherConfig, Phase, RequestId, SeqWork, StepPlan, WorkerId
from appliance.modeling.families import SOURCES
from appliance.modeling.linear import LinearFactory, row_ladder
from appliance.worker.torch_engine import TorchEngine, read_shape

BLOCK_TOKENS = 16
CHUNK = 512
DECODE_STEPS = 40
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 704,
    "vocab_size": 4096,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}


@contextmanager
def random_model() -> Iterator[Path]:
    """A directory with a random checkpoint of CONFIG."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "config.json").write_text(json.dumps(CONFIG))
        shape, generator = read_shape(directory), torch.Generator().manual_seed(0)
        tensors = {
            source.name: torch.ones(source.shape)
            if len(source.shape) == 1
            else torch.randn(source.shape, generator=generator) * 0.02
            for source in SOURCES[shape.family](shape)
        }
        save_file(tensors, directory / "model.safetensors")
        yield directory


class Bench:
    """One engine and sequences of random tokens."""

    def __init__(self, directory: Path, *, dtype: str, num_blocks: int) -> None:
        shape, kind = read_shape(directory), parse_dtype(dtype)
        self.vocab_size = shape.vocab_size
        weights, kv = os.memfd_create("weights"), os.memfd_create("kv")
        os.ftruncate(weights, slab_bytes(shape, kind))
        os.ftruncate(
            kv, kv_slab_bytes(shape, kind, num_blocks=num_blocks, block_tokens=BLOCK_TOKENS)
        )
        start = WorkerStart(
            worker=WorkerId(0),
            epoch=1,
            devices=("cpu",),
            engine="torch",
            model_dir=str(directory),
            dtype=dtype,
            batcher=BatcherConfig(max_model_len=shape.max_positions),
            block_tokens=BLOCK_TOKENS,
            num_blocks=num_blocks,
            has_weights_fd=True,
            load_weights=True,
            hash_key=b"bench",
        )
        began = time.thread_time()
        self.engine = TorchEngine.open(start, weights_fd=weights, kv_fd=kv)
        self.open_seconds = time.thread_time() - began
        self.rng = np.random.default_rng(0)
        os.close(weights)
        os.close(kv)

    def add(self, name: int, length: int) -> None:
        ids = self.rng.integers(0, self.vocab_size, length).astype("<i4")
        state = SequenceState(prompt=ids.tobytes(), sampling=Sampling(temperature=0.0))
        self.engine.add(RequestId(name), state)

    def step(self, work: Sequence[SeqWork]) -> float:
        """CPU seconds of one step."""
        began = time.thread_time()
        self.engine.execute(StepPlan(step=0, work=tuple(work)))
        return time.thread_time() - began

    def prefill(self, name: int, length: int, *, blocks: Sequence[int]) -> float:
        """CPU seconds of a whole prompt in chunks."""
        seconds = 0.0
        for start in range(0, length, CHUNK):
            count = min(CHUNK, length - start)
            new = tuple(blocks) if start == 0 else ()
            work = SeqWork(
                id=RequestId(name),
                start=start,
                num_tokens=count,
                phase=Phase.PREFILL,
                samples=start + count == length,
                fresh=start == 0,
                new_blocks=(new,),
            )
            seconds += self.step([work])
        return seconds

    def decode(self, batch: int, *, context: int) -> float:
        """CPU seconds of a decode step of `batch` sequences: lower quartile."""
        per_sequence = (context + DECODE_STEPS) // BLOCK_TOKENS + 1
        for name in range(batch):
            self.add(name, context)
            first = name * per_sequence
            self.prefill(name, context, blocks=range(first, first + per_sequence))
        seconds = [
            self.step(
                [
                    SeqWork(
                        id=RequestId(name),
                        start=context + step,
                        num_tokens=1,
                        phase=Phase.DECODE,
                        samples=True,
                        fresh=False,
                        new_blocks=((),),
                    )
                    for name in range(batch)
                ]
            )
            for step in range(DECODE_STEPS)
        ]
        for name in range(batch):
            self.engine.drop(RequestId(name))
        return sorted(seconds)[DECODE_STEPS // 4]


def print_probe(directory: Path) -> None:
    """Which row counts of the ladder each weight shape does not allow."""
    seen = set()
    for spec in weight_tensors(read_shape(directory)):
        if len(spec.shape) != 2 or spec.shape in seen:
            continue
        seen.add(spec.shape)
        factory = LinearFactory()
        factory.build(torch.randn(spec.shape) * 0.02, None, max_rows=CHUNK)
        (path,) = factory.paths.values()
        refused = [rows for rows in row_ladder(CHUNK) if rows not in path.rows]
        print(f"  {spec.name:<18} {spec.shape!s:<14} {path.name}, not allowed: {refused or 'none'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--context", type=int, default=256)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with random_model() as made:
        directory: Path = args.model or made
        print_probe(directory)
        blocks = 64 * ((args.context + DECODE_STEPS) // BLOCK_TOKENS + 1) + 2048 // BLOCK_TOKENS
        bench = Bench(directory, dtype=args.dtype, num_blocks=blocks)
        print(f"open {bench.open_seconds:.2f} s; {'; '.join(bench.engine.info.notes)}")
        for batch in (1, 8, 32, 64):
            seconds = bench.decode(batch, context=args.context)
            print(f"decode {batch:>2}: {seconds * 1e3:6.2f} ms, {batch / seconds:.0f} tok/s")
        for length in (128, 512, 2048):
            best = 1e9
            for _ in range(3):
                bench.add(0, length)
                best = min(best, bench.prefill(0, length, blocks=range(length // BLOCK_TOKENS)))
            print(f"prefill {length:>4}: {best * 1e3:6.1f} ms, {length / best:.0f} tok/s")


if __name__ == "__main__":
    main()
