"""A TorchEngine over slabs of its own, and the smallest scheduler that can drive it."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from appliance.core.model_shape import kv_slab_bytes, parse_dtype, slab_bytes
from appliance.core.payload import Sampling, SequenceState
from appliance.core.start import WorkerStart
from appliance.core.types import (
    BatcherConfig,
    Phase,
    RequestId,
    SeqWork,
    StepPlan,
    WorkerId,
)
from appliance.worker.engine import SampledToken
from appliance.worker.native.build import Library, NativeUnavailable, ensure_built
from appliance.worker.torch_engine import TorchEngine, read_shape


def state_of(
    prompt: Sequence[int], *, sampling: Sampling | None = None, emitted: Sequence[int] = ()
) -> SequenceState:
    """A sequence's state; greedy unless said otherwise."""
    return SequenceState(
        prompt=np.array(prompt, "<i4").tobytes(),
        emitted=np.array(emitted, "<i4").tobytes(),
        sampling=sampling or Sampling(temperature=0.0),
    )


def need_native() -> Library:
    """The built kernels; skips the test, saying why, where there are none."""
    try:
        return ensure_built()
    except NativeUnavailable as error:
        pytest.skip(str(error))


class Slabs:
    """The node's part: memory files for weights and KV that outlive an engine."""

    def __init__(
        self,
        directory: Path,
        *,
        dtype: str = "float32",
        num_blocks: int = 400,
        native: str = "auto",
    ) -> None:
        """`native` as in `WorkerStart`; "required" skips the test where no compiler is."""
        if native == "required":
            need_native()
        self.directory, self.dtype, self.num_blocks = directory, dtype, num_blocks
        self.native = native
        shape = read_shape(directory)
        self.weights = os.memfd_create("weights")
        os.ftruncate(self.weights, slab_bytes(shape, parse_dtype(dtype)))
        self.kv = os.memfd_create("kv")
        size = kv_slab_bytes(shape, parse_dtype(dtype), num_blocks=num_blocks, block_tokens=16)
        os.ftruncate(self.kv, size)

    def start(self, *, load: bool = True, max_model_len: int = 512) -> WorkerStart:
        return WorkerStart(
            worker=WorkerId(0),
            epoch=0,
            devices=("cpu:0",),
            engine="torch",
            model_dir=str(self.directory),
            dtype=self.dtype,
            batcher=BatcherConfig(
                max_model_len=max_model_len, max_num_seqs=32, max_batch_tokens=128
            ),
            block_tokens=16,
            num_blocks=self.num_blocks,
            has_weights_fd=True,
            load_weights=load,
            hash_key=b"",
            native=self.native,
        )

    def engine(self, *, load: bool = True, max_model_len: int = 512) -> TorchEngine:
        start = self.start(load=load, max_model_len=max_model_len)
        return TorchEngine.open(start, weights_fd=self.weights, kv_fd=self.kv)

    def close(self) -> None:
        os.close(self.weights)
        os.close(self.kv)


class Driver:
    """Plans steps for sequences that all run at once; blocks are drawn in a random order."""

    def __init__(self, engine: TorchEngine, *, num_blocks: int, seed: int = 0) -> None:
        self.engine = engine
        self.free = np.random.default_rng(seed).permutation(num_blocks).tolist()
        self.tables: dict[int, list[int]] = {}
        self.known: dict[int, list[int]] = {}
        self.computed: dict[int, int] = {}
        self._sent: dict[int, int] = {}

    def add(
        self,
        name: int,
        prompt: Sequence[int],
        *,
        emitted: Sequence[int] = (),
        sampling: Sampling | None = None,
        hit: Sequence[int] = (),
    ) -> None:
        """Add a sequence; `hit` are blocks that already hold its first tokens' KV."""
        self.engine.add(RequestId(name), state_of(prompt, emitted=emitted, sampling=sampling))
        self.known[name] = [*prompt, *emitted]
        self.tables[name] = list(hit)
        self.computed[name] = 16 * len(hit)
        self._sent[name] = -1

    def preempt(self, name: int) -> None:
        """Take all blocks away; the sequence is computed again from its first token."""
        self.free[:0] = self.tables[name]
        self.tables[name], self.computed[name], self._sent[name] = [], 0, -1

    def work(self, name: int, *, chunk: int) -> SeqWork:
        """The next up to `chunk` tokens of a sequence."""
        start, known, table = self.computed[name], len(self.known[name]), self.tables[name]
        count = min(chunk, known - start)
        while len(table) * 16 < start + count:
            table.append(self.free.pop())
        fresh = self._sent[name] < 0
        new = tuple(table if fresh else table[self._sent[name] :])
        self._sent[name] = len(table)
        return SeqWork(
            id=RequestId(name),
            start=start,
            num_tokens=count,
            phase=Phase.DECODE if count == 1 else Phase.PREFILL,
            samples=start + count == known,
            fresh=fresh,
            new_blocks=(new,),
        )

    def step(self, names: Sequence[int], *, chunk: int = 512) -> Sequence[SampledToken]:
        """One step of these sequences."""
        work = tuple(self.work(name, chunk=chunk) for name in names)
        sampled = self.engine.execute(StepPlan(step=0, work=work))
        for item in work:
            self.computed[item.id] = item.start + item.num_tokens
        assert [s.id for s in sampled] == [w.id for w in work if w.samples]
        for token in sampled:
            self.known[token.id].append(token.token)
        return sampled

    def generate(self, lengths: dict[int, int], *, chunk: int = 512) -> None:
        """Run until every named sequence knows that many tokens."""
        while running := [n for n, length in lengths.items() if len(self.known[n]) < length]:
            self.step(running, chunk=chunk)
