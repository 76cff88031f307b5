"""Reports: pictures and tables of a document, in one file."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import msgspec
import pytest

from appliance.bench.curves import capacities, capacity_words, worst_curve
from appliance.bench.plots import picture_of
from appliance.bench.report import BadReport, check_name, write_report
from appliance.core.types import Slo
from appliance.metrics.document import Document
from appliance.metrics.outcome import Outcome
from appliance.metrics.score import Summary, summarise

pytest.importorskip("matplotlib")

PNG = b"\x89PNG\r\n\x1a\n"
SPEC = {
    "workload": "two",
    "load_is": "requests/s",
    "server": "<tiny> & co",
    "classes": {"chat": {"ttft_ms": 100.0}, "batch": {}},
    "notes": ["a note"],
}


def outcome(index: int, name: str, *, ttft: float) -> Outcome:
    return Outcome(
        index=index, class_name=name, slo=Slo(class_name=name, ttft=0.1), prompt_tokens=5,
        wanted_tokens=2, at=float(index), sent=float(index), first=index + ttft,
        last=index + ttft + 0.02, num_tokens=2, on_time=1.0, longest_gap=0.02, finished=True,
    )  # fmt: skip


def run(load: float, *, misses: int, policy: str = "fcfs", seed: int = 0) -> Summary:
    """Ten requests of each class, of which `misses` of chat are missed."""
    made = [outcome(n, "chat", ttft=0.2 if n < misses else 0.05) for n in range(10)]
    made += [outcome(n, "batch", ttft=0.05) for n in range(10)]
    return summarise(
        made, policy=policy, load=load, span=(0, 10), instance_seconds=40.0, seed=seed,
        note="2 x http_429",
    )  # fmt: skip


SWEEP = Document(
    spec=SPEC,
    runs=tuple(
        run(load, misses=misses, policy=policy, seed=seed)
        for policy in ("fcfs", "edf")
        for load, misses in ((5.0, 0), (10.0, 1), (20.0, 6))
        for seed in (0, 1)
    ),
)
POINT = Document(spec=SPEC, runs=(run(5.0, misses=3),))
VOID = msgspec.structs.replace(run(40.0, misses=3), void=True)


@pytest.mark.parametrize("document", [SWEEP, POINT], ids=["sweep", "point"])
def test_a_page_holds_everything_and_needs_nothing_else(tmp_path: Path, document: Document) -> None:
    path = tmp_path / "out.html"
    write_report(path, document)
    text = path.read_text()
    for words in ("&lt;tiny&gt; &amp; co", "http_429", "95 % interval", "a note", "capacity"):
        assert words in text
    assert text.count("<svg") == len(picture_of(document)) >= 1
    assert "<script" not in text
    assert "src=" not in text
    for picture in text.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + picture.split("</svg>")[0] + "</svg>")


@pytest.mark.parametrize("document", [SWEEP, POINT], ids=["sweep", "point"])
def test_a_picture_is_one_png(tmp_path: Path, document: Document) -> None:
    path = tmp_path / "out.png"
    write_report(path, document)
    assert path.read_bytes().startswith(PNG)


def test_void_runs_are_told_loudly_and_are_in_no_picture(tmp_path: Path) -> None:
    document = msgspec.structs.replace(POINT, runs=(*POINT.runs, VOID))
    assert [heading for heading, _ in picture_of(document)] == ["fcfs at 5 requests/s"]
    write_report(tmp_path / "out.html", document)
    assert "VOID" in (tmp_path / "out.html").read_text()


def test_nothing_to_draw_is_named(tmp_path: Path) -> None:
    document = Document(spec=SPEC, runs=(VOID,))
    with pytest.raises(BadReport, match="no run"):
        write_report(tmp_path / "out.png", document)


def test_other_names_are_refused_before_anything_is_measured() -> None:
    with pytest.raises(BadReport, match=r"\.html or \.png"):
        check_name(Path("out.pdf"))


def test_seeds_are_pooled_and_capacity_is_read_off_the_curve() -> None:
    fcfs = [one for one in SWEEP.runs if one.policy == "fcfs"]
    curve = worst_curve(fcfs)
    assert [(share.load, share.attained, share.offered) for share in curve] == [
        (5.0, 20, 20), (10.0, 18, 20), (20.0, 8, 20),
    ]  # fmt: skip
    found = {one.policy: one for one in capacities(SWEEP)}
    assert found["fcfs"].worst[0].rate == pytest.approx(10.0)
    assert capacity_words(found["fcfs"].worst[1]).startswith("5.")
    assert capacity_words(capacities(POINT)[0].worst[0]) == "below the lowest load"
