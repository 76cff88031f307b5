"""Deadlines, slack and verdicts."""

import pytest

from appliance.core.slo import due, first_token_deadline, slack, verdict
from appliance.core.types import Slo
from tests.core.node_kit import request

FULL = Slo(ttft=0.5, tpot=0.1)


@pytest.mark.parametrize(
    ("slo", "index", "first", "expected"),
    [
        (FULL, 0, None, 10.5),
        (FULL, 1, 10.2, 10.6),  # early tokens earn slack: the schedule does not move
        (FULL, 10, 10.9, 11.5),  # late ones do not get a new one
        (Slo(tpot=0.1), 0, None, None),
        (Slo(tpot=0.1), 3, 10.2, 10.5),
        (Slo(tpot=0.1), 3, None, None),
        (Slo(ttft=0.5), 1, 10.2, None),
        (Slo(ttft=0.5, tpot=0.1, e2e=0.7), 5, 10.2, 10.7),
        (Slo(ttft=0.5, e2e=9.0), 0, None, 10.5),
        (Slo(e2e=2.0), 4, 10.2, 12.0),
        (Slo(), 0, None, None),
    ],
)
def test_when_a_token_is_due(
    slo: Slo, index: int, first: float | None, expected: float | None
) -> None:
    found = due(slo, index, arrived=10.0, first_token_at=first)
    assert found == (None if expected is None else pytest.approx(expected))


def test_the_first_deadline_counts_from_arrival() -> None:
    assert first_token_deadline(request(1, arrived=10.0, slo=FULL)) == 10.5
    assert first_token_deadline(request(1, arrived=10.0)) is None


def test_slack_is_what_is_left() -> None:
    assert slack(10.5, 10.2) == pytest.approx(0.3)
    assert slack(10.5, 11.0) == pytest.approx(-0.5)
    assert slack(None, 3.0) is None


@pytest.mark.parametrize(
    ("slo", "first", "ended", "tokens", "met"),
    [
        (FULL, 0.4, 1.3, 10, True),
        (FULL, 0.6, 1.0, 10, False),
        (FULL, 0.4, 1.4, 10, False),
        (FULL, 0.4, 9.0, 1, True),  # one token has no gap
        (Slo(e2e=1.0), 0.4, 1.1, 5, False),
        (Slo(ttft=0.5), None, 0.2, 0, False),
        (Slo(), None, 50.0, 0, True),
    ],
)
def test_the_verdict(slo: Slo, first: float | None, ended: float, tokens: int, met: bool) -> None:
    found = verdict(slo, arrived=0.0, first_token_at=first, ended_at=ended, num_tokens=tokens)
    assert found.met == met
    assert found.e2e == ended
    assert found.ttft == first
    assert (found.tpot is None) == (tokens < 2)
