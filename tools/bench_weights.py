"""How long until weights are in place: mapped, copied from a peer's slab, read from disk.

    python -m tools.bench_weights build/checkpoints/rand140m [--runs 7] [--json OUT]

Every way is the one that a worker goes at its start (`appliance.worker.weight_slab`), over memory
files as the node makes them, beside a baseline of the same run:

- mapped: a complete slab is mapped, its manifest checked, every tensor viewed. Also of a slab with
  the size and the tensors of an 8B model, of which only the head was ever written.
- copied: manifest, copy, checksums. Into memory that both sides have touched and mapped before, as
  a prepared receiver has it; into a slab that a predecessor touched; into an untouched one.
- disk, warm (the file is in the page cache) and cold (after its pages were given up).

Before anything is measured the process touches as much memory as will be used and gives it back:
in a virtual machine the first use of a page also costs the host, which is not what is asked here.
"""

import argparse
import json
import mmap
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msgspec import structs
from safetensors.torch import load_file

from appliance.core.model_shape import ModelShape, parse_config, slab_bytes
from appliance.core.start import WeightPlan
from appliance.modeling.parallel import nothing, run_pieces
from appliance.modeling.slab import (
    begin_filling,
    complete,
    describe,
    fingerprint_of,
    load_into_slab,
)
from appliance.modeling.slab_target import SlabTarget
from appliance.worker.torch_engine import read_shape
from appliance.worker.weight_slab import WeightRequest, open_weights
from appliance.worker.weight_sources import COPY_BYTES, Receiver, SlabSource

READ_BYTES = 8 << 20
MEMCPY = "memcpy, touched memory, 1 thread"
EIGHT_B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 12288,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}
"""The tensors of Qwen3-8B."""


class Bench:
    """Slabs of one checkpoint and the figures so far."""

    def __init__(self, model_dir: Path, *, runs: int) -> None:
        self.model_dir = model_dir
        self.runs = runs
        self.shape: ModelShape = read_shape(model_dir)
        self.num_bytes = slab_bytes(self.shape, "float32")
        self.figures: dict[str, dict[str, Any]] = {}

    def slab(self) -> int:
        """A memory file of the model's size, untouched."""
        return memory_file(self.num_bytes)

    def measure(
        self,
        name: str,
        work: Callable[[], object],
        *,
        before: Callable[[], object] = nothing,
        num_bytes: int | None = None,
        baseline: str = "",
    ) -> None:
        """Time `work` so often, `before` each time doing what is not timed; `baseline` is an
        earlier figure whose rate is 100 %."""
        seconds = []
        for _ in range(self.runs):
            before()
            began = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - began)
        figure: dict[str, Any] = {
            "seconds": [round(each, 5) for each in seconds],
            "median": round(statistics.median(seconds), 5),
            "least": round(min(seconds), 5),
            "most": round(max(seconds), 5),
        }
        size = self.num_bytes if num_bytes is None else num_bytes
        if size:
            figure["gb_per_second"] = round(size / statistics.median(seconds) / 1e9, 3)
        if baseline:
            share = self.figures[baseline]["median"] / figure["median"]
            figure |= {"baseline": baseline, "share_of_baseline": round(share, 3)}
        self.figures[name] = figure
        print(f"{name:66} {show(figure)}", flush=True)

    def request(self, **more: Any) -> WeightRequest:
        """What a worker asks for."""
        return WeightRequest(model_dir=self.model_dir, shape=self.shape, dtype="float32", **more)

    def receiver(self, target: SlabTarget, **more: Any) -> Receiver:
        """Somebody without weights."""
        return Receiver(target=target, shape=self.shape, dtype="float32", **more)


def memory_file(num_bytes: int) -> int:
    """An anonymous memory file."""
    fd = os.memfd_create("bench")
    os.ftruncate(fd, num_bytes)
    return fd


def show(figure: dict[str, Any]) -> str:
    """A figure in words."""
    spread = f"{1000 * figure['least']:.2f} to {1000 * figure['most']:.2f}"
    rate = f", {figure['gb_per_second']:.2f} GB/s" if "gb_per_second" in figure else ""
    share = figure.get("share_of_baseline")
    words = "" if share is None else f" = {share:.0%} of {figure['baseline']}"
    return f"{1000 * figure['median']:9.2f} ms ({spread}){rate}{words}"


def touched(fd: int) -> memoryview:
    """A mapping all of whose pages exist and are mapped."""
    view = memoryview(mmap.mmap(fd, 0))
    np.frombuffer(view, np.uint8)[::4096] |= 0
    return view


def warm_up_memory(num_bytes: int) -> None:
    """Let the host back so much of this machine's memory."""
    for _ in range(2):
        np.ones(num_bytes, np.uint8)


def mapped(bench: Bench, source: int) -> None:
    """Time to ready by mapping, and that it does not depend on size."""
    bench.measure("mapped", lambda: open_weights([source], bench.request()), num_bytes=0)
    eight = parse_config(EIGHT_B)
    size = slab_bytes(eight, "bfloat16")
    fd = memory_file(size)
    view = memoryview(mmap.mmap(fd, size))
    begin_filling(view)
    manifest = describe(eight, "bfloat16") | {"fingerprint": "none", "sums": ""}
    complete(view, json.dumps(manifest).encode(), shape=eight)
    request = WeightRequest(model_dir=bench.model_dir, shape=eight, dtype="bfloat16")
    name = f"mapped, {size / 1e9:.1f} GB of an 8B model (head only)"
    bench.measure(name, lambda: open_weights([fd], request), num_bytes=0)
    os.close(fd)
    first, again = "first pass over a mapped slab", "second pass over a mapped slab"
    views: list[memoryview] = []

    def map_anew() -> None:
        views[:] = [memoryview(mmap.mmap(source, 0, mmap.MAP_SHARED, mmap.PROT_READ))]

    bench.measure(first, lambda: total(views[0]), before=map_anew)
    bench.measure(again, lambda: total(views[0]))


def total(view: memoryview) -> int:
    """Read every word."""
    return int(np.frombuffer(view, np.int64).sum())


def copied(bench: Bench, source: int) -> None:
    """Copies beside memcpy."""
    theirs = np.frombuffer(touched(source), np.uint8)
    own = bench.slab()
    view = touched(own)
    ours = np.frombuffer(view, np.uint8)
    pieces = range(0, bench.num_bytes, COPY_BYTES)

    def memcpy(begin: int) -> int:
        np.copyto(ours[begin : begin + COPY_BYTES], theirs[begin : begin + COPY_BYTES])
        return COPY_BYTES

    def two_threads() -> None:
        run_pieces(pieces, memcpy, num_bytes=bench.num_bytes, threads=2)

    bench.measure(MEMCPY, lambda: np.copyto(ours, theirs))
    bench.measure("memcpy, touched memory, 2 threads", two_threads)
    peer, target = SlabSource("peer:0", source), SlabTarget(view=view)
    prepared = bench.receiver(target)
    peer.fill(prepared)
    for threads in (1, 2):
        for full in (False, True):
            words = "all checksums" if full else "64 checksums"
            receiver = replace(prepared, threads=threads, full_check=full)
            bench.measure(
                f"copied, both sides mapped before, {threads} thread(s), {words}",
                partial(peer.fill, receiver),
                baseline=MEMCPY,
            )
    plan = WeightPlan(own=True, sources=("peer:0",), threads=2)
    bench.measure(
        "worker's start: copied, its slab touched by a predecessor",
        lambda: open_weights([own, source], bench.request(plan=plan)),
        before=lambda: begin_filling(view),
        baseline=MEMCPY,
    )
    known = structs.replace(plan, fingerprint=fingerprint_of(bench.model_dir))
    bench.measure(
        "worker's start: its slab is complete (successor)",
        lambda: open_weights([own, source], bench.request(plan=known)),
        num_bytes=0,
    )
    with Renewed(bench) as slabs:

        def first_touch() -> None:
            np.copyto(np.frombuffer(mmap.mmap(slabs.fd, 0), np.uint8), theirs)

        bench.measure("memcpy into untouched memory, 1 thread", first_touch, before=slabs.renew)
        bench.measure(
            "worker's start: copied into an untouched slab",
            lambda: open_weights([slabs.fd, source], bench.request(plan=plan)),
            before=slabs.renew,
            baseline="memcpy into untouched memory, 1 thread",
        )
    os.close(own)


class Renewed:
    """A slab that can be replaced by an untouched one."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self.fd = bench.slab()

    def renew(self) -> None:
        """Another one, untouched."""
        os.close(self.fd)
        self.fd = self._bench.slab()

    def __enter__(self) -> "Renewed":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


def from_disk(bench: Bench) -> None:
    """The checkpoint, warm and cold."""
    file = bench.model_dir / "model.safetensors"
    memory = bench.slab()
    view = touched(memory)

    def plain() -> None:
        with file.open("rb", buffering=0) as opened:
            done = 0
            while count := os.preadv(opened.fileno(), [view[done : done + READ_BYTES]], done):
                done += count

    def usual() -> None:
        ours, at = torch.frombuffer(view, dtype=torch.float32), 0
        for tensor in load_file(file).values():
            ours[at : at + tensor.numel()].copy_(tensor.view(-1))
            at += tensor.numel()

    def give_up() -> None:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    plain()
    with Renewed(bench) as slabs:
        for state, before in (("warm", nothing), ("cold", give_up)):
            baseline = f"disk, {state}: plain reads into touched memory, 1 thread"
            bench.measure(baseline, plain, before=before)
            bench.measure(
                f"disk, {state}: safetensors, then copy into touched memory", usual, before=before
            )

            def renew(before: Callable[[], object] = before) -> None:
                before()
                slabs.renew()

            for threads in (1, 2, 4):
                request = bench.request(plan=WeightPlan(threads=threads), load=True)
                bench.measure(
                    f"worker's start: disk, {state}, untouched slab, {threads} thread(s)",
                    lambda request=request: open_weights([slabs.fd], request),  # type: ignore[misc]
                    before=renew,
                    baseline=baseline,
                )
        plan = WeightPlan(own=True, sources=("host",), threads=2)
        with Renewed(bench) as host:

            def renew_both() -> None:
                host.renew()
                slabs.renew()

            bench.measure(
                "worker's start: disk, warm, through the node's slab into its own",
                lambda: open_weights([slabs.fd, host.fd], bench.request(plan=plan, load=True)),
                before=renew_both,
            )
    os.close(memory)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(options.model, runs=options.runs)
    print(f"slab of {bench.num_bytes / 1e6:.0f} MB, {options.runs} runs each: median (least, most)")
    warm_up_memory(6 * bench.num_bytes)
    source = bench.slab()
    whole = SlabTarget(view=touched(source), fd=source)
    load_into_slab(
        bench.model_dir, whole, shape=bench.shape, dtype="float32", threads=2, with_sums=True
    )
    mapped(bench, source)
    copied(bench, source)
    from_disk(bench)
    result = {
        "command": f"python -m tools.bench_weights {options.model.name} --runs {options.runs}",
        "slab_bytes": bench.num_bytes,
        "cores": os.cpu_count(),
        "figures": bench.figures,
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
