"""The live sweep: what is run, what is kept, what is made of it."""

import sys
from pathlib import Path
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
from tools import sweep_live
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
from tools.sweep_parity import Pair, summary_line
from tools.sweep_report import report
from tools.sweep_stats import Sample, interval, ratio

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
    plan = Plan(policy=policy, arrivals="poisson", load=rate, rate=rate, seed=1)
    plan = replace(plan, **more)
    found = outcomes(share)
    summary = summarise(found, policy=policy, load=rate, span=(5, 50), instance_seconds=200)
    return live_run(SETUP, plan, summary, found, cpu={"server": 0.2})


def test_a_paced_model_has_the_positions_asked_for_and_the_files_of_the_bundled_one(
    tmp_path: Path,
) -> None:
    import json

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


def test_equal_policies_have_a_ratio_of_one_without_doubt() -> None:
    shares = {8.0: 1.0, 16.0: 0.93, 24.0: 0.6}
    sample = Sample(
        [run(policy, rate, share) for policy in ("a", "b") for rate, share in shares.items()],
        resamples=100,
    )
    ours, theirs = (sample.capacities(policy, "worst", 0.9) for policy in ("a", "b"))
    assert 16 < ours[0].rate < 24
    found = ratio(ours[1], theirs[1])
    assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)
    spread = interval(ours[1])
    assert spread.low < spread.value < spread.high


def test_seeds_are_pooled_and_the_worst_class_is_that_of_the_pool() -> None:
    runs = [run("a", 8.0, 0.8), run("a", 8.0, 0.6, seed=2)]
    sample = Sample(runs, resamples=10)
    chat = [one.per_class["chat"] for one in runs]
    pooled = sum(one.attained for one in chat) / sum(one.offered for one in chat)
    assert sample.attainment("a", 8.0, "worst")[0] == pytest.approx(pooled)


def test_an_interval_is_as_wide_as_blocks_differ() -> None:
    steady = interval(Sample([run("a", 8.0, 0.7)]).attainment("a", 8.0, "overall"))
    assert steady.high - steady.low < 0.05
    bursty = run("a", 8.0, 1.0)
    late = [outcome(one.at, ttft=2.0 if 20 <= one.at < 30 else 0.4) for one in outcomes(1.0)]
    summary = summarise(late, policy="a", load=8, span=(5, 50), instance_seconds=0)
    plan = Plan(policy="a", arrivals="poisson", load=8.0, rate=8.0, seed=1)
    bursty = live_run(SETUP, plan, summary, late, cpu={})
    wide = interval(Sample([bursty]).attainment("a", 8.0, "overall"))
    assert wide.high - wide.low > 0.3
    assert np.isfinite(wide.value)


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


@pytest.mark.procs
def test_a_run_is_a_server_a_client_and_a_line(tmp_path: Path) -> None:
    setup = replace(
        SETUP,
        devices="paced:1@h200-8b",
        seconds=3.0,
        warm_up=0.5,
        drain=30.0,
        cores=Cores(server=tuple_of_cores(), workers=tuple_of_cores(), client=tuple_of_cores()),
    )
    plan = Plan(policy="fcfs", arrivals="poisson", load=1.0, rate=4.0, seed=1)
    found = run_live(setup, plan, outcomes_directory=tmp_path / "outcomes")
    assert (found.policy, found.arrivals, found.rate) == ("fcfs", "poisson", 4.0)
    assert found.offered > 0
    assert found.failed == 0
    assert found.instance_seconds > 0
    (file,) = (tmp_path / "outcomes").iterdir()
    kept = read_outcomes(file)
    assert sum(0.5 <= one.at < 3.0 for one in kept) == found.offered
    assert asdict(found)["devices"] == "paced:1@h200-8b"


def tuple_of_cores() -> tuple[int, ...]:
    import os

    return tuple(os.sched_getaffinity(0))
