"""The weight slab: everything in place, or a typed error that names what is wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from appliance.core.model_shape import DType, parse_config, slab_bytes, weight_tensors
from appliance.modeling.errors import WeightError
from appliance.modeling.families import SOURCES
from appliance.modeling.slab import (
    STATE_COMPLETE,
    STATE_FILLING,
    attach,
    fingerprint_of,
    is_complete,
    load_into_slab,
    read_manifest,
)
from appliance.worker.torch_engine import read_shape
from tests.modeling.checkpoints import VARIANTS, CheckpointStore


def fill(directory: Path, dtype: DType = "float32") -> memoryview:
    shape = read_shape(directory)
    buffer = memoryview(bytearray(slab_bytes(shape, dtype)))
    load_into_slab(directory, buffer, shape=shape, dtype=dtype)
    return buffer


@pytest.fixture
def broken(checkpoint: CheckpointStore, tmp_path: Path) -> Path:
    """A copy of a checkpoint that a test may damage."""
    return Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))


def rewrite(directory: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors (dots written as __) of the only weights file; None removes one."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    for key, value in changes.items():
        name = key.replace("__", ".")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, file)


@pytest.mark.parametrize("name", sorted(VARIANTS))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_tensor_of_each_family_lands_in_its_place(
    checkpoint: CheckpointStore, name: str, dtype: DType
) -> None:
    directory = checkpoint(name)
    shape = read_shape(directory)
    buffer = fill(directory, dtype)
    views = attach(buffer, shape=shape, dtype=dtype, fingerprint=fingerprint_of(directory))
    assert set(views) == {spec.name for spec in weight_tensors(shape)}
    saved: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors"):
        saved |= load_file(file)
    for source in SOURCES[shape.family](shape):
        placed = views[source.target][source.row : source.row + source.shape[0]]
        assert torch.equal(placed, saved.pop(source.name).to(placed.dtype)), source.name
    assert not saved.keys() - {"lm_head.weight"}


def test_sharded_checkpoints_are_read_from_all_their_files(checkpoint: CheckpointStore) -> None:
    directory = checkpoint("llama3-rope-untied-sharded")
    assert len(list(directory.glob("model-*.safetensors"))) > 1
    assert is_complete(fill(directory))


def test_R6_a_half_written_slab_is_never_taken_for_complete(broken: Path) -> None:
    rewrite(broken, model__norm__weight=torch.zeros(47))
    shape = read_shape(broken)
    buffer = memoryview(bytearray(slab_bytes(shape, "float32")))
    with pytest.raises(WeightError, match="not complete"):
        attach(buffer, shape=shape, dtype="float32")
    with pytest.raises(WeightError, match=r"model\.norm\.weight"):
        load_into_slab(broken, buffer, shape=shape, dtype="float32")
    assert int.from_bytes(buffer[12:16], "little") == STATE_FILLING
    assert not is_complete(buffer)
    with pytest.raises(WeightError, match="load the weights again"):
        attach(buffer, shape=shape, dtype="float32")


def test_views_share_the_buffer_and_the_manifest_describes_it(checkpoint: CheckpointStore) -> None:
    directory = checkpoint("llama")
    shape, buffer = read_shape(directory), fill(directory)
    views = attach(buffer, shape=shape, dtype="float32")
    manifest = read_manifest(buffer)
    assert buffer[12:16] == STATE_COMPLETE.to_bytes(4, "little")
    assert manifest["dtype"] == "float32"
    by_name = {item["name"]: item for item in manifest["tensors"]}
    offset = by_name["norm"]["offset"]
    buffer[offset : offset + 4] = b"\0\0\x80\x3f"
    assert views["norm"][0] == 1.0


def test_attaching_another_model_dtype_or_version_of_the_files_is_refused(
    checkpoint: CheckpointStore, broken: Path
) -> None:
    shape = read_shape(broken)
    buffer = fill(broken)
    other = parse_config(
        json.loads((broken / "config.json").read_text()) | {"num_hidden_layers": 1}
    )
    with pytest.raises(WeightError, match="another model"):
        attach(buffer, shape=other, dtype="float32")
    with pytest.raises(WeightError, match="another model or dtype"):
        attach(buffer, shape=shape, dtype="bfloat16")
    before = fingerprint_of(broken)
    rewrite(broken, model__norm__weight=torch.ones(48))
    assert fingerprint_of(broken) != before
    with pytest.raises(WeightError, match="changed since"):
        attach(buffer, shape=shape, dtype="float32", fingerprint=fingerprint_of(broken))


def test_a_missing_tensor_is_named(broken: Path) -> None:
    rewrite(broken, model__layers__1__mlp__up_proj__weight=None)
    with pytest.raises(WeightError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' is missing"):
        fill(broken)


def test_an_untied_model_without_output_projection_is_named(broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text()) | {"tie_word_embeddings": False}
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightError, match=r"lm_head\.weight.*tie_word_embeddings"):
        fill(broken)


def test_a_tensor_that_the_model_would_not_use_is_named(broken: Path) -> None:
    name = "model__layers__0__self_attn__q_proj__bias"
    rewrite(broken, **{name: torch.zeros(48), "model__rotary_emb__inv_freq": torch.zeros(4)})
    with pytest.raises(WeightError, match=r"self_attn\.q_proj\.bias.*\(1 in all\)"):
        fill(broken)


def test_a_wrong_shape_is_named_with_both_shapes(broken: Path) -> None:
    rewrite(broken, model__embed_tokens__weight=torch.zeros(198, 48))
    with pytest.raises(WeightError, match=r"embed_tokens\.weight.*\[198, 48\].*\[199, 48\]"):
        fill(broken)


@pytest.mark.parametrize("keep", [0, 5, 300, 0.5, 0.999])
def test_a_truncated_file_is_named(broken: Path, keep: float) -> None:
    file = broken / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if keep < 1 else int(keep)])
    with pytest.raises(WeightError, match=r"model\.safetensors.*fetch it again"):
        fill(broken)


def test_a_file_that_is_not_safetensors_is_named(broken: Path) -> None:
    (broken / "model.safetensors").write_bytes(
        (9).to_bytes(8, "little") + b"not json!" + b"\0" * 99
    )
    with pytest.raises(WeightError, match="not JSON"):
        fill(broken)


def test_quantised_tensors_are_refused_by_dtype(broken: Path) -> None:
    rewrite(broken, model__norm__weight=torch.zeros(48, dtype=torch.int8))
    with pytest.raises(WeightError, match=r"model\.norm\.weight.*I8"):
        fill(broken)


def test_a_directory_without_weights_or_with_a_lost_shard_is_refused(
    broken: Path, checkpoint: CheckpointStore, tmp_path: Path
) -> None:
    (broken / "model.safetensors").unlink()
    with pytest.raises(WeightError, match=r"neither model\.safetensors nor"):
        fill(broken)
    sharded = Path(shutil.copytree(checkpoint("llama3-rope-untied-sharded"), tmp_path / "sharded"))
    lost = sorted(sharded.glob("model-*.safetensors"))[0]
    lost.unlink()
    with pytest.raises(WeightError, match=f"{lost.name}.*missing"):
        fill(sharded)


def test_a_buffer_that_is_too_small_is_refused(checkpoint: CheckpointStore) -> None:
    shape = read_shape(checkpoint("llama"))
    buffer = memoryview(bytearray(4096))
    with pytest.raises(WeightError, match="4096 bytes"):
        load_into_slab(checkpoint("llama"), buffer, shape=shape, dtype="float32")
