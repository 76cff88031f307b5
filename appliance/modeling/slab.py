"""The weight slab: all weights of a model in one flat buffer that outlives the worker that filled
it.

Head of the buffer: magic, version, a state word, the length of a JSON manifest, the manifest
(fingerprint of the source files, dtype, name, offset and shape of every tensor, digest of the
checksums if there are any). Then the tensors, then their checksums (`SlabLayout` in
`appliance.core.model_shape`). The state word is written last, so a slab whose loader died half-way
is never taken for complete.
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
    slab_layout,
    slab_offsets,
    weight_tensors,
)
from appliance.modeling.errors import WeightError
from appliance.modeling.families import SOURCES
from appliance.modeling.parallel import Progress, nothing
from appliance.modeling.safetensors_file import SafetensorsFile, open_checkpoint
from appliance.modeling.slab_reading import TORCH_DTYPES, locate, read_parts
from appliance.modeling.slab_sums import digest_of_sums
from appliance.modeling.slab_target import SlabTarget

MAGIC = b"APPLSLAB"
VERSION = 2
STATE_EMPTY, STATE_FILLING, STATE_COMPLETE = 0, 1, 2

_HEAD = struct.Struct("<8sIIQ")
_STATE = struct.Struct("<I")
_STATE_OFFSET = 12

Buffer = memoryview
"""A byte view of the slab (of an mmap or any other buffer)."""


def load_into_slab(
    model_dir: Path,
    buffer: Buffer | SlabTarget,
    *,
    shape: ModelShape,
    dtype: DType,
    fingerprint: str = "",
    threads: int = 1,
    progress: Progress = nothing,
    with_sums: bool = False,
) -> None:
    """Read the checkpoint into the writable `buffer` with that many threads, converting to `dtype`,
    and mark it complete; `with_sums`: others shall copy from it and be able to check what they got.

    Raises `WeightError` naming the tensor that is missing, unexpected or of another shape, the file
    that is cut short, or that the files are not (any more) those of `fingerprint`."""
    target = buffer if isinstance(buffer, SlabTarget) else SlabTarget(view=buffer)
    buffer = target.view
    _check_size(buffer, shape, dtype)
    found = fingerprint_of(model_dir)
    if fingerprint and found != fingerprint:
        raise WeightError(
            f"the files in {model_dir} changed since the node read them; start the node anew to "
            "serve the new ones"
        )
    files = open_checkpoint(model_dir)
    _check_names(shape, files)
    begin_filling(buffer)
    parts = locate(files, shape, dtype)
    read_parts(
        target,
        parts,
        shape=shape,
        dtype=dtype,
        threads=threads,
        progress=progress,
        with_sums=with_sums,
    )
    if fingerprint_of(model_dir) != found:
        raise WeightError(f"the files in {model_dir} changed while they were read; load them again")
    manifest = describe(shape, dtype) | {
        "fingerprint": found,
        "sums": digest_of_sums(buffer, slab_layout(shape, dtype)) if with_sums else "",
    }
    complete(buffer, json.dumps(manifest).encode(), shape=shape)


def begin_filling(buffer: Buffer) -> None:
    """From now until `complete` the slab is nobody's to use."""
    _HEAD.pack_into(buffer, 0, MAGIC, VERSION, STATE_FILLING, 0)


def complete(buffer: Buffer, manifest: bytes, *, shape: ModelShape) -> None:
    """All tensors and checksums are in place: write the manifest and say so."""
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
    """Zero-copy views of a complete slab's tensors; touches no page but the head. Raises
    `WeightError` as `check_manifest` does."""
    check_manifest(buffer, shape=shape, dtype=dtype, fingerprint=fingerprint)
    return _views(buffer, shape, dtype)


def check_manifest(
    buffer: Buffer, *, shape: ModelShape, dtype: DType, fingerprint: str | None = None
) -> bytes:
    """The manifest as it is stored, if the slab is complete and holds exactly these tensors.

    Raises `WeightError` otherwise: incomplete, other names, offsets, shapes or dtype, or read from
    other files than those of `fingerprint` if given."""
    _check_size(buffer, shape, dtype)
    raw = _raw_manifest(buffer)
    manifest = _parse(raw)
    expected = describe(shape, dtype)
    if {key: manifest.get(key) for key in expected} != expected:
        raise WeightError("the weight slab holds another model or dtype; start the node anew")
    if fingerprint is not None and manifest.get("fingerprint") != fingerprint:
        raise WeightError(
            "the checkpoint's files changed since the weight slab was filled; start the node anew"
        )
    return raw


def is_complete(buffer: Buffer) -> bool:
    """Whether the slab was filled to the end."""
    magic, version, state, _ = _HEAD.unpack_from(buffer, 0)
    return bool(magic == MAGIC and version == VERSION and state == STATE_COMPLETE)


def read_manifest(buffer: Buffer) -> dict[str, Any]:
    """The manifest of a complete slab; `WeightError` when it is not complete."""
    return _parse(_raw_manifest(buffer))


def fingerprint_of(model_dir: Path) -> str:
    """A name for the exact source files: config, index and safetensors by name, size and time of
    change."""
    digest = blake2b(digest_size=16)
    for path in sorted(model_dir.iterdir()):
        if path.name == "config.json" or ".safetensors" in path.suffixes:
            stat = path.stat()
            digest.update(f"{path.name}|{stat.st_size}|{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _raw_manifest(buffer: Buffer) -> bytes:
    magic, version, state, length = _HEAD.unpack_from(buffer, 0)
    if magic != MAGIC or version != VERSION or state != STATE_COMPLETE:
        raise WeightError(
            f"the weight slab is not complete (state {state}): its loader died; "
            "load the weights again"
        )
    return bytes(buffer[_HEAD.size : _HEAD.size + length])


def _parse(manifest: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(manifest)
    except ValueError as error:
        raise WeightError(f"the manifest of the weight slab is damaged ({error})") from error
    if not isinstance(parsed, dict):
        raise WeightError("the manifest of the weight slab is damaged (not a JSON object)")
    return parsed


def describe(shape: ModelShape, dtype: DType) -> dict[str, Any]:
    """What a manifest says of the tensors, as JSON gives it back."""
    offsets = slab_offsets(shape, dtype)
    tensors = [
        {"name": spec.name, "offset": offsets[spec.name], "shape": list(spec.shape)}
        for spec in weight_tensors(shape)
    ]
    return {"dtype": dtype, "tensors": tensors}


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
