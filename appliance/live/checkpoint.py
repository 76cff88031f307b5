"""What can be known of a checkpoint without loading it: shape, headers, end tokens, defaults.

Neither torch nor transformers is needed: `config.json` and the headers of the safetensors files
are JSON. A checkpoint that could not be served is refused here, before any process starts, with
the file and the fix in the message.
"""

import json
import os
import struct
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from appliance.core.model_shape import ModelShape, UnsupportedModel, parse_config
from appliance.core.types import Record

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPE_BYTES: Mapping[str, int] = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2,
    "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
_LENGTH = struct.Struct("<Q")
MAX_HEADER_BYTES = 100 * 1024 * 1024


class CheckpointError(Exception):
    """The checkpoint cannot be served. The message names the file or field and the fix."""


class Checkpoint(Record, frozen=True, kw_only=True):
    """A model directory that passed the checks."""

    directory: Path
    name: str
    """Name to serve it under unless the operator chose one."""
    shape: ModelShape
    weight_files: tuple[str, ...]
    num_tensors: int
    file_bytes: int
    """Bytes of all tensors as stored."""
    fingerprint: str
    """16 hex digits over config.json and the headers: changes when the architecture or a tensor
    does."""
    eos_ids: tuple[int, ...]
    generation: Mapping[str, Any]
    """`generation_config.json`, empty if there is none."""


def find_model(model: str, *, bundled: Path | None = None) -> Path:
    """The directory that `model` means: a path, the name of a model in the directory `bundled`,
    or an id `org/name` in the local hub cache (nothing is downloaded). Raises
    `CheckpointError`."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve()
    if bundled is not None and "/" not in model and (bundled / model).is_dir():
        return (bundled / model).resolve()
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        repository = _hub_cache() / f"models--{model.replace('/', '--')}"
        snapshot = _snapshot(repository)
        if snapshot is not None:
            return snapshot
        raise CheckpointError(
            f"model {model!r} is neither a directory nor in the hub cache {_hub_cache()}; "
            "set [model] path (--model) to a directory, or fetch it first with `hf download`"
        )
    raise CheckpointError(
        f"model {model!r}: no such directory; set [model] path (--model) to a directory with "
        "config.json, tokenizer.json and safetensors files"
    )


def open_checkpoint(directory: Path) -> Checkpoint:
    """Read and check `config.json`, `generation_config.json` and all safetensors headers.

    Raises `CheckpointError`."""
    config_path = directory / "config.json"
    config = read_json(config_path)
    if config is None:
        raise CheckpointError(
            f"{config_path} is missing: {directory} is not a model directory; set [model] path "
            "(--model) to one with config.json, tokenizer.json and safetensors files"
        )
    generation = read_json(directory / "generation_config.json") or {}
    try:
        shape = parse_config(config, generation_config=generation)
    except UnsupportedModel as error:
        raise CheckpointError(f"{config_path}: {error}") from error
    digest = blake2b(config_path.read_bytes(), digest_size=8)
    num_tensors = file_bytes = 0
    files = _weight_files(directory)
    for file, expected in files.items():
        header = _read_header(directory / file, digest)
        _require(directory / file, expected, header)
        num_tensors += len(header)
        file_bytes += sum(end - begin for begin, end in header.values())
    return Checkpoint(
        directory=directory,
        name=directory.name if directory.parent.name != "snapshots" else _hub_name(directory),
        shape=shape,
        weight_files=tuple(files),
        num_tensors=num_tensors,
        file_bytes=file_bytes,
        fingerprint=digest.hexdigest(),
        eos_ids=shape.eos_ids,
        generation=generation,
    )


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in that file, None if there is no file. Raises `CheckpointError` otherwise."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return found


def _hub_cache() -> Path:
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache)
    home = os.environ.get("HF_HOME")
    return (Path(home) if home else Path.home() / ".cache" / "huggingface") / "hub"


def _snapshot(repository: Path) -> Path | None:
    """The snapshot that `main` names, or the only one there is."""
    reference = repository / "refs" / "main"
    if reference.is_file():
        named = repository / "snapshots" / reference.read_text().strip()
        if named.is_dir():
            return named
    found = sorted((repository / "snapshots").glob("*/config.json"))
    return found[0].parent if len(found) == 1 else None


def _hub_name(snapshot: Path) -> str:
    return snapshot.parent.parent.name.removeprefix("models--").replace("--", "/")


def _weight_files(directory: Path) -> dict[str, set[str] | None]:
    """File name -> tensors that the index expects in it (None: no index, take all)."""
    index_path = directory / INDEX_FILE
    index = read_json(index_path)
    if index is not None:
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index_path} has no weight_map")
        files: dict[str, set[str] | None] = {}
        for tensor, file in weight_map.items():
            if Path(str(file)).name != file:
                raise CheckpointError(f"{index_path} names {file!r}, outside the model directory")
            wanted = files.setdefault(str(file), set())
            assert wanted is not None
            wanted.add(tensor)
        return dict(sorted(files.items()))
    if (directory / SINGLE_FILE).is_file():
        return {SINGLE_FILE: None}
    others = sorted(p.name for p in directory.glob("*.bin")) + sorted(
        p.name for p in directory.glob("*.gguf")
    )
    found = f" ({', '.join(others[:3])} is not read)" if others else ""
    raise CheckpointError(
        f"{directory} has no {SINGLE_FILE} or {INDEX_FILE}{found}; "
        "convert the checkpoint to safetensors"
    )


def _read_header(path: Path, digest: "blake2b") -> dict[str, tuple[int, int]]:
    """Byte range of each tensor in the data part of a file; checked against the file's size."""
    try:
        with path.open("rb") as file:
            (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
            raw = file.read(length) if length <= MAX_HEADER_BYTES else b""
            size = os.fstat(file.fileno()).st_size
    except (OSError, struct.error) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    digest.update(path.name.encode() + raw)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        ranges = {name: _range(entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: the safetensors header is damaged: {error}") from error
    data_bytes = size - _LENGTH.size - length
    if ranges and max(end for _, end in ranges.values()) != data_bytes:
        raise CheckpointError(f"{path} is cut short or too long ({size} bytes); fetch it again")
    return ranges


def _range(entry: Mapping[str, Any]) -> tuple[int, int]:
    begin, end = entry["data_offsets"]
    num_bytes = DTYPE_BYTES[entry["dtype"]]
    for dimension in entry["shape"]:
        num_bytes *= dimension
    if end - begin != num_bytes:
        raise ValueError(f"a tensor of {num_bytes} bytes has {end - begin} bytes in the file")
    return begin, end


def _require(path: Path, expected: set[str] | None, header: Mapping[str, object]) -> None:
    if expected is not None and (missing := sorted(expected - header.keys())):
        raise CheckpointError(f"{path} lacks {missing[0]!r}, which {INDEX_FILE} expects in it")
