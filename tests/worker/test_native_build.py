"""The native kernels are built once, found again, and do without is always possible, with the
reason named."""

import ctypes
import os
import shutil
import stat
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from msgspec import structs

from appliance.worker.native import build
from appliance.worker.native.build import SOURCES, NativeUnavailable, ensure_built
from appliance.worker.torch_engine import TorchEngine
from tests.modeling.checkpoints import CheckpointStore
from tests.worker.engine_rig import Slabs, need_native

HERE = Path(build.__file__).parent


@pytest.fixture
def environ(tmp_path: Path) -> Mapping[str, str]:
    """A user with an empty cache and a compiler."""
    need_native()
    return {"PATH": os.environ["PATH"], "XDG_CACHE_HOME": str(tmp_path / "cache")}


def short_sources(directory: Path, text: str = "int answer(void) { return 42; }\n") -> Path:
    """Sources that compile at once."""
    directory.mkdir(exist_ok=True)
    for name in SOURCES:
        (directory / name).write_text("")
    (directory / SOURCES[0]).write_text(text)
    return directory


def fake_compiler(directory: Path, script: str) -> str:
    path = directory / "fakecc"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_it_is_built_once_and_found_again(environ: Mapping[str, str], tmp_path: Path) -> None:
    sources = short_sources(tmp_path / "c")
    first = ensure_built(environ=environ, sources=sources)
    second = ensure_built(environ=environ, sources=sources)
    assert (first.fresh, second.fresh) == (True, False)
    assert first.path == second.path
    assert ctypes.CDLL(str(first.path)).answer() == 42
    assert stat.S_IMODE(first.path.parent.stat().st_mode) == 0o700
    assert {path.suffix for path in first.path.parent.iterdir()} == {".so", ".lock"}


def test_another_text_compiler_or_flag_is_another_library(
    environ: Mapping[str, str], tmp_path: Path
) -> None:
    sources = short_sources(tmp_path / "c")
    first = ensure_built(environ=environ, sources=sources)
    (sources / SOURCES[1]).write_text("/* changed */\n")
    second = ensure_built(environ=environ, sources=sources)
    compiler = first.compiler.split()[0]
    third = ensure_built(environ={**environ, "CC": f"{compiler} -DX"}, sources=sources)
    assert len({first.path, second.path, third.path}) == 3


def test_many_who_come_at_once_build_it_once(environ: Mapping[str, str], tmp_path: Path) -> None:
    log = tmp_path / "log"
    real = ensure_built(environ=environ, sources=short_sources(tmp_path / "first")).compiler
    counting = fake_compiler(tmp_path, f'echo run >> "{log}"; exec {real} "$@"')
    sources = short_sources(tmp_path / "c", "int answer(void) { return 43; }\n")

    def built(_: int) -> bool:
        return ensure_built(environ={**environ, "CC": counting}, sources=sources).fresh

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(built, range(6))) == 1
    assert log.read_text().split() == ["run"]


def test_without_a_compiler_the_reason_names_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(NativeUnavailable, match="no C compiler found, looked for cc, gcc, clang"):
        ensure_built(environ={"PATH": str(tmp_path)})
    with pytest.raises(NativeUnavailable, match=r"looked for mycc \(from CC\)"):
        ensure_built(environ={"PATH": str(tmp_path), "CC": "mycc -m64"})


def test_a_compiler_that_fails_is_quoted(environ: Mapping[str, str], tmp_path: Path) -> None:
    sources = short_sources(tmp_path / "c", "int answer(void) { return nothing; }\n")
    with pytest.raises(NativeUnavailable, match=r"failed: .*error.*nothing"):
        ensure_built(environ=environ, sources=sources)
    broken = fake_compiler(tmp_path, "exit 7")
    with pytest.raises(NativeUnavailable, match="fakecc failed: exit status 7"):
        ensure_built(environ={**environ, "CC": broken}, sources=sources)
    directory = tmp_path / "cache/appliance/kernels"
    assert [path.name for path in directory.iterdir()] == ["build.lock"]


def test_a_compiler_that_hangs_is_given_up(
    environ: Mapping[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "BUILD_SECONDS", 0.2)
    hanging = fake_compiler(tmp_path, "exec sleep 60")
    with pytest.raises(NativeUnavailable, match="took over"):
        ensure_built(environ={**environ, "CC": hanging}, sources=short_sources(tmp_path / "c"))


def test_a_compiler_that_does_not_know_the_processor_builds_without(
    environ: Mapping[str, str], tmp_path: Path
) -> None:
    real = ensure_built(environ=environ, sources=short_sources(tmp_path / "first")).compiler
    simple = fake_compiler(
        tmp_path, f'case "$*" in *native*) echo "error: unknown"; exit 1;; esac; exec {real} "$@"'
    )
    sources = short_sources(tmp_path / "c")
    assert ensure_built(environ={**environ, "CC": simple}, sources=sources).fresh


def test_a_directory_that_others_could_write_is_not_trusted(
    environ: Mapping[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "cache/appliance/kernels"
    shared.mkdir(parents=True)
    shared.chmod(0o777)
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    sources = short_sources(tmp_path / "c")
    found = ensure_built(environ=environ, sources=sources)
    assert found.path.parent.parent == tmp_path / "tmp"
    found.path.parent.chmod(0o777)
    with pytest.raises(NativeUnavailable, match="not a writable directory of this user alone"):
        ensure_built(environ=environ, sources=sources)


def test_the_sources_compile_without_a_warning(environ: Mapping[str, str], tmp_path: Path) -> None:
    command = [*build.find_compiler(environ), *build.FLAGS, "-Wall", "-Wextra", "-Werror", "-O0"]
    target = ["-fsyntax-only", str(HERE / SOURCES[0])]
    done = subprocess.run([*command, *target], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_list_of_sources_is_whole() -> None:
    assert {path.name for path in HERE.iterdir() if path.suffix in {".c", ".h"}} == set(SOURCES)


def test_the_engine_goes_on_in_torch_and_says_why(
    checkpoint: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slabs = Slabs(checkpoint("llama"))
    assert slabs.start().native == "auto"
    threads = TorchEngine.open(
        structs.replace(slabs.start(), threads=2), weights_fd=slabs.weights, kv_fd=slabs.kv
    )
    assert threads.info.notes[-1] == (
        "no native kernels: devices.threads is 2, the native kernels run on one thread"
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert shutil.which("cc") is None
    engine = slabs.engine()
    assert engine.info.notes[0].startswith("torch products")
    assert engine.info.notes[-1].startswith("no native kernels: no C compiler found")
    slabs.native = "required"
    with pytest.raises(ValueError, match=r"engine\.native is required, but .*no C compiler"):
        slabs.engine()
    slabs.native = "off"
    assert slabs.engine().info.notes[-1] == "engine.native is off"
    slabs.close()


def test_a_library_that_cannot_be_loaded_is_done_without(
    checkpoint: CheckpointStore, environ: Mapping[str, str], tmp_path: Path
) -> None:
    good = ensure_built(environ=environ, sources=short_sources(tmp_path / "c"))
    slabs = Slabs(checkpoint("llama"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("appliance.worker.torch_engine.ensure_built", lambda: good)
        notes = slabs.engine().info.notes
    assert notes[-1].startswith("no native kernels: the built kernels cannot be loaded")
    slabs.close()
