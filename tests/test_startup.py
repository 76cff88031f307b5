"""The plan: arithmetic of memory and lengths, checked before a process starts (R20)."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from appliance.config import Config, ConfigError, load
from appliance.core.kv_layout import index_bytes
from appliance.core.model_shape import kv_slab_bytes, slab_bytes
from appliance.core.profiles import PROFILES
from appliance.devices import plan_devices
from appliance.live.checkpoint import CheckpointError
from appliance.startup import Machine, Plan, make_plan, read_machine, shown_bytes

GIB = 1024**3


def plan(
    spec: str = "cpu:2", *, free: int = 16 * GIB, cores: int = 2, **sections: dict[str, Any]
) -> Plan:
    config = load(None, sections)
    devices = plan_devices(spec, cores=cores, count_gpus=lambda: 0)
    return make_plan(config, devices, machine=Machine(cores=cores, free_bytes=free))


def refused(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        plan(*args, **kwargs)
    return str(caught.value)


def model_with(directory: Path, source: Path, **changes: Any) -> dict[str, Any]:
    """A copy of `source` whose config.json has these changes; as a [model] section."""
    shutil.copytree(source, directory, dirs_exist_ok=True)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return {"path": str(directory)}


def test_the_bundled_model_is_the_default(tiny_model: Path) -> None:
    found = plan()
    assert found.checkpoint.directory == tiny_model
    assert found.served_name == "tiny-tasks"
    assert found.dtype == "float32"
    assert found.batcher.max_model_len == found.checkpoint.shape.max_positions == 4096


def test_memory_adds_up_to_what_the_slabs_take() -> None:
    found = plan("cpu:2")
    shape = found.checkpoint.shape
    assert found.memory.weights == slab_bytes(shape, "float32")
    blocks = kv_slab_bytes(shape, "float32", num_blocks=found.num_blocks, block_tokens=16)
    assert found.memory.kv == blocks + index_bytes(found.num_blocks)
    total = found.memory.weights + 2 * (found.memory.packed + found.memory.kv)
    assert found.memory.total(2) == total <= found.machine.free_bytes


def test_copied_weights_cost_one_slab_more_for_each_worker() -> None:
    mapped, copied = (plan("cpu:2", weights={"share": share}) for share in ("map", "copy"))
    assert copied.memory.weights == copied.memory.own == mapped.memory.weights
    assert mapped.memory.own == 0
    assert copied.memory.total(2) - mapped.memory.total(2) == 2 * mapped.memory.weights


def test_automatic_kv_memory_is_bounded_by_use_and_by_a_share_of_what_is_free() -> None:
    usual = plan()
    aside = usual.memory.block + index_bytes(usual.num_blocks)
    assert usual.memory.kv - aside <= 256 * 1024**2
    few = plan(batch={"max_num_seqs": 1})
    assert few.num_blocks == 4096 // 16
    tight = plan(free=GIB // 4)
    assert 2 * tight.memory.kv <= GIB // 16


def test_kv_memory_as_asked_for_is_whole_blocks_of_it() -> None:
    found = plan(kv={"memory": "64MiB"})
    assert found.num_blocks == 64 * 1024**2 // found.memory.block


def test_host_memory_is_whole_blocks_of_it_and_counted_for_each_worker() -> None:
    without, found = plan(), plan(kv={"host_memory": "64MiB"})
    assert (without.host_blocks, without.memory.host) == (0, 0)
    assert found.host_blocks == 64 * 1024**2 // found.memory.block
    more = found.memory.total(2) - without.memory.total(2)
    assert more == 2 * found.memory.host >= 2 * found.host_blocks * found.memory.block


def test_host_memory_that_could_keep_nothing_is_refused_by_name() -> None:
    off = refused(kv={"host_memory": "64MiB", "prefix_cache": False})
    assert "kv.host_memory" in off
    assert "prefix_cache = true" in off
    assert "not one block" in refused(kv={"host_memory": 16})


def test_a_long_context_model_shrinks_to_what_fits_and_says_so(
    tmp_path: Path, tiny_model: Path
) -> None:
    model = model_with(tmp_path / "long", tiny_model, max_position_embeddings=10_000_000)
    found = plan(free=4 * GIB, model=model)
    assert found.batcher.max_model_len == found.num_blocks * 16 < 10_000_000
    assert any("model.max_model_len: auto is" in note for note in found.notes)
    words = refused(free=4 * GIB, model=model | {"max_model_len": 9_000_000})
    assert re.search(r"write kv.memory = \d+ or model.max_model_len = \d+", words)


def test_a_paced_worker_has_the_capacity_of_its_profile_and_no_weights() -> None:
    found = plan("paced:4@h100-8b")
    assert found.num_blocks == PROFILES["h100-8b"].kv_tokens // 16
    assert found.memory.weights == found.memory.packed == 0
    assert found.memory.total(4) < 64 * 1024**2


def test_R12_threads_are_one_with_float32_and_else_the_cores_shared_out() -> None:
    assert plan("cpu:2", cores=8).threads == 1
    torch = {"model": {"dtype": "bfloat16"}, "engine": {"native": "off"}}
    assert plan("cpu:2", cores=8, **torch).threads == 4
    assert plan("cpu:4", cores=2, **torch).threads == 1
    assert plan("cpu:4", cores=2, devices={"threads": 3}).threads == 3


def test_R20_kv_too_small_names_both_keys_with_values_that_work() -> None:
    words = refused(kv={"memory": "1MiB"})
    match = re.search(r"write kv.memory = (\d+) or model.max_model_len = (\d+)", words)
    assert match
    assert plan(kv={"memory": int(match[1])}).batcher.max_model_len == 4096
    shorter = plan(kv={"memory": "1MiB"}, model={"max_model_len": int(match[2])})
    assert shorter.batcher.max_model_len == int(match[2])


def test_R20_too_long_a_length_names_what_the_model_can() -> None:
    words = refused(model={"max_model_len": 5000})
    assert "model.max_model_len = 5000 (--max-model-len): tiny-tasks was built for 4096" in words
    assert "write at most 4096" in words


def test_R20_a_plan_over_the_free_memory_names_a_value_that_fits() -> None:
    words = refused(free=GIB, kv={"memory": "2GiB"})
    match = re.search(r"write kv.memory = (\d+)", words)
    assert match
    assert plan(free=GIB, kv={"memory": int(match[1])}).memory.total(2) <= GIB


def test_R20_no_room_for_the_weights_names_what_to_reduce() -> None:
    assert "free; use fewer devices" in refused(free=1024**2, kv={"memory": "256MiB"})


def test_R20_a_missing_model_names_the_setting() -> None:
    with pytest.raises(CheckpointError, match=r"\[model\] path \(--model\)"):
        plan(model={"path": "./absent"})


def test_memory_that_a_control_group_withholds_is_not_free(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    1000 kB\n")
    assert read_machine(cores=1, root=tmp_path).free_bytes == 1_024_000
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("500\n")
    assert read_machine(cores=1, root=tmp_path).free_bytes == 1_024_000
    (group / "memory.max").write_text("700\n")
    assert read_machine(cores=1, root=tmp_path).free_bytes == 200


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (999, "999 B"), (1024, "1.0 KiB"), (268_468_224, "256 MiB"), (3 * GIB, "3.0 GiB")],
)
def test_bytes_for_people(number: int, text: str) -> None:
    assert shown_bytes(number) == text


def test_defaults_plan_on_this_machine() -> None:
    machine = read_machine(cores=2)
    devices = plan_devices("cpu:1", cores=2, count_gpus=lambda: 0)
    assert make_plan(Config(), devices, machine=machine).num_blocks > 0


@pytest.mark.parametrize("name", ["", "  ", "two\nlines"])
def test_R20_a_name_that_no_request_could_use_is_refused(name: str) -> None:
    words = refused(model={"served_name": name})
    assert "(--served-model-name)" in words
    assert 'write printable text, or "auto"' in words


def test_native_kernels_are_planned_named_and_save_the_packed_copy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch = plan(engine={"native": "off"})
    assert torch.kernels.words == "torch (engine.native is off)"
    assert torch.memory.packed > 0
    found = plan()
    assert (found.memory.packed == 0) == found.kernels.native
    assert found.threads == 1
    threads = plan(devices={"threads": 2})
    assert "devices.threads is 2" in threads.kernels.words
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    without = plan()
    assert without.kernels.words.startswith("torch, slower (no C compiler found")
    assert without.memory.packed > 0
    assert 'engine.native = "required": no C compiler found' in refused(
        engine={"native": "required"}
    )


def test_R20_settings_of_the_controller_are_checked_even_when_it_is_off() -> None:
    words = refused(roles={"settings": {"dwel": 3}})
    assert words.startswith("roles.settings: ")
    assert "dwell" in words
