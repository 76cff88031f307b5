"""Deaths: requests go on elsewhere, workers come back with back-off, crash loops end (R4-R6)."""

import pytest

from appliance.core.asks import Answered, Outcome, WakeAsked
from appliance.core.lifecycle import RequestState, WorkerState
from appliance.core.messages import Heartbeat, Quarantine, Refused, StartWorker, Woke
from appliance.core.types import ErrorKind, RequestId, WorkerId
from tests.core.node_kit import Node, assigns, load, quarantined, starts


def serve_healthily(node: Node, worker: int, *, seconds: float = 11.0) -> None:
    node.step(worker, [], after=seconds)


def idle(node: Node, worker: int, *, seconds: float) -> None:
    node.hear(Heartbeat(worker=WorkerId(worker), step=0), after=seconds)


def test_R5_requests_of_a_dead_worker_go_on_after_the_tokens_already_sent() -> None:
    node = Node(2)
    node.arrive(1)
    node.arrive(2)
    home = node.where[1]
    node.step(home, [1])
    node.step(home, [1], counts=[4])
    outputs = node.down(home)
    assert assigns(outputs) == [(1, 1 - home, 5)]
    node.step(1 - home, [1])
    assert node.core.emitted_tokens(RequestId(1)) == 6


def test_R5_they_stand_before_those_that_never_had_a_worker_in_order_of_arrival() -> None:
    node = Node(2, max_num_seqs=2, queue_ahead=0)
    for number in range(1, 8):
        node.arrive(number)
    assert node.at(0) == [1, 3]
    node.down(0)
    placed = []
    for done in (2, 4):
        placed += assigns(node.step(1, [done], finished=[done]))
    assert [number for number, _, _ in placed] == [1, 3]
    assert [n for n, _, _ in assigns(node.step(1, [1], finished=[1]))] == [5]


def test_R5_late_words_of_the_dead_change_nothing() -> None:
    node = Node(2)
    node.arrive(1)
    home = node.where[1]
    node.down(home)
    assert node.step(home, [1], finished=[1]) == []
    assert node.core.emitted_tokens(RequestId(1)) == 0
    assert node.core.request_state(RequestId(1)) is RequestState.ASSIGNED


def test_R6_a_dead_worker_is_started_again_as_a_new_incarnation() -> None:
    node = Node(1)
    node.arrive(1)
    node.down(0)
    assert node.core.view.workers[WorkerId(0)].state is WorkerState.DEAD
    assert starts(node.wake()) == [(0, 2)]
    assert node.up(0, epoch=1) == []  # an echo of the first one
    assert assigns(node.up(0)) == [(1, 0, 0)]
    assert node.down(0, epoch=1) == []


def test_R6_a_crash_loop_backs_off() -> None:
    node = Node(1, quarantine_deaths=9, respawn_backoff=0.1, respawn_backoff_max=0.5)
    pauses = []
    for _ in range(5):
        node.down(0)
        died = node.now
        assert starts(node.hear(Woke())) == []  # not before its time
        node.wake()
        pauses.append(round(node.now - died, 6))
    assert pauses == [0.1, 0.2, 0.4, 0.5, 0.5]


def test_R6_three_kills_in_a_row_quarantine_the_worker_and_the_others_serve_on() -> None:
    node = Node(2)
    node.arrive(1)
    for _ in range(2):
        assert quarantined(node.down(0)) == []
        node.respawn(0)
    outputs = node.down(0, cause="exit code 3")
    assert quarantined(outputs) == [0]
    (said,) = [output for output in outputs if isinstance(output, Quarantine)]
    assert said.reason == "3 deaths in a row, the last: exit code 3"
    assert node.core.view.workers[WorkerId(0)].state is WorkerState.QUARANTINED
    assert node.core.next_wakeup() is None
    node.arrive(2)
    assert node.where == {1: 1, 2: 1}
    node.step(1, [1, 2], finished=[1, 2])
    assert node.core.num_live == 0


def test_R6_an_operator_ends_a_quarantine_and_the_worker_has_a_clean_record() -> None:
    node = Node(2)
    for again in range(2):
        for _ in range(2):
            node.down(0)
            node.respawn(0)
        assert quarantined(node.down(0)) == [0]
        said = node.hear(WakeAsked(ask=again, worker=WorkerId(0)))
        assert [out.worker for out in said if isinstance(out, StartWorker)] == [0]
        node.up(0)
        (answer,) = [out for out in node.said if isinstance(out, Answered) and out.ask == again]
        assert answer.outcome is Outcome.DONE
    assert node.core.view.workers[WorkerId(0)].state is WorkerState.READY


def test_R6_a_restarted_worker_that_dies_on_is_quarantined_again_and_that_is_said() -> None:
    node = Node(2)
    for _ in range(2):
        node.down(0)
        node.respawn(0)
    node.down(0)
    node.hear(WakeAsked(ask=7, worker=WorkerId(0)))
    said = []
    for _ in range(3):
        said = node.down(0, cause="exit code 3")
        if not quarantined(said):
            while StartWorker not in [type(output) for output in node.wake()]:
                pass
    (answer,) = [output for output in said if isinstance(output, Answered)]
    assert answer.outcome is Outcome.ROLLED_BACK
    assert "exit code 3" in answer.reason
    assert node.core.next_wakeup() is None


def test_R6_a_failed_start_counts_and_its_own_words_are_kept() -> None:
    node = Node(1, boot=False)
    node.hear(Woke())
    words = "worker 0: KV cache too small: set kv.memory to 64MiB"
    for _ in range(3):
        refusal = Refused(
            worker=WorkerId(0), command="Start", kind=ErrorKind.INTERNAL, reason=words
        )
        assert node.hear(refusal) == []
        outputs = node.down(0, cause="exit code 3")
        if not quarantined(outputs):
            node.wake()
    assert node.core.last_cause(WorkerId(0)) == f"{words} (exit code 3)"
    node.arrive(1)
    assert node.rejected[1].kind is ErrorKind.NO_WORKER
    assert words in node.rejected[1].reason


def test_R6_serving_healthily_between_deaths_starts_a_new_row() -> None:
    node = Node(2)
    for _ in range(6):
        serve_healthily(node, 0)
        assert quarantined(node.down(0)) == []
        node.respawn(0)


def test_R6_an_idle_worker_that_is_killed_now_and_then_is_healthy() -> None:
    node = Node(2)
    for _ in range(6):
        idle(node, 0, seconds=11.0)
        assert quarantined(node.down(0)) == []
        node.respawn(0)


def test_R6_a_worker_that_idles_but_dies_of_its_first_work_is_not() -> None:
    node = Node(1)
    node.arrive(1)
    node.down(0)  # present at one death
    node.respawn(0)
    node.step(0, [1], finished=[1])
    for number in (2, 3):
        serve_healthily(node, 0)
        node.down(0)
        node.respawn(0)
        idle(node, 0, seconds=60.0)
        node.arrive(number)  # idled long, then got work and died of it
        node.down(0)
        node.respawn(0)
        node.step(0, [number], finished=[number])
        assert node.core.view.workers[WorkerId(0)].state is WorkerState.READY
    assert node.core.num_live == 0


def test_without_any_worker_left_what_waits_and_what_comes_is_told_so() -> None:
    node = Node(2, quarantine_deaths=1)
    node.arrive(1)
    node.arrive(2)
    node.cancel(2)
    assert quarantined(node.down(0)) == [0]
    assert 1 not in node.ended
    assert quarantined(node.down(1)) == [1]
    assert node.error(1) is ErrorKind.NO_WORKER
    assert "killed by signal 9" in node.ended[1].message
    assert node.error(2) is ErrorKind.CANCELLED
    node.arrive(3)
    assert node.rejected[3].kind is ErrorKind.NO_WORKER


def test_requests_wait_while_all_workers_are_on_their_way() -> None:
    node = Node(2)
    node.down(0)
    node.down(1)
    node.arrive(1)
    node.arrive(2)
    assert not node.ended
    assert not node.rejected
    node.respawn(0)
    assert node.where == {1: 0, 2: 0}


def test_a_load_of_a_heartbeat_is_taken_over() -> None:
    node = Node(1)
    told = load(free=3, running=2)
    node.hear(Heartbeat(worker=WorkerId(0), step=4, in_step=0.1, load=told))
    assert node.core.view.workers[WorkerId(0)].load == told


# --- R27 -----------------------------------------------------------------------------------------


def die_of(node: Node, poison: set[int]) -> None:
    """Run everything; a worker that has a poison request dies, a dead one comes back."""
    for _ in range(500):
        if not node.core.num_live:
            return
        for spec in node.specs:
            state = node.core.view.workers[spec.id].state
            here = node.at(spec.id)
            if state is WorkerState.DEAD:
                node.respawn(spec.id)
            elif state is WorkerState.READY and poison & set(here):
                node.down(spec.id)
            elif state is WorkerState.READY and here:
                node.step(spec.id, here[:4], finished=here[:4])
    raise AssertionError("did not come to an end")


def test_R27_one_poison_request_among_64_on_4_workers_is_the_only_one_that_fails() -> None:
    node = Node(4, max_num_seqs=64)
    for number in range(1, 65):
        node.arrive(number)
    die_of(node, {40})
    assert node.error(40) is ErrorKind.POISON
    assert [n for n, end in node.ended.items() if end.error is not None] == [40]
    assert len(node.ended) == 64
    deaths = sum(1 for o in node.said if isinstance(o, StartWorker)) - 4
    assert deaths <= 4  # two with others, at most one alone that proves nothing, one that does
    assert not any(isinstance(output, Quarantine) for output in node.said)


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_R27_several_poisons_do_not_take_the_service_down(num_workers: int) -> None:
    node = Node(num_workers, max_num_seqs=32)
    for number in range(1, 33):
        node.arrive(number)
    die_of(node, {3, 4, 17})
    failed = {n: end.error for n, end in node.ended.items() if end.error is not None}
    assert failed == {3: ErrorKind.POISON, 4: ErrorKind.POISON, 17: ErrorKind.POISON}
    states = [view.state for view in node.core.view.workers.values()]
    assert WorkerState.QUARANTINED not in states


def test_R27_poisons_one_after_the_other_never_quarantine_the_only_worker() -> None:
    node = Node(1)
    for number in range(1, 11):
        node.arrive(number)
        die_of(node, {number})
        assert node.error(number) is ErrorKind.POISON
    node.arrive(11)
    node.respawn(0)
    assert node.where == {11: 0}


def suspect_on(node: Node) -> None:
    """Request 1 is present at two deaths on workers 0 and 1."""
    for _ in range(2):
        home = node.where[1]
        node.down(home)
        node.respawn(home)


def test_R27_a_suspect_waits_for_a_worker_of_its_own_while_the_others_serve() -> None:
    node = Node(3)
    for number in range(1, 7):
        node.arrive(number)
    node.step(2, node.at(2))
    suspect_on(node)
    reserved = [v.id for v in node.core.view.workers.values() if v.reserved]
    assert len(reserved) == 1
    alone = reserved[0]
    node.arrive(20)
    assert node.where[20] != alone
    while mates := [n for n in node.at(alone) if n != 1]:
        node.step(alone, mates[:1], finished=mates[:1])
    assert node.at(alone)[0] == 1
    node.arrive(21)
    assert node.where[21] != alone
    assert len(node.at(alone)) == 1


def test_R27_an_innocent_suspect_simply_ends_and_its_worker_serves_all_again() -> None:
    node = Node(1)
    node.arrive(1)
    suspect_on(node)
    node.arrive(2)
    assert node.where == {1: 0}  # the only worker: others wait
    outputs = node.step(0, [1], finished=[1])
    assert node.error(1) is None
    assert assigns(outputs) == [(2, 0, 0)]


def test_R27_a_worker_that_saw_the_deaths_is_not_the_judge_if_there_is_another() -> None:
    node = Node(3)
    node.arrive(1)
    node.arrive(2, prompt=900)
    node.arrive(3, prompt=900)
    for home in (0, 1):
        assert node.where[1] == home
        node.down(home)
        node.respawn(home)
    node.down(0)  # it is tried there, since nobody else has room, but this proves nothing
    assert 1 not in node.ended
    (judge,) = [view.id for view in node.core.view.workers.values() if view.reserved]
    assert judge == 2  # although it is the busiest
    node.step(2, [2, 3], finished=[2, 3])
    assert node.where == {1: 2}
    node.down(2)
    assert node.error(1) is ErrorKind.POISON


def test_R27_bystanders_are_acquitted_after_some_steps_and_go_on_where_they_are() -> None:
    node = Node(1, max_num_seqs=8)
    for number in range(1, 5):
        node.arrive(number)
    for _ in range(2):
        node.down(0)
        node.respawn(0)
    for number in range(1, 5):
        assert node.at(0) == list(range(1, number + 1))
        assert node.core.view.workers[WorkerId(0)].reserved
        for _ in range(4):
            node.step(0, node.at(0))
    assert not node.core.view.workers[WorkerId(0)].reserved
    assert (node.core.num_trials, node.core.num_acquitted) == (4, 4)
    node.arrive(5)
    assert node.at(0) == [1, 2, 3, 4, 5]
    assert not node.ended


def test_R27_a_prompt_in_chunks_is_no_acquittal() -> None:
    node = Node(1)
    node.arrive(1)
    node.arrive(2)
    suspect_on(node)
    for _ in range(20):
        node.step(0, [])
    assert node.at(0) == [1]


def count_deaths(node: Node, poison: int, *, after: int) -> int:
    """Run the node until `poison` ended. It kills in its `after`-th step at each worker."""
    seen: dict[int, int] = {}
    deaths = 0
    for _ in range(3000):
        if poison in node.ended:
            die_of(node, set())
            return deaths
        for spec in node.specs:
            state, here = node.core.view.workers[spec.id].state, node.at(spec.id)
            if state is WorkerState.DEAD:
                node.respawn(spec.id)
            elif state is not WorkerState.READY or not here:
                seen.pop(spec.id, None)
            elif poison in here and seen.get(spec.id, 0) >= after:
                seen.pop(spec.id, None)
                deaths += 1
                node.down(spec.id)
            else:
                seen[spec.id] = seen.get(spec.id, 0) + 1 if poison in here else 0
                done = [n for n in here if node.core.emitted_tokens(RequestId(n)) >= 60]
                done = [n for n in done[: node.max_num_seqs] if n != poison]
                node.step(spec.id, here[: node.max_num_seqs], finished=done)
    raise AssertionError("the poison was not found")


@pytest.mark.parametrize("num_workers", [1, 2, 4])
@pytest.mark.parametrize("after", [0, 1, 3, 4, 5, 31, 32, 33, 100])
def test_R27_a_poison_that_kills_late_is_found_after_five_deaths_at_most(
    num_workers: int, after: int
) -> None:
    node = Node(num_workers, max_num_seqs=8, quarantine_deaths=9)
    for number in range(1, 13):
        node.arrive(number)
    deaths = count_deaths(node, 5, after=after)
    assert deaths <= node.config.poison_deaths + node.config.max_trials == 5
    assert node.error(5) is ErrorKind.POISON
    assert [n for n, end in node.ended.items() if end.error is not None] == [5]


def test_R27_what_was_sent_to_a_worker_that_was_dead_already_is_not_blamed() -> None:
    node = Node(4)
    for number in range(1, 9):
        node.arrive(number)
    victims = node.at(0)
    node.down(0)
    assert {node.where[number] for number in victims} == {1, 2}
    node.down(1, silent=True)  # it died at the same moment
    node.down(2, silent=True)
    assert set(node.where.values()) == {3}
    assert not any(view.reserved for view in node.core.view.workers.values())


def test_R27_a_poison_that_kills_before_any_sign_of_life_is_found_nevertheless() -> None:
    node = Node(1, quarantine_deaths=99)
    node.arrive(1)
    deaths = 0
    while 1 not in node.ended:
        node.down(0, silent=True)
        deaths += 1
        if 1 not in node.ended:
            node.respawn(0)
    assert node.error(1) is ErrorKind.POISON
    assert deaths == node.config.spared_deaths + node.config.poison_deaths + 1


def test_R27_the_reserved_worker_may_die_before_the_suspect_gets_there() -> None:
    node = Node(2)
    for number in range(1, 4):
        node.arrive(number)
    suspect_on(node)
    (reserved,) = [v.id for v in node.core.view.workers.values() if v.reserved]
    if node.at(reserved) == [1]:
        node.down(reserved)
        assert node.error(1) is ErrorKind.POISON
        return
    node.down(reserved)
    assert 1 not in node.ended


def test_R27_a_suspect_may_be_cancelled_while_it_waits_and_while_it_runs_alone() -> None:
    node = Node(1)
    node.arrive(1)
    node.arrive(2)
    suspect_on(node)
    assert node.at(0) == [1]
    node.cancel(2)  # waits as the second suspect
    assert node.error(2) is ErrorKind.CANCELLED
    node.cancel(1)
    node.down(0)
    assert node.error(1) is ErrorKind.CANCELLED
    node.arrive(3)
    node.respawn(0)
    assert node.where == {3: 0}


def test_R27_a_death_under_a_suspect_does_not_count_against_the_worker() -> None:
    node = Node(1)
    node.arrive(1)
    suspect_on(node)
    assert quarantined(node.down(0)) == []
    assert node.error(1) is ErrorKind.POISON
    for _ in range(2):  # the row is empty again: the two earlier deaths were the request's
        node.respawn(0)
        assert quarantined(node.down(0)) == []
    node.respawn(0)
    assert quarantined(node.down(0)) == [0]
