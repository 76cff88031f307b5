"""What is refused before any process starts, and where a model is found."""

import json
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from appliance.live.checkpoint import CheckpointError, find_model, open_checkpoint


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the bundled model that a test may damage."""
    target = tmp_path / "copy"
    shutil.copytree(tiny_model, target)
    return target


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def write_shard(path: Path, tensors: Mapping[str, tuple[str, list[int], bytes]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (dtype, shape, raw) in tensors.items():
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += raw
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


def test_the_bundled_model_passes_and_is_described(tiny_model: Path) -> None:
    checkpoint = open_checkpoint(tiny_model)
    assert checkpoint.name == "tiny-tasks"
    assert checkpoint.eos_ids == (2,)
    assert checkpoint.file_bytes == 2 * checkpoint.shape.num_parameters
    assert checkpoint.weight_files == ("model.safetensors",)
    assert checkpoint.generation["do_sample"] is False


def test_the_fingerprint_changes_with_config_and_headers(model: Path) -> None:
    first = open_checkpoint(model).fingerprint
    assert open_checkpoint(model).fingerprint == first
    edit(model / "config.json", rope_theta=5e5)
    assert open_checkpoint(model).fingerprint != first


def test_sharded_checkpoints_are_checked_shard_by_shard(model: Path) -> None:
    (model / "model.safetensors").unlink()
    write_shard(model / "a.safetensors", {"x": ("F32", [2, 3], bytes(24))})
    write_shard(model / "b.safetensors", {"y": ("BF16", [4], bytes(8))})
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    checkpoint = open_checkpoint(model)
    assert (checkpoint.num_tensors, checkpoint.file_bytes) == (2, 32)
    edit(index, weight_map={"x": "a.safetensors", "y": "a.safetensors"})
    with pytest.raises(CheckpointError, match=r"a\.safetensors lacks 'y'"):
        open_checkpoint(model)
    edit(index, weight_map={"x": "gone.safetensors"})
    with pytest.raises(CheckpointError, match=r"gone\.safetensors cannot be read"):
        open_checkpoint(model)
    edit(index, weight_map={"x": "../a.safetensors"})
    with pytest.raises(CheckpointError, match="outside the model directory"):
        open_checkpoint(model)


def test_r20_damaged_files_are_named(model: Path) -> None:
    weights = model / "model.safetensors"
    raw = weights.read_bytes()
    weights.write_bytes(raw[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is cut short .* fetch it again"):
        open_checkpoint(model)
    weights.write_bytes(raw[:4])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        open_checkpoint(model)
    weights.write_bytes(struct.pack("<Q", 1 << 60) + raw[8:])
    with pytest.raises(CheckpointError, match="header is damaged"):
        open_checkpoint(model)
    write_shard(weights, {"x": ("F32", [2, 2], bytes(8))})
    with pytest.raises(CheckpointError, match="header is damaged"):
        open_checkpoint(model)


def test_r20_what_cannot_be_served_is_refused_by_name(model: Path) -> None:
    edit(model / "config.json", quantization_config={"quant_method": "awq"})
    with pytest.raises(CheckpointError, match=r"quantization_config: .*awq"):
        open_checkpoint(model)
    (model / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="is not a JSON object"):
        open_checkpoint(model)
    (model / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        open_checkpoint(model)


def test_r20_weights_in_another_format_are_named(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is not read.*safetensors"):
        open_checkpoint(model)


def test_a_model_is_found_by_path_by_bundled_name_and_in_the_hub_cache(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_model(str(model)) == model.resolve()
    assert find_model("copy", bundled=tmp_path) == model.resolve()
    cache = tmp_path / "hub"
    snapshot = cache / "models--some--model" / "snapshots" / "abc123"
    shutil.copytree(model, snapshot)
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    assert find_model("some/model") == snapshot
    assert open_checkpoint(snapshot).name == "some/model"
    (cache / "models--some--model" / "refs").mkdir()
    (cache / "models--some--model" / "refs" / "main").write_text("abc123\n")
    assert find_model("some/model") == snapshot


@pytest.mark.parametrize("name", ["no/such", "nothing", "./nothing/here"])
def test_r20_a_model_that_is_nowhere_is_refused_with_the_setting(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"set \[model\] path \(--model\)"):
        find_model(name)
