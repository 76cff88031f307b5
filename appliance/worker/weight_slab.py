"""How a worker comes to its weights at its start.

Two ways (`appliance.core.start.WeightPlan`). Mapped: the node's slab is everybody's; the first
worker fills it from the checkpoint, the others, and every successor, map it in place. Copied: the
worker has a slab of its own in the node's keeping, finds it complete if a predecessor filled it, or
fills it from the best source (`appliance.worker.weight_sources`); the first worker of a node fills
the node's slab on the way, which stays as the copy in host memory.

Mapping costs the same whatever the size: the head is read, every tensor is a view, no other page is
touched. `MappedWeights.touch` then walks over the pages in a thread, so that a worker that has
nothing to do yet does not pay for each of them in its first step.
"""

import logging
import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from appliance.core.model_shape import DType, ModelShape, slab_layout
from appliance.core.start import WeightPlan
from appliance.modeling.errors import WeightError
from appliance.modeling.parallel import Progress
from appliance.modeling.slab import attach, fingerprint_of, is_complete, read_manifest
from appliance.modeling.slab_target import SlabTarget
from appliance.worker.weight_sources import (
    DiskSource,
    Received,
    Receiver,
    SlabSource,
    WeightSource,
    no_fault,
    receive,
)

log = logging.getLogger(__name__)

HOST = "host"
TOUCH_BYTES = 1 << 16
"""The kernel maps what stands around a page too, so much at a time."""
TOUCH_AT_ONCE = 1024


@dataclass(frozen=True, kw_only=True)
class MappedWeights:
    """Zero-copy views of the slab's tensors, read-only by mapping."""

    tensors: dict[str, torch.Tensor]
    source: str
    """"slab" when the slab was complete, else where the bytes came from: "peer:N", "host",
    "disk"."""
    seconds: float
    view: memoryview
    """The whole slab, read-only."""
    num_bytes: int
    """That were moved; 0 when the slab was complete."""
    notes: tuple[str, ...]
    fingerprint: str

    def touch(self) -> None:
        """Begin to map in all pages, without waiting."""
        pages = np.frombuffer(self.view, np.uint8)[::TOUCH_BYTES]

        def walk() -> None:
            for begin in range(0, len(pages), TOUCH_AT_ONCE):
                pages[begin : begin + TOUCH_AT_ONCE].max()  # releases the interpreter lock

        threading.Thread(target=walk, name="weights-touch", daemon=True).start()


@dataclass(frozen=True, kw_only=True)
class WeightRequest:
    """What a worker wants and may do for it."""

    model_dir: Path
    shape: ModelShape
    dtype: DType
    plan: WeightPlan = field(default_factory=WeightPlan)
    load: bool = False
    """It may fill the node's slab from `model_dir`, if that is empty, half-filled or outdated."""
    seed: int = 0
    """Draws the sample of checksums."""
    reach: Callable[[str], None] = no_fault


def open_weights(fds: Sequence[int], request: WeightRequest) -> MappedWeights:
    """Weights behind `fds` (this worker's slab, then those of `request.plan.sources`), which may be
    closed afterwards. Raises `WeightError` naming cause and fix."""
    began = time.monotonic()
    layout = slab_layout(request.shape, request.dtype)
    received = _own(fds, request) if request.plan.own else _shared(fds[0], request)
    readable = memoryview(
        mmap.mmap(_checked(fds[0], layout.total), layout.total, mmap.MAP_SHARED, mmap.PROT_READ)
    )
    tensors = attach(readable, shape=request.shape, dtype=request.dtype)
    seconds = time.monotonic() - began
    found = Received(source="slab", seconds=seconds) if received is None else received
    num_bytes = 0 if received is None else layout.total
    for reason in found.refused:
        log.warning("a better source of the weights: %s", reason)
    words = {"source": found.source, "seconds": seconds, **_pace(num_bytes, seconds)}
    log.info("weights are in place", extra=words)
    if found.checked:
        log.info("weights: %s", found.checked)
    return MappedWeights(
        tensors=tensors,
        view=readable,
        source=found.source,
        seconds=seconds,
        num_bytes=num_bytes,
        notes=(*found.refused, *([found.checked] if found.checked else [])),
        fingerprint=_fingerprint(readable),
    )


def _shared(fd: int, request: WeightRequest) -> Received | None:
    """The node's slab, to be mapped; None if nothing had to be moved."""
    return _load(fd, request) if request.load else None


def _own(fds: Sequence[int], request: WeightRequest) -> Received | None:
    """A slab of this worker's own; None if a predecessor left it complete."""
    plan = request.plan
    if len(fds) != 1 + len(plan.sources):
        raise WeightError(f"{len(plan.sources)} sources of weights, {len(fds) - 1} descriptors")
    receiver = _receiver(fds[0], request)
    if is_complete(receiver.view) and _fingerprint(receiver.view) == _wanted(request):
        return None
    from_disk = None
    if request.load and HOST in plan.sources:
        from_disk = _load(fds[1 + plan.sources.index(HOST)], request)
    sources: list[WeightSource] = [
        SlabSource(name, fd) for name, fd in zip(plan.sources, fds[1:], strict=True)
    ]
    received = receive(receiver, [*sources, DiskSource(request.model_dir)])
    if from_disk is None:
        return received
    return Received(
        source=f"{from_disk.source} through {received.source}",
        refused=received.refused,
        checked=received.checked,
        seconds=from_disk.seconds + received.seconds,
    )


def _load(fd: int, request: WeightRequest) -> Received | None:
    """Fill the node's slab from disk, unless it is complete and current."""
    receiver = _receiver(fd, request)
    if is_complete(receiver.view) and _fingerprint(receiver.view) == _wanted(request):
        return None
    source = DiskSource(request.model_dir)
    began = time.monotonic()
    source.fill(receiver)  # the only one there is: its error is the one to see
    return Received(source=source.name, seconds=time.monotonic() - began)


def _receiver(fd: int, request: WeightRequest) -> Receiver:
    num_bytes = slab_layout(request.shape, request.dtype).total
    writable = mmap.mmap(
        _checked(fd, num_bytes), num_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE
    )
    return Receiver(
        target=SlabTarget(view=memoryview(writable), fd=fd),
        shape=request.shape,
        dtype=request.dtype,
        fingerprint=request.plan.fingerprint,
        threads=request.plan.threads,
        with_sums=request.plan.own,
        full_check=request.plan.full_check,
        seed=request.seed,
        reach=request.reach,
        progress=_logging,
    )


def _checked(fd: int, num_bytes: int) -> int:
    available = os.fstat(fd).st_size
    if available < num_bytes:
        raise WeightError(f"the weight slab has {available} bytes, the model needs {num_bytes}")
    return fd


def _wanted(request: WeightRequest) -> str:
    """The fingerprint that a slab must have to be current."""
    return request.plan.fingerprint or fingerprint_of(request.model_dir)


def _fingerprint(view: memoryview) -> str:
    return str(read_manifest(view).get("fingerprint"))


def _logging(source: str) -> Progress:
    """Progress as log lines."""

    def progress(done: int, total: int, seconds: float) -> None:
        words = {"source": source, "done": f"{done / total:.0%}", **_pace(done, seconds)}
        log.info("weights are coming", extra=words)

    return progress


def _pace(num_bytes: int, seconds: float) -> dict[str, object]:
    return {"bytes": num_bytes, "gb_per_second": round(num_bytes / max(seconds, 1e-9) / 1e9, 2)}
