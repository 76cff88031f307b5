"""What is kept of decisions: those about the node, whatever happens to single requests."""

from appliance.core.asks import Decided
from appliance.core.types import WorkerId
from appliance.live.asks import ROOM, Asks

MOST = 1000
"""What `/admin/decisions` can be asked for."""


def decided(number: int, kind: str, *, outcome: str = "done") -> Decided:
    return Decided(
        decision=number,
        at=float(number),
        kind=kind,
        by="policy",
        workers=(WorkerId(0),),
        trigger="words",
        outcome=outcome,
    )


def numbers(asks: Asks, limit: int = MOST) -> list[int]:
    return [each.decision for each in asks.decisions(limit)]


def test_overload_pushes_no_decision_of_an_operator_out() -> None:
    asks = Asks(lambda ask: None, specs={})
    asks.decided(decided(1, "park"))
    asks.decided(decided(2, "flip"))
    for number in range(3, 5003):
        asks.decided(decided(number, "demote" if number % 2 else "refuse"))
    asks.decided(decided(5003, "add"))
    assert numbers(asks, 3) == [5003, 5002, 5001], "newest first, of all kinds"
    kept = numbers(asks)
    assert kept == sorted(kept, reverse=True)
    assert kept[-2:] == [2, 1], "the operator's"
    assert len(kept) == 3 + ROOM["requests"] < MOST


def test_neither_does_a_door_that_opens_and_closes() -> None:
    asks = Asks(lambda ask: None, specs={})
    for number in range(1, 11):
        asks.decided(decided(number, "add"))
    for number in range(11, 5011):
        asks.decided(decided(number, "turn_away", outcome=""))
        asks.decided(decided(number, "turn_away", outcome="1 refused"))
    assert numbers(asks)[-10:] == list(range(10, 0, -1))
    assert len(numbers(asks)) == 10 + ROOM["door"]


def test_a_decision_that_is_known_is_replaced_where_it_stands() -> None:
    asks = Asks(lambda ask: None, specs={})
    for number in (1, 2, 3):
        asks.decided(decided(number, "turn_away", outcome=""))
    asks.decided(decided(2, "turn_away", outcome="7 refused"))
    assert numbers(asks) == [3, 2, 1]
    assert [each.outcome for each in asks.decisions(2)] == ["", "7 refused"]
