"""The worker's side of the node's weight slab: map it, fill it if it is this worker's turn, view
it.

The node creates an anonymous memory file of `slab_bytes` and hands its descriptor to every worker.
The first worker fills it from the checkpoint; the others, and every successor, map it in place.
"""

import mmap
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from appliance.core.model_shape import DType, ModelShape, slab_bytes
from appliance.modeling.errors import WeightError
from appliance.modeling.slab import (
    attach,
    fingerprint_of,
    is_complete,
    load_into_slab,
    read_manifest,
)


@dataclass(frozen=True, kw_only=True)
class MappedWeights:
    """Zero-copy views of the slab's tensors, read-only by mapping."""

    tensors: dict[str, torch.Tensor]
    source: str
    """"disk" when this worker read the checkpoint, "slab" when the slab was complete."""
    seconds: float


def open_weights(
    fd: int, *, model_dir: Path, shape: ModelShape, dtype: DType, load: str = "never"
) -> MappedWeights:
    """Map the slab behind `fd` (which may be closed afterwards).

    `load` "if_needed" fills an empty, half-filled or outdated slab from `model_dir`; "never"
    demands a complete one. Raises `WeightError` naming cause and fix."""
    started = time.monotonic()
    num_bytes = slab_bytes(shape, dtype)
    available = os.fstat(fd).st_size
    if available < num_bytes:
        raise WeightError(f"the weight slab has {available} bytes, the model needs {num_bytes}")
    source = "slab"
    if load == "if_needed":
        writable = memoryview(
            mmap.mmap(fd, num_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        )
        if not _is_current(writable, model_dir):
            load_into_slab(model_dir, writable, shape=shape, dtype=dtype)
            source = "disk"
        del writable
    readable = memoryview(mmap.mmap(fd, num_bytes, mmap.MAP_SHARED, mmap.PROT_READ))
    tensors = attach(readable, shape=shape, dtype=dtype)
    return MappedWeights(tensors=tensors, source=source, seconds=time.monotonic() - started)


def _is_current(view: memoryview, model_dir: Path) -> bool:
    return is_complete(view) and read_manifest(view)["fingerprint"] == fingerprint_of(model_dir)
