"""The bundled model answers its tasks through HTTP as its card says, with tools and long texts."""

import json
from pathlib import Path
from typing import Any

import pytest

from tools.evaluate_model import CASES
from tools.evaluate_server import answer_text, differences, evaluate_server
from tools.evaluate_server import main as evaluate

pytestmark = [pytest.mark.procs, pytest.mark.timeout(600)]


async def test_every_case_and_setting_is_answered_through_http(serve: Any) -> None:
    server = serve("--devices", "cpu:1", "--set", "devices.threads=1")
    cases = await evaluate_server(server.url, names=list(CASES), num_prompts=4, seed=2, at_once=16)
    assert {name: set(cases[name]) for name in cases} == {
        name: set(case.settings) for name, case in CASES.items()
    }
    measured = [one for settings in cases.values() for one in settings.values()]
    count = sum(one["count"] for one in measured)
    right = sum(one["count"] * one["accuracy"] for one in measured)
    assert right / count >= 0.93, cases


def test_shares_other_than_expected_are_named(
    serve: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve("--devices", "cpu:1", "--set", "devices.threads=1")
    first, expected = tmp_path / "first.json", tmp_path / "expected.json"
    fixed = [server.url, "--num-prompts", "2", "--only", "echo"]
    assert evaluate([*fixed, "--json", str(first)]) == 0
    document = json.loads(first.read_bytes())
    expected.write_text(json.dumps(document))
    assert evaluate([*fixed, "--expect", str(expected)]) == 0
    document["cases"]["echo"]["system"]["accuracy"] = 0.123
    expected.write_text(json.dumps(document))
    assert evaluate([*fixed, "--expect", str(expected)]) == 1
    assert "echo, system: " in capsys.readouterr().out
    assert differences({"add": {"single": {"count": 1, "accuracy": 1.0}}}, {}) != []


def test_calls_are_read_as_the_model_wrote_them() -> None:
    call = {"function": {"name": "stop", "arguments": '{"at":  3}'}}
    written = '<tool_call>\n{"name": "stop", "arguments": {"at": 3}}\n</tool_call>'
    assert answer_text({"content": None, "tool_calls": [call]}) == written
    assert answer_text({"content": "So.", "tool_calls": [call, call]}) == (
        f"So.\n{written}\n{written}"
    )
    assert answer_text({"content": "85"}) == "85"
