"""Results as files."""

from pathlib import Path

import pytest

from appliance.metrics.document import (
    Document,
    DocumentError,
    append_line,
    by_policy,
    check_output,
    read_document,
    read_lines,
    write_document,
)
from appliance.metrics.score import Summary, summarise
from tests.metrics.outcomes import outcome


def summary(policy: str = "fcfs", load: float = 1.0, *, late: float = 0.0) -> Summary:
    run = [outcome(0.1 * n, late=late, ttft=0.3 + 0.1 * n) for n in range(20)]
    return summarise(run, policy=policy, load=load, span=(0, 2), instance_seconds=8, seed=2)


def test_a_document_is_read_back_as_written(tmp_path: Path) -> None:
    document = Document(spec={"workload": "five", "loads": [0.5, 1]}, runs=(summary(), summary()))
    write_document(tmp_path / "out.json", document)
    assert read_document(tmp_path / "out.json") == document
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_a_file_that_cannot_be_written_is_told_before_the_work(tmp_path: Path) -> None:
    check_output(tmp_path / "new.json", flag="--json")
    with pytest.raises(DocumentError, match=r"^--json .*there is no directory .*name another file"):
        check_output(tmp_path / "nowhere" / "new.json", flag="--json")
    with pytest.raises(DocumentError, match=r"^--report .*is a directory"):
        check_output(tmp_path, flag="--report")


def test_what_is_no_document_is_named(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    with pytest.raises(DocumentError, match=r"out\.json"):
        read_document(file)
    file.write_text('{"spec": {}, "runs": [{"policy": 3}]}')
    with pytest.raises(DocumentError, match=r"out\.json: .*policy"):
        read_document(file)


def test_a_sweep_resumes_after_a_line_that_was_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    assert read_lines(file, Summary) == []
    append_line(file, summary())
    append_line(file, summary("edf", 2.0))
    assert [run.policy for run in read_lines(file, Summary)] == ["fcfs", "edf"]
    file.write_bytes(file.read_bytes()[:-40])
    assert [run.policy for run in read_lines(file, Summary)] == ["fcfs"]
    append_line(file, summary("srf"))
    assert [run.policy for run in read_lines(file, Summary)] == ["fcfs", "srf"]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    file.write_bytes(b"{}\n")
    append_line(file, summary())
    with pytest.raises(DocumentError, match="line 1"):
        read_lines(file, Summary)


def test_void_runs_do_not_count() -> None:
    runs = [summary("edf", 2.0), summary("edf", 1.0), summary("fcfs", late=0.2)]
    found = by_policy(runs)
    assert [run.load for run in found["edf"]] == [1.0, 2.0]
    assert "fcfs" not in found
