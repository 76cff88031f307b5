"""The live sweep: what is run, what is kept, what is made of it."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import Any

import numpy as np
import pytest
from msgspec.structs import asdict, replace

from appliance.config import from_table, load, parse_assignment
from appliance.core.types import Slo
from appliance.metrics.document import append_line
from appliance.metrics.outcome import Outcome
from appliance.metrics.score import summarise
from appliance.policy.choice import parse_choice
from appliance.workload.spec import load_spec
from tests.metrics.outcomes import outcome
from tools import sweep_kit, sweep_live
from tools.control_kit import Options, Server, running_server
from tools.sweep_kit import (
    Cores,
    LiveRun,
    Plan,
    Setup,
    batch_done,
    live_run,
    model_directory,
    num_workers,
    read_outcomes,
    read_runs,
    run_live,
    server_options,
)
from tools.sweep_parity import Pair, machine_of, summary_line
from tools.sweep_report import report
from tools.sweep_stats import Sample, by_experiment, exactly, interval, paired, ratio

SETUP = Setup(devices="paced:4@h200-8b", seconds=50.0, warm_up=5.0)
BATCH = Slo(class_name="batch", e2e=120.0)


def outcomes(share: float, *, seconds: float = 50.0, rate: float = 8.0) -> list[Outcome]:
    """Requests of two classes, of which this share of "chat" is attained, evenly in time."""
    found = []
    for place in range(int(seconds * rate)):
        at = place / rate
        if place % 4 == 0:
            found.append(outcome(at, slo=BATCH))
        else:
            late = (place * 37 % 100) >= 100 * share
            found.append(outcome(at, ttft=2.0 if late else 0.4))
    return found


def run(policy: str, rate: float, share: float, **more: Any) -> LiveRun:
    return run_of(policy, rate, outcomes(share), **more)


def run_of(policy: str, rate: float, found: Sequence[Outcome], **more: Any) -> LiveRun:
    plan = Plan(policy=policy, arrivals="poisson", load=rate, rate=rate, seed=1)
    plan = replace(plan, **more)
    summary = summarise(
        found, policy=policy, load=rate, span=(5, 50), instance_seconds=200, seed=plan.seed
    )
    return live_run(SETUP, plan, summary, found, cpu={"server": 0.2})


def bursty(policy: str, rate: float, *, until: float) -> LiveRun:
    """Everything is attained but what "chat" asked for from 20 s on."""
    late = [
        outcome(one.at, ttft=2.0) if 20 <= one.at < until and one.class_name == "chat" else one
        for one in outcomes(1.0)
    ]
    return run_of(policy, rate, late)


def test_a_paced_model_has_the_positions_asked_for_and_the_files_of_the_bundled_one(
    tmp_path: Path,
) -> None:
    place = model_directory(16384, parent=tmp_path)
    assert json.loads((place / "config.json").read_text())["max_position_embeddings"] == 16384
    assert (place / "tokenizer.json").read_bytes()
    assert model_directory(16384, parent=tmp_path) == place


@pytest.mark.parametrize(
    ("word", "name", "roles"),
    [
        ("fcfs", "fcfs", "mixed,mixed,mixed,mixed"),
        ("fcfs@1P3D", "fcfs", "prefill,decode,decode,decode"),
        ("fcfs@auto", "fcfs", "auto"),
        ("all-mixed{chunk=512}", "all-mixed", "mixed,mixed,mixed,mixed"),
    ],
)
def test_a_word_becomes_a_configuration_that_the_server_takes(
    word: str, name: str, roles: str
) -> None:
    plan = Plan(policy=word, arrivals="poisson", load=1, rate=10, seed=0)
    options = server_options(SETUP, plan, model="tiny-tasks")
    overrides: dict[str, dict[str, Any]] = {}
    for assignment in options.assignments:
        section, key, value = parse_assignment(assignment)
        overrides.setdefault(section, {})[key] = value
    config = load(None, overrides)
    assert (config.policy.name, config.roles.initial) == (name, roles)
    assert config.policy.settings == parse_choice(word).settings
    assert config.batch.max_num_seqs == 256
    assert set(config.slo) == {"default", *(one.name for one in load_spec("five").classes)}
    assert from_table({}).queue.max_requests < config.queue.max_requests


def test_the_number_of_workers_is_read_from_the_devices() -> None:
    assert [num_workers(word) for word in ("cpu:2", "paced:8@h200-8b")] == [2, 8]


def test_blocks_add_up_to_what_was_offered_and_attained() -> None:
    found = run("fcfs", 8.0, 0.7)
    assert len(found.blocks) == 9
    pairs = [pair for block in found.blocks for pair in block.counts.values()]
    assert sum(pair[0] for pair in pairs) == found.offered
    assert sum(pair[1] for pair in pairs) == found.attained


def test_a_run_with_changes_says_how_it_recovered() -> None:
    found = run("fcfs", 8.0, 0.99, arrivals="steps:20x3,30x0.5")
    assert [one.change for one in found.recoveries] == [20.0]
    assert len(found.piece_goodput) == 2


def test_batch_is_done_when_its_last_token_has_come() -> None:
    done = [outcome(10.0), outcome(9.0, slo=BATCH, ttft=20.0, tpot=0.0)]
    assert batch_done(done) == pytest.approx(19.0)
    assert batch_done([*done, outcome(9.5, slo=BATCH, ttft=None)]) is None


def test_a_sweep_goes_on_after_what_counts(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    kept = run("fcfs", 8.0, 0.7)
    append_line(file, kept)
    append_line(file, replace(run("edf", 8.0, 0.7), void=True))
    with file.open("ab") as end:
        end.write(b'{"policy": "srf", "cut')
    assert read_runs(file) == [kept]
    append_line(file, run("srf", 8.0, 0.7))
    assert [one.policy for one in read_runs(file)] == ["fcfs", "srf"]


def test_plans_are_load_by_load_with_more_seeds_last(monkeypatch: pytest.MonkeyPatch) -> None:
    words = (
        "sweep --out x.jsonl --devices paced:4 --policies fcfs,edf --reference 10"
        " --arrivals poisson,phases:9:chat,code,gamma:4 --loads 0.5,1 --seeds 1 --more-seeds 2"
        " --more-at 1"
    )
    monkeypatch.setattr(sys, "argv", ["sweep", *words.split()])
    options = sweep_live._options()
    assert options.arrivals == ("poisson", "phases:9:chat,code", "gamma:4")
    plans = list(sweep_live._plans(options, SETUP))
    assert len(plans) == len({plan.key for plan in plans}) == 2 * 3 * 2 + 2 * 3
    assert [plan.rate for plan in plans[:12]] == [5.0] * 6 + [10.0] * 6
    assert [plan.policy for plan in plans[:2]] == ["fcfs", "edf"]
    assert {plan.seed for plan in plans[12:]} == {2}


def test_a_sweep_goes_on_with_the_same_setup_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "runs.jsonl"

    def describe(*more: str) -> None:
        words = f"sweep --out {out} --devices paced:4 --policies fcfs --reference 10"
        monkeypatch.setattr(sys, "argv", ["sweep", *words.split(), *more])
        options = sweep_live._options()
        sweep_live._describe(options, sweep_live._setup(options))

    describe()
    describe("--client-cores", "0")
    for more, name in (
        (("--set", "queue.max_requests=5"), "assignments"),
        (("--drain", "5"), "drain"),
        (("--reference", "11"), "reference"),
        (("--devices", "cpu:4"), "devices"),
    ):
        with pytest.raises(SystemExit, match=f"{name} = .*name another file"):
            describe(*more)
    path = tmp_path / "runs.setup.json"
    older = json.loads(path.read_text())
    for name in ("drain", "assignments", "workload_digest", "max_num_seqs"):
        del older[name]
    path.write_text(json.dumps(older))
    describe("--set", "queue.max_requests=5", "--drain", "5")


def test_the_simulator_refuses_a_setup_that_it_cannot_have() -> None:
    setup = {"devices": "paced:4", "positions": 4096, "max_num_seqs": 256, "max_batch_tokens": 2048}
    assert machine_of(setup).max_num_seqs == 256
    assert machine_of({**setup, "assignments": ["batch.max_num_seqs=8"]}).max_num_seqs == 8
    with pytest.raises(SystemExit, match=r"--set queue\.max_requests=5.*does not take"):
        machine_of({**setup, "assignments": ["queue.max_requests=5"]})


def test_equal_policies_have_a_ratio_of_one_without_doubt() -> None:
    shares = {8.0: 1.0, 16.0: 0.93, 24.0: 0.6}
    sample = Sample(
        [run(policy, rate, share) for policy in ("a", "b") for rate, share in shares.items()],
        resamples=100,
    )
    ours, theirs = (sample.capacities(policy, "worst", 0.9) for policy in ("a", "b"))
    assert 16 < ours.rate < 24
    found = ratio(ours, theirs)
    assert found.words == "1.00 [1.00, 1.00]"
    spread = interval(ours)
    assert spread.low < spread.value < spread.high


def test_seeds_are_pooled_and_the_worst_class_is_that_of_the_pool() -> None:
    runs = [run("a", 8.0, 0.8), run("a", 8.0, 0.6, seed=2)]
    sample = Sample(runs, resamples=10)
    chat = [one.per_class["chat"] for one in runs]
    pooled = sum(one.attained for one in chat) / sum(one.offered for one in chat)
    assert sample.attainment("a", 8.0, "worst")[0] == pytest.approx(pooled)


def test_an_interval_is_as_wide_as_blocks_differ() -> None:
    steady, wide = (
        interval(exactly(Sample([one]).attainment("a", 8.0, "overall")))
        for one in (run("a", 8.0, 0.7), bursty("a", 8.0, until=30))
    )
    assert steady.high - steady.low < 0.05
    assert wide.high - wide.low > 0.25
    assert np.isfinite(wide.value)


def test_a_bound_from_resamples_that_failed_nowhere_says_so() -> None:
    """Two of nine blocks are bad at the larger rate: a tenth of the resamples has neither."""
    sample = Sample([run("a", 8.0, 1.0), bursty("a", 16.0, until=30)])
    found = sample.capacities("a", "worst", 0.9)
    assert not found.at_least
    assert 8 < found.rate < 16
    bounds = interval(found)
    assert (bounds.low_mark, bounds.high_mark, bounds.high) == ("", "≥ ", 16.0)
    assert bounds.bounds(1).endswith(", ≥ 16.0]")
    steady = Sample([run("a", 8.0, 1.0), run("a", 16.0, 1.0)]).capacities("a", "worst", 0.9)
    assert interval(steady).words == "16.00 [≥ 16.00, ≥ 16.00]"
    assert ratio(found, steady).low_mark == "≤ ", "what is below may be more"


def test_resamples_in_which_the_rival_holds_nothing_count() -> None:
    """One block of nine is bad at the smallest rate: drawn twice, the rival is below 90 % there."""
    sample = Sample(
        [
            *(run("a", rate, share) for rate, share in ((8.0, 1.0), (16.0, 0.5))),
            *(bursty("b", 8.0, until=24), run("b", 16.0, 0.5)),
        ]
    )
    ours, theirs = (sample.capacities(one, "worst", 0.9) for one in ("a", "b"))
    nothing = float(np.mean(theirs.least == 0))
    assert 0.1 < nothing < 0.5
    assert not theirs.nothing
    found = ratio(ours, theirs)
    assert found.high_mark == "≥ "
    assert np.isfinite(found.high)
    assert found.high >= found.value > 1
    assert interval(theirs).bounds(1).startswith("[≤ 8.0, ")


def test_only_requests_that_all_policies_met_are_compared_and_the_rest_is_named() -> None:
    old = replace(run("a", 8.0, 0.1), when=1.0)
    runs = [
        run("a", 8.0, 1.0), run("a", 8.0, 0.7, seed=2), run("b", 8.0, 0.9), old,
        run("a", 16.0, 0.8), run("b", 16.0, 0.8, seed=2), run("c", 16.0, 0.8, seed=2),
        run("c", 24.0, 0.8, seed=3),
    ]  # fmt: skip
    kept, words = paired(runs)
    assert [(one.policy, one.rate, one.seed) for one in kept] == [
        ("a", 8.0, 1), ("b", 8.0, 1), ("b", 16.0, 2), ("c", 16.0, 2), ("c", 24.0, 3),
    ]  # fmt: skip
    assert kept[0] is runs[0], "of a run that was made twice the later one"
    assert [line.partition(" (")[0] for line in words] == [
        "a at 8/s, seed 2", "a at 16/s, seed 1", "runs that were made again later: 1",
    ]  # fmt: skip
    text = "\n".join(report(runs))
    assert "Left out: a at 8/s, seed 2" in text
    assert paired(kept) == (kept, [])


def test_runs_on_other_devices_are_another_table() -> None:
    runs = [run("a", 8.0, 1.0), replace(run("a", 8.0, 0.2), devices="cpu:2")]
    assert list(by_experiment(runs)) == ["poisson, paced:4@h200-8b", "poisson, cpu:2"]
    assert list(by_experiment(runs[:1])) == ["poisson"]
    runs[1] = replace(runs[1], devices=runs[0].devices, workload="other")
    assert [len(group) for group in by_experiment(runs).values()] == [1, 1]
    text = "\n".join(report(runs))
    assert text.count("| a | 100.0% |") == 2, "worst class and all requests of the first table"


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        ((1.0, 1.0), (1.0, 1.0), "undecided, neither failed: 1.00 [?, ?]"),
        ((1.0, 0.5), (1.0, 1.0), "at most 0.6"),
        ((1.0, 1.0), (1.0, 0.5), "at least 1.6"),
        ((1.0, 0.5), (0.4, 0.3), "no rival holds it at any load"),
        ((0.5, 0.4), (0.4, 0.3), "neither holds it at any load"),
    ],
)
def test_a_comparison_says_what_is_known_and_no_more(
    ours: tuple[float, float], theirs: tuple[float, float], words: str
) -> None:
    runs = [
        run(policy, rate, share)
        for policy, shares in (("hyperflexis", ours), ("edf", theirs))
        for rate, share in zip((8.0, 16.0), shares, strict=True)
    ]
    (line,) = [row for row in report(runs) if row.startswith("- worst class at 90%: ")]
    assert words in line
    assert ("the rival failed nowhere" in line) == words.startswith("at most")


def test_the_report_names_the_best_rival_and_marks_where_the_subject_is_under_it() -> None:
    runs = [
        *(run("hyperflexis@auto", rate, share) for rate, share in ((8, 1.0), (16, 0.6), (24, 0.5))),
        *(run("edf", rate, share) for rate, share in ((8, 1.0), (16, 0.98), (24, 0.4))),
        *(run("round-robin", rate, share) for rate, share in ((8, 1.0), (16, 0.3), (24, 0.1))),
    ]
    text = "\n".join(report(runs))
    assert "best rival: edf" in text
    marked = [line for line in text.splitlines() if "minus best rival" in line]
    cells = [line.split("|") for line in marked]
    assert all("**" in row[3] and "**" not in row[4] for row in cells)
    assert "hyperflexis@auto against round-robin" in text


def test_the_report_of_an_overload_compares_with_saturation() -> None:
    steady = run("edf", 8.0, 1.0)
    over = run("edf", 8.0, 0.5, arrivals="steps:20x3,30x0.5")
    text = "\n".join(report([steady, over]))
    text = text.partition("## Arrivals: steps")[2]
    (line,) = [row for row in text.splitlines() if row.startswith("| edf | 8 |")]
    under = over.piece_goodput[0]
    assert f"| {steady.goodput:.1f} | {under:.1f} | {under / steady.goodput:.2f} |" in line


def test_pictures_are_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from tools.sweep_plots import write_pictures

    kinds = ("poisson", "phases:10")
    runs = [
        run(policy, rate, 0.9, arrivals=arrivals)
        for policy in ("edf", "hyperflexis")
        for rate in (8.0, 16.0)
        for arrivals in kinds
    ]
    paths = write_pictures(runs, tmp_path / "pictures")
    assert {path.name for path in paths} == {
        "sweep-poisson.png", "sweep-phases-10.png", "time-phases-10.png",
    }  # fmt: skip
    assert all(path.stat().st_size > 5000 for path in paths)


def test_a_difference_is_judged_beside_what_chance_allows() -> None:
    pair = Pair(name="chat", live=(60, 100), simulated=(69, 100))
    assert pair.difference == pytest.approx(0.09)
    assert pair.chance == pytest.approx(0.1326, abs=1e-3)
    whole = Pair(name="all", live=(160, 200), simulated=(164, 200))
    words = summary_line([whole, pair])
    assert words.startswith("0 of 1 classes at 1 points within 5 points (1 within that or chance)")


SHORT = Plan(policy="fcfs", arrivals="poisson", load=1.0, rate=4.0, seed=1)


@pytest.mark.procs
def test_a_run_is_a_server_a_client_and_a_line(tmp_path: Path) -> None:
    found = run_live(short_setup(), SHORT, outcomes_directory=tmp_path / "outcomes")
    assert (found.policy, found.arrivals, found.rate) == ("fcfs", "poisson", 4.0)
    assert found.offered > 0
    assert found.failed == 0
    assert found.instance_seconds > 0
    (file,) = (tmp_path / "outcomes").iterdir()
    kept = read_outcomes(file)
    assert sum(0.5 <= one.at < 3.0 for one in kept) == found.offered
    assert asdict(found)["devices"] == "paced:1@h200-8b"


@pytest.mark.procs
def test_a_run_whose_server_dies_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def dying(options: Options, *, num_workers: int) -> Iterator[Server]:
        with running_server(options, num_workers=num_workers) as server:
            timer = Timer(2.0, server.process.kill)
            timer.start()
            yield server
            timer.cancel()

    monkeypatch.setattr(sweep_kit, "running_server", dying)
    with pytest.raises(SystemExit, match="the server has ended with -9 during the run"):
        run_live(short_setup(), SHORT, outcomes_directory=tmp_path / "outcomes")
    assert not (tmp_path / "outcomes").exists()


def short_setup() -> Setup:
    cores = tuple_of_cores()
    return replace(
        SETUP,
        devices="paced:1@h200-8b",
        seconds=3.0,
        warm_up=0.5,
        drain=30.0,
        cores=Cores(server=cores, workers=cores, client=cores),
    )


def tuple_of_cores() -> tuple[int, ...]:
    import os

    return tuple(os.sched_getaffinity(0))
