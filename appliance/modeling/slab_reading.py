"""Reading a checkpoint into a slab: positioned reads of short runs, in the order of the files.

A disk and the kernel's read-ahead like the order of the file, which is not that of the slab. So the
parts of the slab are sorted by where they lie in the files and cut into runs of `RUN_BYTES`; each
run is read into a buffer that fits the processor's cache, converted there if the dtypes differ, and
written to its place. A file is read and not mapped, because a mapped file that is cut short
meanwhile kills the reader, while a short read is an error that can be named.
"""

import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from appliance.core.model_shape import (
    DTYPE_BYTES,
    SUM_CHUNK_BYTES,
    DType,
    ModelShape,
    SlabLayout,
    slab_layout,
    slab_offsets,
    weight_tensors,
)
from appliance.modeling.errors import WeightError
from appliance.modeling.families import SOURCES
from appliance.modeling.parallel import Progress, run_pieces
from appliance.modeling.safetensors_file import DTYPES, SafetensorsFile
from appliance.modeling.slab_sums import store_sums
from appliance.modeling.slab_target import SlabTarget

RUN_BYTES = 1 << 20
BATCH_RUNS = 64
"""Runs that a thread takes at a time: they lie behind one another, so the kernel reads ahead."""
TORCH_DTYPES: Mapping[DType, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Part:
    """A run of elements that lies in one place of one file and belongs in one place of the slab."""

    path: Path
    offset: int
    """In the file, bytes."""
    dtype: torch.dtype
    """Of the file."""
    target: int
    """In the slab, bytes."""
    num_elements: int

    def runs(self, *, itemsize: int) -> Iterator["Part"]:
        """This part in runs of at most `RUN_BYTES`; `itemsize` is that of the slab."""
        step = RUN_BYTES // max(itemsize, self.dtype.itemsize)
        for begin in range(0, self.num_elements, step):
            yield Part(
                path=self.path,
                offset=self.offset + begin * self.dtype.itemsize,
                dtype=self.dtype,
                target=self.target + begin * itemsize,
                num_elements=min(step, self.num_elements - begin),
            )


def locate(files: Mapping[str, SafetensorsFile], shape: ModelShape, dtype: DType) -> list[Part]:
    """Where every byte of the slab comes from, in the order of the files. Raises `WeightError`
    naming the tensor that has another shape or a dtype that is not built."""
    offsets = slab_offsets(shape, dtype)
    rows = {
        spec.name: spec.num_elements // spec.shape[0] * DTYPE_BYTES[dtype]
        for spec in weight_tensors(shape)
    }
    parts = []
    for source in SOURCES[shape.family](shape):
        file = files[source.name]
        entry = file.entries[source.name]
        if entry.shape != source.shape:
            raise WeightError(
                f"tensor {source.name!r} has shape {list(entry.shape)}, "
                f"config.json asks for {list(source.shape)}"
            )
        if entry.dtype not in DTYPES:
            raise WeightError(
                f"tensor {source.name!r} has dtype {entry.dtype}, which is not built; "
                f"known: {', '.join(DTYPES)}"
            )
        parts.append(
            Part(
                path=file.path,
                offset=entry.offset,
                dtype=DTYPES[entry.dtype],
                target=offsets[source.target] + source.row * rows[source.target],
                num_elements=entry.num_elements,
            )
        )
    return sorted(parts, key=lambda part: (part.path, part.offset))


def read_parts(
    target: SlabTarget,
    parts: Sequence[Part],
    *,
    shape: ModelShape,
    dtype: DType,
    threads: int,
    progress: Progress,
    with_sums: bool,
) -> None:
    """Read all `parts` (of `locate`) into the slab, and store its checksums if wanted. Raises
    `WeightError` for a file that ends early, `OSError` for one that cannot be read."""
    itemsize = DTYPE_BYTES[dtype]
    runs = [run for part in parts for run in part.runs(itemsize=itemsize)]
    batches = [runs[at : at + BATCH_RUNS] for at in range(0, len(runs), BATCH_RUNS)]
    sums = _Sums(target, slab_layout(shape, dtype), runs, itemsize=itemsize) if with_sums else None
    with ExitStack() as stack:
        run_pieces(
            batches,
            _Reader(target, TORCH_DTYPES[dtype], sums=sums, stack=stack).read,
            num_bytes=sum(run.num_elements for run in runs) * itemsize,
            threads=threads,
            progress=progress,
        )


class _Sums:
    """Which chunks are complete: a chunk's checksum is computed by whoever writes its last run."""

    def __init__(
        self, target: SlabTarget, layout: SlabLayout, runs: Iterable[Part], *, itemsize: int
    ) -> None:
        self._target = target
        self._layout = layout
        self._itemsize = itemsize
        self._lock = threading.Lock()
        self._missing = [0] * layout.num_chunks
        """Runs that have yet to come, by chunk."""
        for run in runs:
            for chunk in self._chunks(run):
                self._missing[chunk] += 1

    def wrote(self, run: Part) -> None:
        """A run is in its place."""
        whole = []
        with self._lock:
            for chunk in self._chunks(run):
                self._missing[chunk] -= 1
                if self._missing[chunk] == 0:
                    whole.append(chunk)
        store_sums(self._target.view, self._layout, whole)

    def _chunks(self, run: Part) -> range:
        begin = run.target - self._layout.header
        last = begin + run.num_elements * self._itemsize - 1
        return range(begin // SUM_CHUNK_BYTES, last // SUM_CHUNK_BYTES + 1)


class _Reader:
    """Reads runs into the slab; shared by the threads."""

    def __init__(
        self, target: SlabTarget, dtype: torch.dtype, *, sums: _Sums | None, stack: ExitStack
    ) -> None:
        """`stack` closes the files."""
        self._target = target
        self._dtype = dtype
        self._sums = sums
        self._stack = stack
        self._opened = threading.local()
        """Files opened by each thread: the kernel reads ahead for each opened file by itself."""

    def read(self, runs: Sequence[Part]) -> int:
        """Read some runs; the bytes of the slab that they fill."""
        raw, converted = bytearray(RUN_BYTES), bytearray(RUN_BYTES)
        done = 0
        for run in runs:
            data = memoryview(raw)[: run.num_elements * run.dtype.itemsize]
            self._fill(data, run)
            if run.dtype != self._dtype:
                data = self._convert(data, run, into=memoryview(converted))
            self._target.write(run.target, data)
            if self._sums is not None:
                self._sums.wrote(run)
            done += len(data)
        return done

    def _convert(self, data: memoryview, run: Part, *, into: memoryview) -> memoryview:
        made = into[: run.num_elements * self._dtype.itemsize]
        torch.frombuffer(made, dtype=self._dtype).copy_(torch.frombuffer(data, dtype=run.dtype))
        return made

    def _fill(self, data: memoryview, run: Part) -> None:
        done = 0
        while done < len(data):
            count = os.preadv(self._file(run.path), [data[done:]], run.offset + done)
            if count == 0:
                raise WeightError(
                    f"{run.path.name}: ends at byte {run.offset + done} while it is being read; "
                    "it was cut short, fetch it again"
                )
            done += count

    def _file(self, path: Path) -> int:
        if not hasattr(self._opened, "files"):
            self._opened.files = {}
        files: dict[Path, int] = self._opened.files
        if path not in files:
            files[path] = self._stack.enter_context(path.open("rb", buffering=0)).fileno()
        return files[path]
