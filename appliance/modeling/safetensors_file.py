"""What is in safetensors files, and where.

The format: an 8-byte little-endian header length, a JSON header `name -> {dtype, shape,
data_offsets}`, then the bytes. Only the header is read here; the rest is the business of
`appliance.modeling.slab_reading`.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from appliance.modeling.errors import WeightError

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
MAX_HEADER_BYTES = 100 << 20


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of a file: where it lies (bytes from the start of the file) and what it is."""

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def num_elements(self) -> int:
        """How many numbers."""
        return prod(self.shape)


class SafetensorsFile:
    """The header of one file. `WeightError` names the file when it is truncated or not
    safetensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        size = path.stat().st_size
        if size < 8:
            raise WeightError(
                f"{path.name}: {size} bytes are too few for a safetensors file; fetch it again"
            )
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise WeightError(
                    f"{path.name}: header of {length} bytes does not fit; "
                    "the file is truncated or not safetensors, fetch it again"
                )
            self.header = file.read(length)
        self.entries = dict(self._parse(data_start=8 + length, size=size))

    def _parse(self, *, data_start: int, size: int) -> Iterator[tuple[str, Entry]]:
        try:
            header: dict[str, Any] = json.loads(self.header)
        except ValueError as error:
            raise WeightError(
                f"{self.path.name}: the header is not JSON ({error}); fetch it again"
            ) from error
        for name, item in header.items():
            if name == "__metadata__":
                continue
            begin, end = item["data_offsets"]
            if data_start + end > size:
                raise WeightError(
                    f"{self.path.name}: truncated, tensor {name!r} ends at byte "
                    f"{data_start + end} of {size}; fetch it again"
                )
            shape = tuple(item["shape"])
            dtype = DTYPES.get(item["dtype"])
            if dtype is not None and end - begin != prod(shape) * dtype.itemsize:
                raise WeightError(
                    f"{self.path.name}: tensor {name!r} has {end - begin} bytes for {shape}"
                )
            yield name, Entry(dtype=item["dtype"], shape=shape, offset=data_start + begin)


def open_checkpoint(model_dir: Path) -> dict[str, SafetensorsFile]:
    """Every tensor name of a checkpoint with its file: `model.safetensors`, or the shards named
    by `model.safetensors.index.json`. `WeightError` when neither is there or a shard is missing."""
    index = model_dir / "model.safetensors.index.json"
    single = model_dir / "model.safetensors"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    elif single.is_file():
        names = [single.name]
    else:
        raise WeightError(
            f"{model_dir}: neither model.safetensors nor model.safetensors.index.json; "
            "the model directory must hold safetensors weights"
        )
    located: dict[str, SafetensorsFile] = {}
    for name in names:
        if not (model_dir / name).is_file():
            raise WeightError(
                f"{name} is named by {index.name} but missing; fetch the checkpoint again"
            )
        file = SafetensorsFile(model_dir / name)
        located.update(dict.fromkeys(file.entries, file))
    return located
