"""The lanes of what waits against brute force, and shedding against the best subset there is."""

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.core.types import Request, RequestId, Slo
from appliance.policy.hyperflexis_queue import HORIZON, Entry, Lanes
from tests.core.node_kit import request

RATE = 100.0


def entry(
    number: int, *, due: float, tokens: int = 10, key: float | None = None, weight: float = 1.0
) -> Entry:
    """A request that is due then; the key is its due time unless it is named."""
    wanted: Request = request(number, arrived=number * 1e-3, slo=Slo(ttft=1.0, weight=weight))
    return Entry(
        wanted,
        tokens=tokens,
        due=due,
        start_by=due - tokens / RATE,
        key=due if key is None else key,
    )


def plan(lanes: Lanes, *, now: float = 0.0, begun: tuple[tuple[float, int], ...] = ()) -> None:
    """One machine, no reserve: what Moore's algorithm is about."""
    lanes.plan(now, rate=RATE, serial=RATE, begun=begun, value={}, step=0.0, reserve=0.0)


def ids(entries: list[Entry]) -> list[int]:
    return [each.id for each in entries]


moves = st.lists(
    st.tuples(st.sampled_from(["add", "remove", "demote"]), st.integers(0, 12), st.floats(0, 9)),
    max_size=60,
)


@given(moves=moves)
def test_the_lanes_are_sorted_whatever_comes_and_goes(
    moves: list[tuple[str, int, float]],
) -> None:
    lanes, main, lane = Lanes(), {}, {}
    for what, number, due in moves:
        if what == "add" and number not in main and number not in lane:
            main[number] = entry(number, due=due)
            lanes.add(main[number])
        elif what == "demote" and number in main:
            lane[number] = main.pop(number)
            lanes.demote(lane[number])
        elif what == "remove":
            known = lanes.remove(RequestId(number))
            assert (known is None) == (number not in main and number not in lane)
            main.pop(number, None)
            lane.pop(number, None)
        by_key = sorted(main.values(), key=lambda each: (each.key, each.id))
        oldest = sorted(lane.values(), key=lambda each: each.request.arrived)
        assert ids(lanes.first("main", 99)) == ids(by_key)
        assert ids(lanes.first("lane", 99)) == ids(oldest)
        assert lanes.head is (by_key[0] if by_key else None)
        starts = [each.start_by for each in main.values()]
        assert lanes.next_start == min(starts, default=None)
        late = sorted(each.id for each in main.values() if each.start_by < 4.0)
        assert sorted(ids(lanes.overdue(4.0))) == late


jobs = st.lists(st.tuples(st.integers(1, 300), st.floats(0.1, 8.0)), min_size=1, max_size=8)


def in_time(chosen: list[tuple[int, float]]) -> bool:
    """Whether all are in time on one machine, the earliest due first."""
    seconds = 0.0
    for tokens, due in sorted(chosen, key=lambda each: each[1]):
        seconds += tokens / RATE
        if seconds > due:
            return False
    return True


@settings(max_examples=200)
@given(jobs=jobs)
def test_of_equal_value_as_many_as_possible_are_kept_in_time(jobs: list[tuple[int, float]]) -> None:
    lanes = Lanes()
    for number, (tokens, due) in enumerate(jobs):
        lanes.add(entry(number, due=due, tokens=tokens))
    plan(lanes)
    kept = [jobs[each.id] for each in lanes.first("main", 99)]
    assert in_time(kept)
    best = max(
        size
        for size in range(len(jobs) + 1)
        if any(map(in_time, map(list, combinations(jobs, size))))
    )
    assert len(kept) == best
    assert lanes.num_shed == len(jobs) - best


@given(jobs=jobs)
def test_who_was_held_back_comes_back_when_there_is_room(jobs: list[tuple[int, float]]) -> None:
    lanes = Lanes()
    for number, (tokens, due) in enumerate(jobs):
        lanes.add(entry(number, due=due, tokens=tokens))
    plan(lanes)
    plan(lanes, now=-1000.0)
    assert lanes.num_shed == 0
    assert ids(lanes.first("main", 99)) == [
        number for number, _ in sorted(enumerate(jobs), key=lambda each: (each[1][1], each[0]))
    ]


def test_what_has_begun_is_counted_and_stays() -> None:
    lanes = Lanes()
    lanes.add(entry(1, due=1.0, tokens=60))
    plan(lanes, begun=((0.9, 50),))
    assert ids(lanes.first("shed", 9)) == [1]
    plan(lanes, begun=((1.1, 50),))
    assert lanes.num_shed == 0, "what is due later does not go before it"


def test_value_decides_who_is_held_back() -> None:
    lanes = Lanes()
    lanes.add(entry(1, due=1.0, tokens=60, weight=1.0))
    lanes.add(entry(2, due=1.0, tokens=80, weight=3.0))
    plan(lanes)
    assert ids(lanes.first("main", 9)) == [2]


def test_what_is_due_in_a_long_time_is_not_held_back() -> None:
    lanes = Lanes()
    for number in range(50):
        lanes.add(entry(number, due=HORIZON + 1.0, tokens=1000))
    plan(lanes)
    assert lanes.num_shed == 0


def test_a_reserve_is_kept_for_what_arrives() -> None:
    lanes = Lanes()
    lanes.add(entry(1, due=1.0, tokens=60))
    lanes.plan(0.0, rate=RATE, serial=RATE, begun=(), value={}, step=0.0, reserve=0.3)
    assert lanes.num_shed == 0
    lanes.plan(0.0, rate=RATE, serial=RATE, begun=(), value={}, step=0.2, reserve=0.3)
    assert lanes.num_shed == 1


@pytest.mark.parametrize("rate", [0.0, -1.0])
def test_without_workers_nobody_is_held_back(rate: float) -> None:
    lanes = Lanes()
    lanes.add(entry(1, due=-1.0))
    lanes.plan(0.0, rate=rate, serial=1.0, begun=(), value={}, step=0.0, reserve=0.3)
    assert lanes.num_shed == 0
