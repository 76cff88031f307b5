"""Promises of sweeps and of `appliance simulate`."""

import json
from pathlib import Path

import pytest
from msgspec.structs import replace

from appliance.cli import main
from appliance.policy.settings import PolicySettingsError
from appliance.sim.machine import parse_machine
from appliance.sim.sweep import (
    Sweep,
    calibration_of,
    items_of,
    parse_policies,
    points,
    reference_for,
    run_point,
)
from appliance.workload.spec import load_spec
from appliance.workload.trace_rows import read_trace

SMALL = ("--devices", "h200:2", "--length-scale", "0.1", "--seconds", "2")
KEYS = {
    "policy", "load", "attainment", "worst_class", "per_class", "goodput", "ttft_ms", "tpot_ms",
    "instance_seconds",
}  # fmt: skip


def a_sweep(**changes: object) -> Sweep:
    machine = parse_machine("h200:2")
    spec = replace(load_spec("five"), length_scale=0.1, max_len=2048)
    sweep = Sweep(spec=spec, machine=machine, arrivals="poisson", seconds=2.0, reference=1.0)
    return replace(replace(sweep, reference=reference_for(sweep)), **changes)


def test_every_policy_gets_the_same_requests_at_a_point_and_loads_scale_the_rate() -> None:
    sweep = a_sweep(seconds=20.0)
    one, two = (items_of(sweep, load=load, seed=1) for load in (0.5, 1.0))
    assert one == items_of(sweep, load=0.5, seed=1)
    assert len(two) == pytest.approx(20.0 * sweep.reference, rel=0.1)
    assert len(two) == pytest.approx(2 * len(one), rel=0.15)


def test_the_reference_rate_is_that_of_busy_workers() -> None:
    """More of the same workers serve as much more; half of it leaves them idle at times."""
    sweep = a_sweep()
    double = replace(sweep, machine=parse_machine("h200:4"))
    assert reference_for(double) == pytest.approx(2 * sweep.reference)
    (choice,) = parse_policies("fcfs", 2)
    (point,) = points([choice], [0.4], [0])
    result = run_point(sweep, point)
    assert 0.2 < result.extras.busy_share < 0.95
    assert result.summary.attainment > 0.95


def test_static_stands_for_every_ratio() -> None:
    words = [each.word for each in parse_policies("edf@static,fcfs,all-mixed{chunk=64}", 4)]
    assert words == ["edf@1P3D", "edf@2P2D", "edf@3P1D", "fcfs", "all-mixed{chunk=64}"]
    with pytest.raises(PolicySettingsError, match="4"):
        parse_policies("fcfs@2P3D", 4)


def test_recoveries_follow_the_changes_of_the_mix() -> None:
    sweep = a_sweep(arrivals="phases:1", seconds=4.0)
    (choice,) = parse_policies("fcfs", 2)
    result = run_point(sweep, points([choice], [0.5], [0])[0])
    assert [each.change for each in result.recoveries] == [1.0, 2.0, 3.0]


def test_relative_targets_come_from_the_profile() -> None:
    found = calibration_of(parse_machine("h200:1"))
    assert 0.003 < found.tpot0 < 0.006
    assert found.unloaded_ttft(2048) == pytest.approx(0.075, rel=0.2)


def test_the_command_writes_the_keys_and_a_report(tmp_path: Path) -> None:
    out, picture = tmp_path / "out.json", tmp_path / "out.html"
    words = ["simulate", *SMALL, "--policy", "fcfs,edf", "--load", "0.5,1"]
    assert main([*words, "--json", str(out), "--plot", str(picture), "--without", "flips"]) == 0
    document = json.loads(out.read_bytes())
    assert len(document["runs"]) == 4
    assert all(set(run) >= KEYS for run in document["runs"])
    assert {"p50", "p99"} <= set(document["runs"][0]["ttft_ms"])
    assert document["spec"]["reference_rate"] > 0
    assert document["spec"]["ablation"]["flips"] is True
    assert [point["policy"] for point in document["spec"]["points"]] == ["fcfs", "edf"] * 2
    assert "<svg" in picture.read_text()


@pytest.mark.procs
def test_the_number_of_processes_changes_nothing(tmp_path: Path) -> None:
    told = []
    for jobs in ("1", "2"):
        out = tmp_path / f"{jobs}.json"
        words = ["simulate", *SMALL, "--policy", "fcfs,edf", "--load", "0.7", "--jobs", jobs]
        assert main([*words, "--json", str(out)]) == 0
        told.append(out.read_bytes())
    assert told[0] == told[1]


def test_a_trace_is_played_at_the_rate_asked_for(tmp_path: Path) -> None:
    rows = [
        {
            "arrival_s": 0.1 * n,
            "prompt_tokens": 64,
            "output_tokens": 4,
            "prefix_ids": [1, n % 3],
        }
        for n in range(200)
    ]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(read_trace(trace)) == 200
    out = tmp_path / "out.json"
    words = ["simulate", "--devices", "h200:1", "--trace", str(trace), "--rate", "40"]
    assert main([*words, "--seconds", "3", "--json", str(out)]) == 0
    (run,) = json.loads(out.read_bytes())["runs"]
    assert run["offered_rate"] == pytest.approx(40, rel=0.05)
    assert run["arrivals"] == "trace"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--policy", "edg"], "did you mean 'edf'"),
        (["--policy", "fcfs@9P9D"], "9P9D"),
        (["--devices", "tpu:8"], "h200:8"),
        (["--load", "fast"], "--load"),
        (["--load", "0"], "--load"),
        (["--load", "1,inf"], "--load"),
        (["--load", "nan"], "--load"),
        (["--rate", "inf"], "--rate"),
        (["--seconds", "inf"], "--seconds"),
        (["--load", "1,0.00001"], "load 1e-05: no request is due in what counts"),
        (["--without", "luck"], "prefix-cache"),
        (["--workload", "six"], "six"),
        (["--arrivals", "sometimes"], "poisson"),
        (["--plot", "x.gif"], "--plot x.gif: the name must end in .html or .png"),
        (["--plot", "nowhere/x.png"], "there is no directory"),
        (["--seconds", "0"], "--seconds"),
        (["--trace", "nowhere.jsonl"], "nowhere"),
    ],
)
def test_mistakes_get_one_line_that_names_the_fix(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["simulate", *SMALL, "--json", str(tmp_path / "x.json"), *words]
    assert main(given) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1
    assert not (tmp_path / "x.json").exists()


def test_earlier_results_are_written_over_and_nothing_else_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    out.write_text('{"somebody": "else\'s"}')
    given = ["simulate", *SMALL, "--policy", "fcfs", "--load", "0.2", "--seconds", "1"]
    assert main([*given, "--json", str(out)]) == 2
    assert "holds no results; name another file" in capsys.readouterr().err
    assert out.read_text() == '{"somebody": "else\'s"}'
    out.write_text('{"spec": {}, "runs": []}')
    assert main([*given, "--json", str(out)]) == 0
    assert len(json.loads(out.read_bytes())["runs"]) == 1
