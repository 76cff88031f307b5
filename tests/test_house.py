"""Habits of the house that no other tool checks."""

import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def settings() -> dict[str, Any]:
    return tomllib.loads(PYPROJECT)


def text_files() -> Iterator[tuple[str, str]]:
    """Name and text of every file that is, or is about to be, under version control."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout: there is no list of the project's own files")
    for name in listed.stdout.decode().split("\0"):
        path = ROOT / name
        if name and path.is_file() and path.suffix not in {".safetensors", ".png", ".gz"}:
            yield name, path.read_text(encoding="utf-8", errors="replace")


def found_in(pattern: str, *, suffix: str = "", below: str = "") -> list[str]:
    expression = re.compile(pattern)
    return [
        f"{name}:{number}"
        for name, text in text_files()
        if name.endswith(suffix) and name.startswith(below) and name != "tests/test_house.py"
        for number, line in enumerate(text.splitlines(), 1)
        if expression.search(line)
    ]


def readme_commands() -> list[str]:
    """The shell blocks of the README's section on setting up."""
    text = (ROOT / "README.md").read_text()
    section = text.split("## Set up", 1)[1].split("\n## ", 1)[0]
    return [block.strip() for block in re.findall(r"```sh\n(.*?)```", section, re.DOTALL)]


def test_no_unfinished_work_is_called_done() -> None:
    assert not found_in(r"\b(TODO|FIXME|XXX)\b|NotImplementedError", suffix=".py")


def test_no_error_is_swallowed_unseen() -> None:
    bare = re.compile(
        r"^\s*except( Exception| BaseException)?:\s*(#.*)?\n\s*pass\b|^\s*except:", re.M
    )
    ours = (entry for entry in text_files() if entry[0].startswith(("appliance/", "tools/")))
    assert not [name for name, text in ours if name.endswith(".py") and bare.search(text)]


def test_nothing_received_is_unpickled_and_no_foreign_code_is_trusted() -> None:
    pattern = r"\bpickle\b.*import|import.*\bpickle\b|allow_pickle|trust_remote_code *= *True"
    assert not found_in(pattern, suffix=".py", below="appliance/")
    assert not found_in(r"weights_only *= *False", suffix=".py")


def test_no_path_of_a_machine_and_no_host_of_a_registry_is_written_down() -> None:
    assert not found_in(r"(^|[^A-Za-z0-9_.])/(work|farm|home/\w+|root|Users)/")
    hosts = ("python" + "hosted", "pypi" + r"\.org", "download" + r"\.pytorch", "npmjs" + r"\.")
    assert not found_in("|".join(hosts))


def test_the_readme_has_two_commands_of_one_line_and_the_second_is_what_ci_runs() -> None:
    commands = readme_commands()
    assert len(commands) == 2
    assert all("\n" not in command for command in commands)
    assert commands[0].endswith("appliance start")
    script = (ROOT / ".ci/run").read_text()
    assert script.splitlines()[-1] == commands[1]


def test_both_commands_install_the_same_pinned_torch_first() -> None:
    pins = [re.search(r"pip install (torch==[\d.]+) -e", command) for command in readme_commands()]
    assert all(pins)
    assert len({pin[1] for pin in pins if pin}) == 1


def test_every_dependency_has_a_line_of_reason() -> None:
    project = settings()["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {re.split(r"[<>=\[ ]", entry)[0] for group in groups for entry in group}
    reasons = (ROOT / "docs/adr/0002-dependencies.md").read_text()
    assert not {name for name in names if f"| {name} |" not in reasons}


def test_every_ignored_rule_has_its_reason() -> None:
    lists = re.findall(r"\[tool\.ruff\.lint.*?\](.*?)(?=\n\[tool|\n# ---)", PYPROJECT, re.DOTALL)
    ignored = [
        line
        for block in lists
        for line in block.splitlines()
        if re.search(r'^\s*("[A-Z]+\d+",|".*" = \[")', line)
    ]
    assert len(ignored) > 5
    assert not [line for line in ignored if "#" not in line]


def test_decisions_are_numbered_without_gaps_and_have_the_same_sections() -> None:
    records = sorted((ROOT / "docs/adr").glob("*.md"))
    assert len(records) >= 2
    assert [path.name[:4] for path in records] == [f"{n:04d}" for n in range(1, len(records) + 1)]
    wanted = ["Context", "Decision", "Alternatives", "Consequences", "How we would notice"]
    for path in records:
        headings = re.findall(r"^## (.+)$", path.read_text(), re.MULTILINE)
        assert [h for h in wanted if not any(x.startswith(h) for x in headings)] == [], path.name


def test_tests_mirror_the_sources() -> None:
    known = {path.name for path in (ROOT / "appliance").iterdir() if path.is_dir()}
    known |= {"parity", "faults", "gpu", "journals", "e2e", "tools", "__pycache__", "data"}
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()}
    assert not folders - known


def test_the_changelog_has_an_unreleased_part() -> None:
    assert "\n## [Unreleased]\n" in (ROOT / "CHANGELOG.md").read_text()
