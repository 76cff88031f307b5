"""Where the time of an answer went: the parts of its history, and what the Dispatcher says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.lifecycle import RequestState
from appliance.core.messages import Aborted, Ended, Refused
from appliance.core.stamps import Times, times_of
from appliance.core.types import ErrorKind, RequestId, Role, WorkerId
from tests.core.node_kit import Node
from tests.core.test_moving import Pair

W, A, D = RequestState.WAITING, RequestState.ASSIGNED, RequestState.DECODING
M, H = RequestState.MIGRATING, RequestState.HANDING_OFF
ONE, TWO = WorkerId(1), WorkerId(2)


def total(times: Times) -> float:
    return times.queue + times.prefill + times.transfer + times.decode


def test_the_queue_begins_at_the_arrival_and_not_when_the_scheduler_heard_of_it() -> None:
    times = times_of([(10.0, W, None), (11.0, A, ONE), (13.0, D, ONE)], arrived=9.5, ended=20.0)
    assert times == Times(queue=1.5, prefill=2.0, transfer=0.0, decode=7.0, workers=(ONE,))


def test_a_transfer_lasts_from_the_stop_to_the_going_on() -> None:
    history = [(0.0, W, None), (1.0, A, ONE), (3.0, M, ONE), (3.0, H, TWO), (3.5, D, TWO)]
    times = times_of(history, arrived=0.0, ended=8.0)
    assert times == Times(queue=1.0, prefill=2.0, transfer=0.5, decode=4.5, workers=(ONE, TWO))


def test_a_target_that_never_went_on_is_not_among_the_workers() -> None:
    history = [(0.0, W, None), (0.0, A, ONE), (1.0, D, ONE), (2.0, M, ONE), (3.0, H, TWO)]
    times = times_of([*history, (3.5, D, ONE)], arrived=0.0, ended=4.0)
    assert (times.workers, times.transfer, times.decode) == ((ONE,), 0.5, 2.5)


def test_a_worker_that_refused_it_or_died_before_its_first_token_is_not_among_the_workers() -> None:
    history = [(0.0, W, None), (1.0, A, ONE), (1.5, W, None), (2.0, A, TWO), (3.0, D, TWO)]
    times = times_of(history, arrived=0.0, ended=4.0)
    assert (times.workers, times.queue, times.prefill) == ((TWO,), 1.5, 1.5)
    again = [*history[:3], (2.0, A, ONE), (3.0, D, ONE), (4.0, W, None), (5.0, A, TWO)]
    times = times_of([*again, (6.0, D, TWO)], arrived=0.0, ended=7.0)
    assert times.workers == (ONE, TWO), "who gave tokens before it died is"


@given(
    st.lists(st.tuples(st.sampled_from([W, A, D, M, H]), st.floats(0, 10)), min_size=1),
    st.floats(0, 10),
)
def test_the_parts_sum_to_the_whole_whatever_the_history(steps, last) -> None:
    history, at = [], 5.0
    for state, seconds in steps:
        history.append((at, state, None if state is W else ONE))
        at += seconds
    times = times_of(history, arrived=4.0, ended=at + last)
    assert total(times) == pytest.approx(at + last - 4.0)


def ended(node: Node, number: int) -> tuple[Ended, Times]:
    end = node.ended[number]
    assert end.times is not None
    return end, end.times


def test_a_hand_off_is_a_transfer_between_its_two_workers() -> None:
    node = Pair(Role.PREFILL, Role.DECODE)
    arrived = node.now
    node.arrive(1)
    node.step(0, [1])
    first = node.now
    node.prefilled(1)
    stopped = node.now
    node.now += 0.25
    node.pulled(1)
    landed = node.now
    node.released(1)
    node.step(1, [1], finished=[1])
    _, times = ended(node, 1)
    assert times.workers == (0, 1)
    assert times.transfer == pytest.approx(landed - stopped)
    assert times.queue + times.prefill == pytest.approx(first - arrived)
    assert total(times) == pytest.approx(node.now - arrived)


def test_after_a_death_the_wait_is_queue_and_the_second_prompt_is_prefill() -> None:
    node = Node(2)
    arrived = node.now
    node.arrive(1)
    first = node.where[1]
    node.step(first, [1])
    node.now += 1.0
    node.down(first)
    node.now += 2.0
    node.step(1 - first, [1])
    again = node.now
    node.step(1 - first, [1], finished=[1])
    _, times = ended(node, 1)
    assert times.workers == (first, 1 - first)
    assert times.prefill == pytest.approx(0.001 + 2.001), "both prompts"
    assert times.decode == pytest.approx(1.001 + node.now - again)
    assert total(times) == pytest.approx(node.now - arrived)


def test_a_refused_assignment_leaves_no_trace_in_the_workers() -> None:
    node = Node(2)
    node.arrive(1)
    first = node.where[1]
    refusal = Refused(
        worker=WorkerId(first),
        command="Assign",
        kind=ErrorKind.INTERNAL,
        reason="no room",
        request_id=RequestId(1),
    )
    node.hear(refusal)
    assert node.where[1] == 1 - first
    node.step(1 - first, [1])
    node.step(1 - first, [1], finished=[1])
    _, times = ended(node, 1)
    assert times.workers == (1 - first,)


def test_an_answer_that_failed_has_no_times() -> None:
    node = Node(1)
    node.arrive(1)
    node.step(0, [1])
    node.cancel(1)
    node.hear(Aborted(worker=WorkerId(0), request_id=RequestId(1)))
    assert node.ended[1].times is None
