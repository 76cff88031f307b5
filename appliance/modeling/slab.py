"""The weight slab: all weights of a model in one flat buffer that outlives the worker that filled
it.

Head of the buffer: magic, version, a state word, the length of a JSON manifest, the manifest
(fingerprint of the source files, dtype, and name, offset, shape of every tensor). Then the tensors.
The state word is written last, so a slab whose loader died half-way is never taken for complete.
"""

import json
import struct
import warnings
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from math import prod
from pathlib import Path
from typing import Any

import torch

from appliance.core.model_shape import (
    DType,
    ModelShape,
    slab_bytes,
    slab_header_bytes,
    slab_offsets,
    weight_tensors,
)
from appliance.modeling.errors import WeightError
from appliance.modeling.families import SOURCES
from appliance.modeling.safetensors_file import SafetensorsFile, open_checkpoint

MAGIC = b"APPLSLAB"
VERSION = 1
STATE_EMPTY, STATE_FILLING, STATE_COMPLETE = 0, 1, 2

TORCH_DTYPES: Mapping[DType, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_HEAD = struct.Struct("<8sIIQ")
_STATE = struct.Struct("<I")
_STATE_OFFSET = 12

Buffer = memoryview
"""A byte view of the slab (of an mmap or any other buffer)."""


def load_into_slab(model_dir: Path, buffer: Buffer, *, shape: ModelShape, dtype: DType) -> None:
    """Read the checkpoint straight into the writable `buffer`, converting to `dtype`, and mark it
    complete. Raises `WeightError` naming the tensor that is missing, unexpected or of another
    shape."""
    _check_size(buffer, shape, dtype)
    files = open_checkpoint(model_dir)
    _check_names(shape, files)
    _HEAD.pack_into(buffer, 0, MAGIC, VERSION, STATE_FILLING, 0)
    targets = _views(buffer, shape, dtype)
    for source in SOURCES[shape.family](shape):
        tensor = files[source.name].tensor(source.name)
        if tuple(tensor.shape) != source.shape:
            raise WeightError(
                f"tensor {source.name!r} has shape {list(tensor.shape)}, "
                f"config.json asks for {list(source.shape)}"
            )
        targets[source.target].narrow(0, source.row, source.shape[0]).copy_(tensor)
    manifest = json.dumps(_manifest(model_dir, shape, dtype)).encode()
    if _HEAD.size + len(manifest) > slab_header_bytes(shape):
        raise WeightError(
            f"the manifest of {len(manifest)} bytes does not fit into the slab's header"
        )
    _HEAD.pack_into(buffer, 0, MAGIC, VERSION, STATE_FILLING, len(manifest))
    buffer[_HEAD.size : _HEAD.size + len(manifest)] = manifest
    _STATE.pack_into(buffer, _STATE_OFFSET, STATE_COMPLETE)


def attach(
    buffer: Buffer, *, shape: ModelShape, dtype: DType, fingerprint: str | None = None
) -> dict[str, torch.Tensor]:
    """Zero-copy views of a complete slab's tensors. Raises `WeightError` when the slab is
    incomplete or holds another model (other layout, dtype, or `fingerprint` if given)."""
    _check_size(buffer, shape, dtype)
    manifest = read_manifest(buffer)
    expected = [[name, offset] for name, offset in slab_offsets(shape, dtype).items()]
    found = [[item["name"], item["offset"]] for item in manifest["tensors"]]
    if manifest["dtype"] != dtype or found != expected:
        raise WeightError("the weight slab holds another model or dtype; start the node anew")
    if fingerprint is not None and manifest["fingerprint"] != fingerprint:
        raise WeightError(
            "the checkpoint's files changed since the weight slab was filled; start the node anew"
        )
    return _views(buffer, shape, dtype)


def is_complete(buffer: Buffer) -> bool:
    """Whether the slab was filled to the end."""
    magic, version, state, _ = _HEAD.unpack_from(buffer, 0)
    return bool(magic == MAGIC and version == VERSION and state == STATE_COMPLETE)


def read_manifest(buffer: Buffer) -> dict[str, Any]:
    """The manifest of a complete slab; `WeightError` when it is not complete."""
    magic, version, state, length = _HEAD.unpack_from(buffer, 0)
    if magic != MAGIC or version != VERSION or state != STATE_COMPLETE:
        raise WeightError(
            f"the weight slab is not complete (state {state}): its loader died; "
            "load the weights again"
        )
    manifest: dict[str, Any] = json.loads(bytes(buffer[_HEAD.size : _HEAD.size + length]))
    return manifest


def fingerprint_of(model_dir: Path) -> str:
    """A name for the exact source files: config, index and safetensors by name, size and time of
    change."""
    digest = blake2b(digest_size=16)
    for path in sorted(model_dir.iterdir()):
        if path.name == "config.json" or ".safetensors" in path.suffixes:
            stat = path.stat()
            digest.update(f"{path.name}|{stat.st_size}|{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _manifest(model_dir: Path, shape: ModelShape, dtype: DType) -> dict[str, Any]:
    offsets = slab_offsets(shape, dtype)
    tensors = [
        {"name": spec.name, "offset": offsets[spec.name], "shape": spec.shape}
        for spec in weight_tensors(shape)
    ]
    return {"dtype": dtype, "fingerprint": fingerprint_of(model_dir), "tensors": tensors}


def _views(buffer: Buffer, shape: ModelShape, dtype: DType) -> dict[str, torch.Tensor]:
    offsets = slab_offsets(shape, dtype)
    torch_dtype = TORCH_DTYPES[dtype]
    with warnings.catch_warnings():
        # A slab mapped read-only is read only on purpose: a stray write must fault, not change a
        # weight under the other workers.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return {
            spec.name: torch.frombuffer(
                buffer, dtype=torch_dtype, count=prod(spec.shape), offset=offsets[spec.name]
            ).view(spec.shape)
            for spec in weight_tensors(shape)
        }


def _check_size(buffer: Buffer, shape: ModelShape, dtype: DType) -> None:
    needed = slab_bytes(shape, dtype)
    if buffer.nbytes < needed:
        raise WeightError(f"the weight slab has {buffer.nbytes} bytes, the model needs {needed}")


def _check_names(shape: ModelShape, files: Mapping[str, SafetensorsFile]) -> None:
    """Refuse a checkpoint that lacks a tensor, or has one that the forward pass would not use."""
    expected = {source.name for source in SOURCES[shape.family](shape)}
    if missing := sorted(expected - files.keys()):
        hint = "; is tie_word_embeddings right?" if missing == ["lm_head.weight"] else ""
        raise WeightError(
            f"tensor {missing[0]!r} is missing in the checkpoint ({len(missing)} missing){hint}"
        )
    if unused := sorted(_unused(files.keys() - expected, tied=shape.tied)):
        raise WeightError(
            f"tensor {unused[0]!r} is in the checkpoint but a {shape.family} model of this "
            f"config.json has no such tensor ({len(unused)} in all)"
        )


def _unused(names: set[str], *, tied: bool) -> Iterator[str]:
    for name in names:
        if name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight"):
            continue
        yield name
