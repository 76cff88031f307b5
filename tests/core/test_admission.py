"""Admission and drain: what comes in, what is turned away with which words, how it all ends."""

import pytest

from appliance.core.messages import Abort, Arrived, DrainExpired, DrainStarted, Woke
from appliance.core.types import ErrorKind, RequestId, WorkerId
from tests.core.node_kit import Node, assigns, request, starts


def test_R16_the_queue_is_bounded_by_requests_and_says_when_to_come_back() -> None:
    node = Node(1, max_num_seqs=1, queue_ahead=0, max_queue=2)
    for number in (1, 2, 3):
        node.arrive(number)
    assert not node.rejected
    node.arrive(4)
    refusal = node.rejected[4]
    assert refusal.kind is ErrorKind.QUEUE_FULL
    assert refusal.retry_after is not None
    assert refusal.retry_after >= 1.0
    assert "queue.max_requests" in refusal.reason
    node.step(0, [1], finished=[1])
    node.arrive(5)
    assert 5 not in node.rejected


def test_R16_the_queue_is_bounded_by_tokens_but_one_may_always_wait() -> None:
    node = Node(1, max_num_seqs=1, queue_ahead=0, max_queue_tokens=100)
    node.arrive(1)
    node.arrive(2, prompt=400)
    node.arrive(3, prompt=5)
    assert list(node.rejected) == [3]
    assert node.rejected[3].kind is ErrorKind.QUEUE_FULL


def test_retry_after_grows_with_the_backlog() -> None:
    def rejected_after(backlog: int) -> float:
        node = Node(1, max_num_seqs=1, queue_ahead=0, max_queue=4)
        for number in range(1, 6):
            node.arrive(number, prompt=backlog)
        node.arrive(6)
        return node.rejected[6].retry_after or 0.0

    slow = {"max_model_len": 10**7, "num_blocks": 10**6}
    node = Node(1, max_num_seqs=1, queue_ahead=0, max_queue=4, max_queue_tokens=10**9, **slow)  # type: ignore[arg-type]
    for number in range(1, 7):
        node.arrive(number, prompt=100_000)
    assert (node.rejected[6].retry_after or 0.0) > rejected_after(10)


@pytest.mark.parametrize(("prompt", "ok"), [(999, True), (1000, False), (5000, False)])
def test_what_can_never_fit_the_model_is_refused_with_the_limit(prompt: int, ok: bool) -> None:
    node = Node(1)
    node.arrive(1, prompt=prompt)
    assert (1 not in node.rejected) == ok
    if not ok:
        assert node.rejected[1].kind is ErrorKind.TOO_LONG
        assert str(prompt) in node.rejected[1].reason
        assert "1000" in node.rejected[1].reason
        assert node.rejected[1].retry_after is None


def test_what_can_never_fit_a_pool_is_refused_once_all_pools_are_known() -> None:
    node = Node(2, num_blocks=4, boot=False)
    node.hear(Woke())
    node.up(0)
    node.arrive(1, prompt=60)  # with 8 tokens of answer; worker 1 may be larger: it waits
    assert not node.rejected
    node.up(1, num_blocks=8)
    assert node.where[1] == 1
    node.arrive(3, prompt=120, max_tokens=9)  # 128 tokens of KV: the last token needs none
    assert not node.rejected
    node.arrive(2, prompt=120, max_tokens=10)
    assert node.rejected[2].kind is ErrorKind.TOO_LONG
    assert "kv.memory" in node.rejected[2].reason


def test_R1_what_was_accepted_before_the_pools_were_known_does_not_wait_for_ever() -> None:
    node = Node(2, boot=False)
    node.hear(Woke())
    node.arrive(1, prompt=100)
    node.arrive(2, prompt=20)
    node.up(0, num_blocks=4)
    assert 1 not in node.ended  # worker 1 may be larger
    node.up(1, num_blocks=4)
    assert node.error(1) is ErrorKind.TOO_LONG
    assert 2 not in node.ended


def test_R1_what_only_a_quarantined_worker_could_hold_is_told_so() -> None:
    node = Node(2, boot=False, quarantine_deaths=1)
    node.hear(Woke())
    node.up(0, num_blocks=4)
    node.up(1, num_blocks=40)
    node.arrive(1, prompt=100)
    node.down(1)
    assert node.error(1) is ErrorKind.TOO_LONG
    assert "kv.memory" in node.ended[1].message


def test_an_id_that_is_alive_is_not_accepted_twice() -> None:
    node = Node(1)
    node.arrive(1)
    with pytest.raises(ValueError, match="in use"):
        node.core.handle(Arrived(request=request(1)), node.now)


# --- draining ------------------------------------------------------------------------------------


def test_R17_a_draining_node_finishes_what_it_accepted_and_takes_no_more() -> None:
    node = Node(1, max_num_seqs=1, queue_ahead=0)
    node.arrive(1)
    node.arrive(2)
    node.hear(DrainStarted())
    assert node.core.is_draining
    node.arrive(3)
    assert node.rejected[3].kind is ErrorKind.DRAINING
    assert assigns(node.step(0, [1], finished=[1])) == [(2, 0, 0)]
    node.step(0, [2], finished=[2])
    assert node.core.num_live == 0


def test_R17_a_drain_that_takes_too_long_ends_everything_with_a_typed_error() -> None:
    node = Node(1, max_num_seqs=1, queue_ahead=1)
    for number in (1, 2, 3):
        node.arrive(number)
    node.cancel(2)
    node.hear(DrainStarted())
    outputs = node.hear(DrainExpired())
    kinds = {number: end.error for number, end in node.ended.items()}
    assert kinds == {
        1: ErrorKind.DRAIN_TIMEOUT,
        2: ErrorKind.CANCELLED,
        3: ErrorKind.DRAIN_TIMEOUT,
    }
    assert Abort(worker=WorkerId(0), request_id=RequestId(1)) in outputs
    assert node.step(0, [1], finished=[1]) == []  # late words change nothing
    assert node.core.num_live == 0


def test_a_drained_node_starts_no_worker_again() -> None:
    node = Node(2)
    node.hear(DrainStarted())
    node.down(0)
    assert starts(node.wake()) == []
    assert node.core.next_wakeup() is None
