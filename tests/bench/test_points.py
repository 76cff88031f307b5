"""Which runs a sweep has, what counts as done, and what is never written over."""

from math import inf, nan
from pathlib import Path

import msgspec
import pytest

from appliance.bench.points import (
    Offer,
    Point,
    earlier_runs,
    is_done,
    items_of,
    points_of,
    recorded_rate,
)
from appliance.bench.session import only_new
from appliance.bench.target import BenchError
from appliance.metrics.document import Document, write_document
from appliance.metrics.score import Summary, summarise
from appliance.workload.spec import load_spec
from appliance.workload.trace_rows import TraceRow
from tests.metrics.outcomes import outcome

FIVE = Offer(spec=load_spec("five"), seconds=20.0, warm_up=5.0, arrivals="poisson")
ROWS = tuple(
    TraceRow(prompt_tokens=10, output_tokens=5, arrival_s=float(second)) for second in range(21)
)
TRACE = Offer(spec=load_spec("five"), seconds=None, warm_up=0.0, arrivals="poisson", rows=ROWS)


def summary(load: float, *, seed: int = 0, policy: str = "p", void: bool = False) -> Summary:
    made = summarise(
        [outcome()], policy=policy, load=load, span=(0, 1), instance_seconds=0, seed=seed
    )
    return msgspec.structs.replace(made, void=void)


def test_a_sweep_is_every_rate_with_every_seed() -> None:
    points = points_of(FIVE, rates=(5, 10), loads=(), seeds=(0, 1))
    assert [(point.load, point.rate, point.seed) for point in points] == [
        (5, 5, 0), (5, 5, 1), (10, 10, 0), (10, 10, 1),
    ]  # fmt: skip


def test_loads_multiply_one_rate() -> None:
    points = points_of(FIVE, rates=(8,), loads=(0.5, 2), seeds=(0,))
    assert [(point.load, point.rate) for point in points] == [(0.5, 4), (2, 16)]


def test_a_trace_is_played_at_its_own_speed_a_multiple_or_a_rate() -> None:
    assert recorded_rate(ROWS) == 1.0
    (plain,) = points_of(TRACE, rates=(), loads=(), seeds=(0,))
    assert (plain.rate, plain.speed) == (None, 1.0)
    (twice,) = points_of(TRACE, rates=(), loads=(2,), seeds=(0,))
    (rate,) = points_of(TRACE, rates=(2,), loads=(), seeds=(0,))
    assert twice.speed == rate.speed == 2.0
    items, span = items_of(TRACE, twice)
    assert len(items) == 21
    assert span[1] == pytest.approx(10.0, abs=0.1)


@pytest.mark.parametrize(
    ("offer", "rates", "loads"),
    [(FIVE, (), ()), (FIVE, (), (1.0,)), (FIVE, (5.0, 6.0), (1.0,)), (FIVE, (-1.0,), ()),
     (FIVE, (inf,), ()), (FIVE, (nan,), ()), (FIVE, (5.0,), (inf,)), (TRACE, (), (nan,)),
     (TRACE, (1.0,), (1.0,))],
)  # fmt: skip
def test_what_does_not_say_how_fast_is_refused(
    offer: Offer, rates: tuple[float, ...], loads: tuple[float, ...]
) -> None:
    with pytest.raises(BenchError, match="--rate"):
        points_of(offer, rates=rates, loads=loads, seeds=(0,))


def test_the_same_point_offers_the_same_requests_and_warm_up_does_not_count() -> None:
    (point,) = points_of(FIVE, rates=(10,), loads=(), seeds=(3,))
    items, span = items_of(FIVE, point)
    assert items == items_of(FIVE, point)[0]
    assert span == (5.0, 20.0)
    assert items[0].at < 5.0
    assert items[-1].at < 20.0


def test_a_run_that_is_all_warm_up_is_refused() -> None:
    (point,) = points_of(TRACE, rates=(), loads=(100,), seeds=(0,))
    with pytest.raises(BenchError, match="--warm-up"):
        items_of(msgspec.structs.replace(TRACE, warm_up=5.0), point)


def test_a_trace_that_ends_early_ends_what_counts() -> None:
    """20 s of it in a run of 60: rates are per second of the trace."""
    (point,) = points_of(TRACE, rates=(), loads=(1,), seeds=(0,))
    items, span = items_of(msgspec.structs.replace(TRACE, seconds=60.0), point)
    assert len(items) == 21
    assert span == (0.0, pytest.approx(20.0, abs=0.1))


def test_a_run_in_which_nothing_counts_is_refused() -> None:
    (point,) = points_of(FIVE, rates=(0.001,), loads=(), seeds=(0,))
    with pytest.raises(BenchError, match=r"0\.001 requests/s.*no request is due.*5 to 20 s"):
        items_of(FIVE, point)


def test_a_point_is_done_when_a_run_of_it_counts() -> None:
    point = Point(load=5, rate=5, speed=1, seed=1)
    assert is_done(point, [summary(5, seed=1)], policy="p")
    assert not is_done(point, [summary(5, seed=0), summary(6, seed=1)], policy="p")
    assert not is_done(point, [summary(5, seed=1, policy="q")], policy="p")
    assert not is_done(point, [summary(5, seed=1, void=True)], policy="p")


def test_a_new_run_takes_the_place_of_a_void_one() -> None:
    before = [summary(5, void=True), summary(6)]
    assert only_new(before, summary(5)) == (summary(6), summary(5))


def test_what_an_older_file_does_not_say_is_no_difference_and_what_differs_is_named(
    tmp_path: Path,
) -> None:
    path = tmp_path / "out.json"
    asked = Document(spec={"model": "m", "lengths": {"a": {"prompt": 8}}, "shares": {}}, runs=())
    write_document(path, Document(spec={"lengths": {"a": {"prompt": 8}}}, runs=(summary(5),)))
    assert earlier_runs(path, asked, resume=True).runs == (summary(5),)
    write_document(path, Document(spec={"lengths": {"a": {"prompt": 9}}}, runs=()))
    with pytest.raises(BenchError, match=r"lengths\.a\.prompt = 9, not 8"):
        earlier_runs(path, asked, resume=True)
    write_document(path, Document(spec={"model": "other"}, runs=()))
    with pytest.raises(BenchError, match=r"model = 'other', not 'm'"):
        earlier_runs(path, asked, resume=True)


def test_results_are_added_to_only_when_asked_and_only_to_their_like(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    asked = Document(spec={"workload": "five", "seconds": 20.0, "server": "a"}, runs=())
    assert earlier_runs(path, asked, resume=False) is asked
    write_document(path, msgspec.structs.replace(asked, runs=(summary(5),)))
    with pytest.raises(BenchError, match="--resume"):
        earlier_runs(path, asked, resume=False)
    elsewhere = Document(spec={**asked.spec, "server": "b"}, runs=())
    assert earlier_runs(path, elsewhere, resume=True).runs == (summary(5),)
    longer = Document(spec={**asked.spec, "seconds": 60.0}, runs=())
    with pytest.raises(BenchError, match="seconds = 20"):
        earlier_runs(path, longer, resume=True)
    path.write_text("{")  # cut off
    with pytest.raises(BenchError, match=r"out\.json"):
        earlier_runs(path, asked, resume=True)
