"""Who may import whom, and what the asyncio process never loads."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "appliance"
PURE = {"core", "policy", "workload", "metrics", "sim"}


def contracts() -> dict[str, dict[str, object]]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return {entry["id"]: entry for entry in settings["tool"]["importlinter"]["contracts"]}


def packages() -> set[str]:
    return {path.parent.name for path in PACKAGE.glob("*/__init__.py")}


def loaded_by(statement: str) -> set[str]:
    """Top-level modules in a fresh interpreter after `statement`."""
    script = f"import sys; {statement}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_every_pure_package_is_under_the_contract_of_purity() -> None:
    pure = contracts()["pure"]
    assert pure["source_modules"] == [f"appliance.{name}" for name in sorted(PURE & packages())]
    forbidden = pure["forbidden_modules"]
    assert isinstance(forbidden, list)
    assert {"asyncio", "time", "datetime", "random", "threading", "torch"} <= set(forbidden)


def test_every_package_but_worker_and_modeling_is_kept_from_modeling_and_torch() -> None:
    others = packages() - {"worker", "modeling"}
    by_modeling = contracts()["modeling-above"]["source_modules"]
    assert isinstance(by_modeling, list)
    assert {f"appliance.{name}" for name in others} <= set(by_modeling)
    by_torch = contracts()["no-torch"]["source_modules"]
    assert isinstance(by_torch, list)
    assert {f"appliance.{name}" for name in others - PURE} <= set(by_torch)


def test_layers_name_every_package() -> None:
    layers = contracts()["layers"]
    assert layers["exhaustive"] is True
    assert layers["exhaustive_ignores"] == ["modeling"]


@pytest.mark.parametrize("module", ["core", "policy", "live", "api", "config", "cli", "serve"])
def test_the_serving_process_imports_no_torch(module: str) -> None:
    names = [f"appliance.{module}"]
    if (PACKAGE / module).is_dir():
        stems = {path.stem for path in (PACKAGE / module).glob("[!_]*.py")}
        stems.discard("grammar_check")  # the program of a process of its own, never of the server
        names += [f"appliance.{module}.{stem}" for stem in sorted(stems)]
    loaded = loaded_by(f"import {', '.join(names)}")
    assert not loaded & {"torch", "transformers", "numpy", "appliance.api.grammar_check"}


def test_the_command_line_is_light() -> None:
    loaded = loaded_by("import appliance.cli; appliance.cli._parser()")
    assert not loaded & {"aiohttp", "rich", "tokenizers", "uvloop", "prometheus_client", "jinja2"}


def test_the_paced_engine_loads_no_torch() -> None:
    loaded = loaded_by("import appliance.worker.main, appliance.worker.paced_engine")
    assert "torch" not in loaded
