"""Reading a checkpoint into a slab: positioned reads straight to where the bytes belong.

The slab is cut into pieces of whole checksum chunks; each piece is one unit of work for one thread:
read the parts of it from the files, convert them if the dtypes differ, compute the checksums while
the bytes are still in the cache. A file is read and not mapped, because a mapped file that is cut
short meanwhile kills the reader, while a short read is an error that can be named.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
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

PIECE_CHUNKS = 8
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

    def cut(self, begin: int, end: int, *, itemsize: int) -> "Part":
        """Elements `begin .. end` of this part; `itemsize` is that of the slab."""
        return Part(
            path=self.path,
            offset=self.offset + begin * self.dtype.itemsize,
            dtype=self.dtype,
            target=self.target + begin * itemsize,
            num_elements=end - begin,
        )


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one thread does at a time: these chunks, made of these parts."""

    chunks: range
    parts: tuple[Part, ...]


def locate(files: Mapping[str, SafetensorsFile], shape: ModelShape, dtype: DType) -> list[Part]:
    """Where every byte of the slab comes from, in slab order. Raises `WeightError` naming the
    tensor that has another shape or a dtype that is not built."""
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
    return sorted(parts, key=lambda part: part.target)


def read_parts(
    view: memoryview,
    parts: Sequence[Part],
    *,
    shape: ModelShape,
    dtype: DType,
    threads: int,
    progress: Progress,
) -> None:
    """Read all `parts` (of `locate`) into the slab `view` and store their checksums. Raises
    `WeightError` for a file that ends early, `OSError` for one that cannot be read."""
    layout = slab_layout(shape, dtype)
    with ExitStack() as stack:
        reader = _Reader(view, dtype=dtype, layout=layout)
        for path in {part.path for part in parts}:
            reader.files[path] = stack.enter_context(path.open("rb", buffering=0)).fileno()
        run_pieces(
            list(_pieces(parts, layout, itemsize=DTYPE_BYTES[dtype])),
            reader.read,
            num_bytes=layout.sums - layout.header,
            threads=threads,
            progress=progress,
        )


def _pieces(parts: Sequence[Part], layout: SlabLayout, *, itemsize: int) -> Iterator[Piece]:
    """The slab from front to back. Parts do not overlap, so one pass over them is enough."""
    step, first = PIECE_CHUNKS * SUM_CHUNK_BYTES, 0
    for begin in range(layout.header, layout.sums, step):
        end = begin + step
        inside = []
        for index in range(first, len(parts)):
            part = parts[index]
            low = max(0, (begin - part.target) // itemsize)
            high = min(part.num_elements, (end - part.target) // itemsize)
            if part.target >= end:
                break
            if high == part.num_elements:
                first = index + 1
            if low < high:
                inside.append(part.cut(low, high, itemsize=itemsize))
        chunk = (begin - layout.header) // SUM_CHUNK_BYTES
        yield Piece(
            chunks=range(chunk, min(chunk + PIECE_CHUNKS, layout.num_chunks)), parts=tuple(inside)
        )


class _Reader:
    """Reads pieces into the slab; shared by the threads."""

    def __init__(self, view: memoryview, *, dtype: DType, layout: SlabLayout) -> None:
        self.files: dict[Path, int] = {}
        """Open descriptors."""
        self._view = view
        self._dtype = TORCH_DTYPES[dtype]
        self._layout = layout

    def read(self, piece: Piece) -> int:
        """Read one piece; the bytes of the slab that it fills."""
        for part in piece.parts:
            begin, size = part.target, part.num_elements * self._dtype.itemsize
            target = self._view[begin : begin + size]
            if part.dtype == self._dtype:
                self._fill(target, part)
                continue
            raw = memoryview(bytearray(part.num_elements * part.dtype.itemsize))
            self._fill(raw, part)
            torch.frombuffer(target, dtype=self._dtype).copy_(
                torch.frombuffer(raw, dtype=part.dtype)
            )
        store_sums(self._view, self._layout, piece.chunks)
        chunks = [self._layout.chunk(index) for index in piece.chunks]
        return sum(int(chunk.stop - chunk.start) for chunk in chunks)

    def _fill(self, target: memoryview, part: Part) -> None:
        done = 0
        while done < len(target):
            count = os.preadv(self.files[part.path], [target[done:]], part.offset + done)
            if count == 0:
                raise WeightError(
                    f"{part.path.name}: ends at byte {part.offset + done} while it is being read; "
                    "it was cut short, fetch it again"
                )
            done += count
