"""Hand-off and migration as the Dispatcher sees them: who is told what, whose the request is."""

from collections.abc import Sequence

from appliance.core.asks import Decided
from appliance.core.lifecycle import RequestState
from appliance.core.messages import (
    Abort,
    Aborted,
    Assign,
    KvPulled,
    LinkUp,
    Migrate,
    Output,
    Prefilled,
    PrefixPulled,
    Pull,
    PullFailed,
    Refused,
    Release,
    Released,
    Resume,
)
from appliance.core.types import ErrorKind, MoveId, RequestId, Role, WorkerId
from tests.core.node_kit import Node, assigns

P, D, D2 = WorkerId(0), WorkerId(1), WorkerId(2)
ROLES = (Role.PREFILL, Role.DECODE)


class Pair(Node):
    """A node with roles, all linked with all."""

    def __init__(self, *roles: Role, linked: bool = True, **config: object) -> None:
        super().__init__(len(roles), roles=roles or ROLES, **config)
        if linked:
            self.link_all()

    def prefilled(self, number: int, *, emitted: int = 1) -> list[Output]:
        move = self.move_of(number)
        return self.hear(
            Prefilled(
                worker=move.source,
                move=move.move,
                request_id=RequestId(number),
                emitted_tokens=emitted,
            )
        )

    def pulled(self, number: int, *, emitted: int = 1) -> list[Output]:
        move = self.move_of(number)
        return self.hear(
            KvPulled(
                worker=move.worker,
                move=move.move,
                request_id=RequestId(number),
                source=move.source,
                emitted_tokens=emitted,
                num_tokens=16,
                num_bytes=1024,
                seconds=0.001,
                path="shared memory",
            )
        )

    def pull_failed(self, number: int) -> list[Output]:
        move = self.move_of(number)
        return self.hear(
            PullFailed(
                worker=move.worker,
                move=move.move,
                request_id=RequestId(number),
                source=move.source,
                reason="the generation differs",
            )
        )

    def released(self, number: int, *, expired: bool = False) -> list[Output]:
        move = self.move_of(number)
        return self.hear(
            Released(
                worker=move.source,
                move=move.move,
                request_id=RequestId(number),
                expired=expired,
            )
        )

    def aborted(self, worker: int, number: int) -> list[Output]:
        return self.hear(Aborted(worker=WorkerId(worker), request_id=RequestId(number)))

    def move_of(self, number: int) -> Pull:
        """The last pull of this request."""
        return [o for o in self.said if isinstance(o, Pull) and o.request.id == number][-1]

    def state(self, number: int) -> RequestState | None:
        return self.core.request_state(RequestId(number))

    def at_worker(self, number: int) -> WorkerId | None:
        return self.core.worker_of(RequestId(number))


def kinds(outputs: Sequence[Output]) -> list[str]:
    return [type(output).__name__ for output in outputs]


def test_a_hand_off_from_placement_to_the_end_of_the_lease() -> None:
    node = Pair(*ROLES)
    said = node.arrive(1)
    assert kinds(said) == ["Assign", "Pull", "Migrate"]
    assert assigns(said) == [(1, P, 0)]
    assign, pull, migrate = said
    assert isinstance(assign, Assign)
    assert isinstance(pull, Pull)
    assert isinstance(migrate, Migrate)
    assert (pull.worker, pull.source, migrate.worker, migrate.target) == (D, P, P, D)
    assert pull.move == migrate.move
    assert not migrate.live, "a hand-off stops with the first token"
    assert node.state(1) is RequestState.ASSIGNED
    node.step(0, [1])
    assert (node.state(1), node.at_worker(1)) == (RequestState.MIGRATING, P)
    assert node.prefilled(1) == []
    assert (node.state(1), node.at_worker(1)) == (RequestState.HANDING_OFF, D)
    assert node.core.view.workers[P].leased == 1
    said = node.pulled(1)
    assert said == [Release(worker=P, move=pull.move, request_id=RequestId(1))]
    assert (node.state(1), node.at_worker(1)) == (RequestState.DECODING, D)
    node.released(1)
    assert node.core.view.workers[P].leased == 0
    node.step(1, [1])
    assert node.core.emitted_tokens(RequestId(1)) == 2
    node.step(1, [1], finished=[1])
    assert node.ended[1].error is None


def test_R28_until_the_target_has_room_the_source_decodes_on() -> None:
    node = Pair(*ROLES)
    node.arrive(1)
    for _ in range(5):
        node.step(0, [1])
    assert node.core.emitted_tokens(RequestId(1)) == 5
    node.prefilled(1, emitted=5)
    node.pulled(1, emitted=5)
    assert node.at_worker(1) == D


def test_an_answer_that_ends_at_the_source_is_forgotten_by_the_target() -> None:
    node = Pair(*ROLES)
    node.arrive(1)
    said = node.step(0, [1], finished=[1])
    assert kinds(said) == ["Abort", "Ended"]
    assert isinstance(said[0], Abort)
    assert said[0].worker == D
    assert node.core.view.workers[D].incoming == 0


def test_a_failed_pull_lets_the_source_go_on_before_its_stop_and_after() -> None:
    for stopped in (False, True):
        node = Pair(*ROLES)
        node.arrive(1)
        node.step(0, [1])
        if stopped:
            node.prefilled(1)
        said = node.pull_failed(1)
        assert kinds(said) == ["Resume"]
        assert (node.state(1), node.at_worker(1)) == (RequestState.DECODING, P)
        node.step(0, [1])
        assert node.core.emitted_tokens(RequestId(1)) == 2
        assert "Pull" in kinds(node.hear_later(1.0)), "tried again after a pause"
        migrate = node.said[-1]
        assert isinstance(migrate, Migrate)
        assert migrate.live, "it decodes: it need not stop for the copy"


def test_a_stop_that_crosses_the_word_to_go_on_changes_nothing() -> None:
    node = Pair(*ROLES)
    node.arrive(1)
    node.step(0, [1])
    node.pull_failed(1)
    assert node.prefilled(1) == []
    assert (node.state(1), node.at_worker(1)) == (RequestState.DECODING, P)


def test_R5_the_source_dies_before_its_stop_was_heard() -> None:
    """It waits again, and is not given to the target before that one has forgotten it: what it
    still says of the sequence it may have got is not counted."""
    node = Pair(*ROLES)
    node.arrive(1)
    node.step(0, [1])
    said = node.down(0)
    assert kinds(said) == ["Abort"]
    assert node.state(1) is RequestState.WAITING
    node.pulled(1)
    node.step(1, [1])
    assert node.core.emitted_tokens(RequestId(1)) == 1
    said = node.aborted(1, 1)
    assert assigns(said) == [(1, D, 1)]
    assert isinstance(said[-1], Decided)
    assert said[-1].kind == "fallback", "a decode worker computes a prompt"


def test_R5_the_source_dies_after_its_stop_and_the_target_finishes_alone() -> None:
    node = Pair(*ROLES)
    node.arrive(1)
    node.step(0, [1])
    node.prefilled(1)
    assert node.down(0) == []
    assert (node.state(1), node.at_worker(1)) == (RequestState.HANDING_OFF, D)
    assert node.pulled(1) == [], "nobody is left to release"
    assert node.state(1) is RequestState.DECODING


def test_R5_the_source_dies_after_its_stop_and_the_target_cannot_go_on() -> None:
    node = Pair(*ROLES)
    node.arrive(1)
    node.step(0, [1])
    node.prefilled(1)
    node.down(0)
    said = node.pull_failed(1)
    assert assigns(said) == [(1, D, 1)]


def test_R5_the_target_dies_and_the_source_goes_on() -> None:
    for stopped in (False, True):
        node = Pair(*ROLES)
        node.arrive(1)
        node.step(0, [1])
        if stopped:
            node.prefilled(1)
        assert kinds(node.down(1)) == ["Resume", "Decided"]
        assert (node.state(1), node.at_worker(1)) == (RequestState.DECODING, P)


def test_a_lease_that_ran_out_before_the_word_to_go_on_costs_a_prefill() -> None:
    node = Pair(*ROLES)
    node.arrive(1)
    node.step(0, [1])
    node.prefilled(1)
    node.down(1)
    said = node.released(1, expired=True)
    assert assigns(said) == [(1, P, 1)]


def test_a_target_after_the_wrong_token_is_not_believed() -> None:
    node = Pair(*ROLES)
    node.arrive(1)
    node.step(0, [1])
    node.prefilled(1)
    said = node.pulled(1, emitted=2)
    assert kinds(said) == ["Abort", "Resume"]
    assert node.at_worker(1) == P


def test_R3_a_cancel_while_it_moves_ends_when_both_have_forgotten() -> None:
    for stopped in (False, True):
        for first, second in ((0, 1), (1, 0)):
            node = Pair(*ROLES)
            node.arrive(1)
            node.step(0, [1])
            if stopped:
                node.prefilled(1)
            said = node.cancel(1)
            assert sorted(o.worker for o in said if isinstance(o, Abort)) == [P, D]
            node.aborted(first, 1)
            assert 1 not in node.ended
            node.aborted(second, 1)
            assert node.error(1) is ErrorKind.CANCELLED


def test_R3_a_cancelled_move_ends_with_the_death_of_the_last_that_held_it() -> None:
    node = Pair(*ROLES)
    node.arrive(1)
    node.step(0, [1])
    node.cancel(1)
    node.down(0)
    assert 1 not in node.ended
    node.down(1)
    assert node.error(1) is ErrorKind.CANCELLED


def test_a_worker_that_refuses_moves_is_left_alone_and_shown() -> None:
    node = Pair(*ROLES)
    for command, worker in (("Pull", D), ("Migrate", P)):
        node = Pair(*ROLES)
        node.arrive(1)
        said = node.hear(
            Refused(
                worker=worker,
                command=command,
                kind=ErrorKind.INTERNAL,
                reason="it keeps a window",
                request_id=RequestId(1),
            )
        )
        fallback, *rest = said
        assert isinstance(fallback, Decided)
        assert "it keeps a window" in fallback.trigger
        assert kinds(rest) == (["Resume"] if command == "Pull" else ["Abort", "Resume"])
        node.step(0, [1], finished=[1])
        assert kinds(node.arrive(2)) == ["Assign"], "served where it is"


def test_without_a_decode_worker_or_a_link_it_is_served_where_it_is_and_said_once() -> None:
    node = Pair(Role.PREFILL, Role.PREFILL)
    said = [*node.arrive(1), *node.arrive(2), *node.arrive(3)]
    assert [o.kind for o in said if isinstance(o, Decided)] == ["fallback"] * 2
    assert not [o for o in said if isinstance(o, Pull)]
    unlinked = Pair(*ROLES, linked=False)
    said = unlinked.arrive(1)
    assert kinds(said) == ["Assign", "Decided"]
    said = unlinked.hear(
        LinkUp(worker=D, peer=P, peer_epoch=1, path="shared memory", bytes_per_second=1e9)
    )
    assert kinds(said) == ["Decided", "Pull", "Migrate"]
    assert isinstance(said[0], Decided)
    assert said[0].outcome == "over"


def test_a_full_decode_worker_is_no_target_and_its_next_free_place_is_taken() -> None:
    node = Pair(*ROLES, num_blocks=64)
    for number in range(1, 7):
        node.arrive(number)
    assert node.core.view.workers[D].incoming == node.max_num_seqs
    node.step(0, [1, 2, 3, 4, 5])
    for number in (1, 2, 3, 4):
        node.prefilled(number)
        node.pulled(number)
    said = node.step(1, [1], finished=[1])
    pulls = [o.request.id for o in said if isinstance(o, Pull)]
    assert pulls == [5]


def test_the_decode_worker_with_the_emptiest_batch_is_chosen_newcomers_counted() -> None:
    node = Pair(Role.PREFILL, Role.DECODE, Role.DECODE)
    for number in range(1, 5):
        node.arrive(number)
    assert [node.move_of(number).worker for number in range(1, 5)] == [D, D2, D, D2]


def test_law_10_a_prefill_worker_is_not_loaded_beyond_some_steps() -> None:
    node = Pair(*ROLES, prefill_ahead=2)
    for number in range(1, 5):
        node.arrive(number, prompt=600)
    assert node.at(0) == [1, 2]
    assert node.core.view.num_waiting == 2


def test_mixed_workers_hand_nothing_off() -> None:
    node = Pair(Role.MIXED, Role.MIXED)
    assert kinds(node.arrive(1)) == ["Assign"]


def test_a_prefix_is_copied_from_the_peer_that_has_it_when_that_is_cheaper() -> None:
    hashes = tuple(range(100, 140))
    for block_bytes, wanted in ((1000, 0), (10**9, None), (0, None)):
        node = Pair(Role.MIXED, Role.MIXED, block_bytes=block_bytes)
        node.cache(0, hashes)
        for number in range(10, 15):
            node.arrive(number)
        full = [number for number in node.at(0) if number >= 10]
        said = node.arrive(1, prompt=641, prefix_hashes=hashes)
        (assign,) = [o for o in said if isinstance(o, Assign)]
        if assign.worker == 0:
            assert assign.pull_from is None
            continue
        assert assign.pull_from == wanted, (block_bytes, full)
        assert assign.pull_blocks == (40 if wanted == 0 else 0)
        pending = node.core.view.workers[WorkerId(1)].pending_tokens
        assert (pending < 641) == (wanted == 0)


def test_what_a_copy_costs_beside_its_bytes_is_learnt() -> None:
    node = Pair(Role.MIXED, Role.MIXED, block_bytes=1000)
    before = node.core.view.cost.copy_seconds(1000, 1e9)
    for _ in range(100):
        node.hear(
            PrefixPulled(
                worker=D,
                request_id=RequestId(1),
                source=P,
                wanted=1,
                num_blocks=1,
                num_bytes=1000,
                seconds=0.5,
                path="shared memory",
            )
        )
    assert node.core.view.cost.copy_seconds(1000, 1e9) > 0.3 > before


def test_late_words_of_a_move_that_is_over_change_nothing() -> None:
    node = Pair(*ROLES)
    node.arrive(1)
    node.step(0, [1])
    node.prefilled(1)
    node.pulled(1)
    for say in (node.prefilled, node.pulled, node.pull_failed):
        assert say(1) == []  # type: ignore[operator]
    assert (node.state(1), node.at_worker(1)) == (RequestState.DECODING, D)
    assert (
        node.hear(
            Refused(
                worker=P,
                command="Resume",
                kind=ErrorKind.INTERNAL,
                reason="unknown",
                request_id=RequestId(1),
            )
        )
        == []
    )
    assert MoveId(1) == node.move_of(1).move
    assert not [o for o in node.said if isinstance(o, Resume)]


def test_R27_deaths_of_a_target_count_from_the_first_step_there() -> None:
    node = Pair(*ROLES, quarantine_deaths=100)
    node.arrive(1)
    for _ in range(2):  # it is copied, and no more: both deaths are forgiven, it goes on
        node.step(0, [1])
        node.down(1)
        assert node.at_worker(1) == P
        node.respawn(1)
        node.link_all()
        node.hear_later(10.0)
    emitted = 2
    node.prefilled(1, emitted=emitted)
    node.pulled(1, emitted=emitted)
    node.down(1, silent=True)
    assert assigns(node.said)[-1] == (1, P, emitted), "a counted death: it is assigned anew"
    node.respawn(1)
    node.link_all()
    node.step(0, [1])
    node.prefilled(1, emitted=emitted + 1)
    node.pulled(1, emitted=emitted + 1)
    node.down(1, silent=True)
    assert node.core.is_on_trial(RequestId(1)), "present at two deaths: it runs alone"
