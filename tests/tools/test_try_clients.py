"""What is said of the clients is read from what they wrote."""

import json
import sys
from pathlib import Path

from tools.try_clients import as_long_as_asked, measured, run_program, write_trace


def write_records(out: Path, lengths: list[int]) -> None:
    records = [
        {
            "metadata": {"conversation_id": f"session_{number:06}"},
            "metrics": {"usage_completion_tokens": {"value": length}},
        }
        for number, length in enumerate(lengths)
    ]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (out / "profile_export.jsonl").write_text(text)


def test_answers_of_another_length_than_their_row_asked_are_counted(tmp_path: Path) -> None:
    write_trace(tmp_path / "trace.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert [row["timestamp"] for row in rows] == [250 * number for number in range(24)]
    lengths = [row["output_length"] for row in rows]
    write_records(tmp_path, lengths)
    assert as_long_as_asked(tmp_path) == 24
    write_records(tmp_path, [lengths[0] + 1, *lengths[1:]])
    assert as_long_as_asked(tmp_path) == 23


def test_the_counts_of_a_report_are_told(tmp_path: Path) -> None:
    report = tmp_path / "benchmarks.json"
    totals = {"successful": 3, "errored": 1}
    report.write_text(json.dumps({"benchmarks": [{"metrics": {"request_totals": totals}}]}))
    assert measured(report) == "successful 3, errored 1"


def test_a_check_that_fails_and_a_program_that_breaks_are_both_told(tmp_path: Path) -> None:
    (tmp_path / "python").symlink_to(sys.executable)
    program = """
check("good", lambda: "two\\nlines")
check("bad", lambda: 1 / 0)
check("silent", lambda: raises(ValueError, lambda: None))
raise SystemExit("broken at the end")
"""
    found = run_program(program, tmp_path, "http://127.0.0.1:1")
    assert found[0] == ("ok", "good", "two lines")
    assert found[1][0] == "FAILED"
    assert "ZeroDivisionError" in found[1][2]
    assert "nothing was raised" in found[2][2]
    assert found[3] == ("FAILED", "program", "broken at the end")
