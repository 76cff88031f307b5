"""Outcomes from what came over the wire."""

import pytest

from appliance.bench.judge import on_time, outcome_of
from appliance.bench.loop import Asked
from appliance.core.types import Slo
from appliance.metrics.score import attained
from appliance.workload.items import Item

BOTH = Slo(class_name="a", ttft=1.0, tpot=0.1)


def asked(*, times: list[float], sent: float = 0.0, wanted: int = 3, slo: Slo = BOTH) -> Asked:
    """A request whose answer came to a good end with one token at each time."""
    item = Item(
        index=4, at=0.0, class_name="a", prompt_tokens=5, output_tokens=wanted,
        max_tokens=wanted, slo=slo,
    )  # fmt: skip
    found = Asked(item, lambda _: None, stop_after=0)
    found.sent = sent
    found.answer.times.extend(times)
    found.answer.num_tokens = len(times)
    found.answer.over, found.answer.finish_reason = True, "length"
    return found


def test_times_count_from_the_start_of_the_run() -> None:
    outcome = outcome_of(asked(times=[100.5, 100.6, 100.8], sent=0.1), start=100.0)
    assert outcome.ttft == pytest.approx(0.4)
    assert outcome.tpot == pytest.approx(0.15)
    assert outcome.longest_gap == pytest.approx(0.2)
    assert outcome.lateness == pytest.approx(0.1)


def test_an_answer_that_is_too_short_is_missed_unless_the_model_may_end_it() -> None:
    short = asked(times=[100.1, 100.15])
    assert not attained(outcome_of(short, start=100.0))
    assert attained(outcome_of(short, start=100.0, natural=True))


def test_workers_come_from_the_verdict() -> None:
    found = asked(times=[100.1, 100.2, 100.3])
    found.answer.server = {"met": True, "workers": [2, 0]}
    outcome = outcome_of(found, start=100.0)
    assert outcome.workers == (2, 0)
    assert outcome.server == {"met": True, "workers": [2, 0]}


@pytest.mark.parametrize(
    ("times", "slo", "num_tokens", "share"),
    [
        ([0.9, 1.05, 1.15], BOTH, 3, 1.0),
        ([0.9, 1.15, 1.3], BOTH, 3, 1 / 3),
        ([5.0, 5.05, 5.3], Slo(tpot=0.1), 3, 2 / 3),
        ([5.0, 9.0], Slo(ttft=1.0), 2, 1.0),
        ([], BOTH, 0, 0.0),
        # six tokens in two events: one at the first, the others at the second
        ([0.5, 1.25], BOTH, 6, 4 / 6),
    ],
)
def test_the_share_of_tokens_in_time(
    times: list[float], slo: Slo, num_tokens: int, share: float
) -> None:
    assert on_time(times, slo=slo, sent=0.0, num_tokens=num_tokens) == pytest.approx(share)
