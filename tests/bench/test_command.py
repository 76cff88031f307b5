"""The command itself: what it measures, writes, skips and ends with."""

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from appliance.bench.command import main
from appliance.metrics import score
from appliance.metrics.document import read_document
from tests.bench.misbehaving_server import Stub

WORKLOAD = """
name = "small"
warm_up_seconds = 0.2
[[class]]
name = "a"
share = 3
lengths = { prompt = 20, output = 4 }
ttft_ms = 5000
[[class]]
name = "b"
share = 1
lengths = { prompt = 20, output = 4 }
"""


@pytest.fixture
def workload(tmp_path: Path) -> str:
    """A file of a small workload."""
    path = tmp_path / "small.toml"
    path.write_text(WORKLOAD)
    return str(path)


@pytest.fixture
def relative_workload(tmp_path: Path) -> str:
    """The same with words for relative targets."""
    path = tmp_path / "relative.toml"
    words = 'ttft_ms = 5000\nrelative_ttft = "loose"\nrelative_tpot = "loose"'
    path.write_text(WORKLOAD.replace("ttft_ms = 5000", words))
    return str(path)


@pytest.fixture
def trace(tmp_path: Path) -> str:
    """Eight requests in a second with a class of their own and a shared block of eight tokens."""
    path = tmp_path / "trace.jsonl"
    rows = [
        {
            "arrival_s": place / 8,
            "prompt_tokens": 16,
            "output_tokens": 3,
            "prefix_ids": [1, 2 + place],
            "class": "own",
            "slo": {"ttft_ms": 4000},
        }
        for place in range(8)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


async def bench(*arguments: str) -> int:
    """The command in a thread of its own, with its own event loop."""
    return await asyncio.to_thread(main, arguments)


def wait_until(happened: Callable[[], bool]) -> None:
    """Within a minute."""
    limit = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < limit
        time.sleep(0.01)


def rewrite(workload: str, text: str) -> None:
    """Another specification in the same file."""
    Path(workload).write_text(text)


def measured(workload: str, *more: str, rate: str = "20") -> Sequence[str]:
    return ("--workload", workload, "--rate", rate, "--seconds", "1", *more)


async def test_a_sweep_is_measured_and_resumed(
    workload: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    async with Stub().running() as server:
        one = ("--url", server.url, "--json", str(out), "--policy-name", "mine")
        assert await bench(*one, *measured(workload)) == 0
        first = read_document(out)
        assert [(run.load, run.policy, run.attainment) for run in first.runs] == [(20, "mine", 1)]
        assert set(first.runs[0].per_class) == {"a", "b"}
        asked = len(server.bodies)
        assert await bench(*one, *measured(workload)) == 1
        assert "--resume" in capsys.readouterr().err
        assert await bench(*one, *measured(workload, "--resume", rate="20,40")) == 0
        assert "measured before, skipped" in capsys.readouterr().out
        both = read_document(out).runs
        assert both[0] == first.runs[0]
        assert [run.load for run in both] == [20, 40]
        assert len(server.bodies) > asked


async def test_every_request_of_the_workload_is_sent_as_it_says(workload: str) -> None:
    async with Stub().running() as server:
        assert await bench("--url", server.url, *measured(workload)) == 0
        sent = [body for body in server.bodies if body["max_tokens"] == 4]
        assert sent
        assert all(len(body["prompt"]) == 20 and body["ignore_eos"] for body in sent)
        assert {body["slo"]["class"] for body in sent} == {"a", "b"}
        assert len({tuple(body["prompt"]) for body in sent}) == len(sent)


async def test_natural_ends_ask_for_more_than_any_answer_has(workload: str) -> None:
    async with Stub(max_model_len=64).running() as server:
        assert await bench("--url", server.url, "--natural", *measured(workload)) == 0
        sent = [body for body in server.bodies if body["max_tokens"] != 2]
        assert all("ignore_eos" not in body for body in server.bodies)
        assert {body["max_tokens"] for body in sent} == {44}


async def test_a_trace_is_played_with_its_own_classes_targets_and_prefixes(
    workload: str, tmp_path: Path, trace: str
) -> None:
    out = tmp_path / "out.json"
    async with Stub().running() as server:
        one = ("--url", server.url, "--workload", workload, "--trace", trace, "--warm-up", "0")
        assert await bench(*one, "--load", "2", "--json", str(out)) == 0
        sent = [body for body in server.bodies if body["max_tokens"] == 3]
        assert len(sent) == 8
        assert {body["slo"]["class"] for body in sent} == {"own"}
        assert {body["slo"]["ttft_ms"] for body in sent} == {4000.0}
        assert len({tuple(body["prompt"][:8]) for body in sent}) == 1
        assert len({tuple(body["prompt"]) for body in sent}) == 8
    (run,) = read_document(out).runs
    assert (run.load, run.offered, run.arrivals) == (2, 8, "trace")


async def test_refusals_are_counted_by_kind_and_do_not_stop_the_run(
    workload: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    async with Stub({"b": "429"}).running() as server:
        assert await bench("--url", server.url, "--json", str(out), *measured(workload)) == 0
    (run,) = read_document(out).runs
    assert run.per_class["b"].attainment == 0
    assert run.per_class["b"].missed == {"error": run.per_class["b"].offered}
    assert run.per_class["a"].attainment == 1
    assert run.note.endswith("x http_429")
    assert "http_429" in capsys.readouterr().out


async def test_a_server_that_dies_fails_the_sweep_and_the_point_is_not_kept(
    workload: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, fates = tmp_path / "out.json", tmp_path / "fates.jsonl"
    sweep = (
        "--json", str(out), "--outcomes", str(fates), "--policy-name", "mine",
        *measured(workload, rate="20,40"),
    )  # fmt: skip
    async with Stub().running() as server:
        running = asyncio.create_task(bench("--url", server.url, *sweep))
        await asyncio.to_thread(wait_until, out.exists)
        enough = len(server.bodies) + 3
        await asyncio.to_thread(wait_until, lambda: len(server.bodies) >= enough)
    assert await running == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "40 requests/s, seed 0: the server cannot be reached any more" in last
    assert "--resume" in last
    assert [run.load for run in read_document(out).runs] == [20]
    assert "refused" not in fates.read_text()
    async with Stub().running() as server:
        assert await bench("--url", server.url, "--resume", *sweep) == 0
    runs = read_document(out).runs
    assert [(run.load, run.attainment) for run in runs] == [(20, 1), (40, 1)]


@pytest.mark.parametrize(("cost", "code"), [((10.0, 14.0), 0), ((50.0, 3.0), 1)])
async def test_what_workers_cost_is_a_difference_and_never_that_of_two_servers(
    workload: str,
    tmp_path: Path,
    cost: tuple[float, float],
    code: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out.json"
    async with Stub(cost=cost).running() as server:
        found = await bench("--url", server.url, "--json", str(out), *measured(workload))
    assert found == code
    if code:
        assert "started again during the run" in capsys.readouterr().err
        assert not out.exists()
    else:
        assert [run.instance_seconds for run in read_document(out).runs] == [4.0]


async def test_a_sweep_goes_on_with_the_same_experiment_only(
    workload: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    sweep = ("--json", str(out), "--resume", *measured(workload, rate="20,30"))
    async with Stub().running() as server:
        one = ("--url", server.url, "--json", str(out))
        assert await bench(*one, *measured(workload)) == 0
        rewrite(workload, WORKLOAD.replace("share = 3", "share = 4"))
        assert await bench("--url", server.url, *sweep) == 1
        assert "shares.a = 3.0, not 4.0" in capsys.readouterr().err
        rewrite(workload, WORKLOAD.replace("output = 4", "output = 5"))
        assert await bench("--url", server.url, *sweep) == 1
        assert "lengths.a.output = 4, not 5" in capsys.readouterr().err
        rewrite(workload, WORKLOAD + "weight = 2\n")
        assert await bench("--url", server.url, *sweep) == 1
        assert "workload_digest" in capsys.readouterr().err
        rewrite(workload, WORKLOAD)
    async with Stub(model="other").running() as server:
        assert await bench("--url", server.url, *sweep) == 1
        assert "model = 'stub', not 'other'" in capsys.readouterr().err
    async with Stub().running() as server:
        assert await bench("--url", server.url, *sweep) == 0
    assert [run.load for run in read_document(out).runs] == [20, 30]


async def test_a_client_that_is_late_voids_the_run_loudly(
    workload: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The bound is put so low that any client is late."""
    monkeypatch.setattr(score, "VOID_LATENESS", -1.0)
    out = tmp_path / "out.json"
    async with Stub().running() as server:
        one = ("--url", server.url, "--json", str(out), *measured(workload))
        report = tmp_path / "out.png"
        assert await bench(*one, "--report", str(report)) == 3
        assert "VOID" in capsys.readouterr().out
        assert not report.exists()
        monkeypatch.undo()
        assert await bench(*one, "--resume") == 0, "a void run is measured again"
    assert [run.void for run in read_document(out).runs] == [False]


async def test_targets_can_be_those_of_an_unloaded_server(
    tmp_path: Path, relative_workload: str
) -> None:
    workload = relative_workload
    out = tmp_path / "out.json"
    async with Stub().running() as server:
        one = ("--url", server.url, "--calibrate", "--json", str(out))
        assert await bench(*one, *measured(workload)) == 0
        told = [body["slo"] for body in server.bodies if body.get("slo", {}).get("class") == "a"]
        assert told[-1]["ttft_ms"] != told[0]["ttft_ms"]
        assert "tpot_ms" in told[-1]
        relative = read_document(out).spec["relative"]
        assert relative["tpot0"] >= 0
        assert await bench(*one, "--resume", *measured(workload, rate="20,30")) == 0
        assert read_document(out).spec["relative"] == relative


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workload", "nowhere.toml", "--rate", "1"], "nowhere.toml"),
        (["--arrivals", "sometimes", "--rate", "1"], "poisson"),
        (["--trace", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--rate", "1", "--seconds", "3", "--warm-up", "3"], "--warm-up"),
        (["--rate", "1", "--seconds", "-3"], "--seconds"),
        (["--rate", "1", "--seconds", "inf"], "--seconds"),
        (["--rate", "1", "--drain", "inf"], "--drain"),
        (["--rate", "inf"], "--rate"),
        (["--rate", "1", "--load", "nan"], "--load"),
        (["--rate", "0.001", "--seconds", "6"], "no request is due in what counts"),
        (["--rate", "1", "--report", "out.pdf"], "--report"),
        (["--rate", "1", "--report", "nowhere/out.png"], "there is no directory"),
        (["--rate", "1", "--json", "nowhere/out.json"], "--json"),
        (["--rate", "1", "--outcomes", "."], "is a directory"),
        ([], "--rate"),
        (["--url", "ftp://nowhere", "--rate", "1"], "--url"),
    ],
)
def test_what_cannot_be_understood_is_named_before_anything_is_sent(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--url", "http://127.0.0.1:9", *arguments]) == 2
    assert words in capsys.readouterr().err
