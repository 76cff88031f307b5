"""Moves as the node sees them: early frames wait, tokens count once, everything is counted."""

from appliance.core.messages import (
    HOST_TIER,
    Heartbeat,
    KvPulled,
    LinkDown,
    LinkUp,
    Migrate,
    PrefixPulled,
    Pull,
    PullFailed,
    Released,
    Report,
    Resume,
)
from appliance.core.types import MoveId, Request, RequestId, WorkerId
from appliance.live.moves import Moves, source_name

P, D = WorkerId(0), WorkerId(1)
MOVE, R = MoveId(5), RequestId(7)


def pull(move: MoveId = MOVE, request: RequestId = R) -> Pull:
    wanted = Request(id=request, arrived=0.0, prompt_tokens=4, max_tokens=4)
    return Pull(worker=D, move=move, request=wanted, source=P)


def pulled(move: MoveId = MOVE, request: RequestId = R) -> KvPulled:
    return KvPulled(
        worker=D,
        move=move,
        request_id=request,
        source=P,
        emitted_tokens=1,
        num_tokens=64,
        num_bytes=1000,
        seconds=0.5,
        path="shared memory",
    )


def beat(worker: WorkerId, step: int = 0) -> list[Report]:
    return [Heartbeat(worker=worker, step=step)]


def test_frames_pass_while_nothing_moves() -> None:
    moves = Moves()
    assert not moves.holds(D, beat(D), b"")
    assert not moves.holds(D, [pulled()], b"")
    assert moves.next_frame() is None


def test_the_target_s_word_waits_for_the_source_s_last_and_all_behind_it_wait_too() -> None:
    moves = Moves()
    moves.begun(pull(), 1.0)
    assert not moves.holds(D, beat(D, 1), b"before")
    assert moves.holds(D, [pulled()], b"")
    assert moves.holds(D, beat(D, 2), b"behind")
    assert not moves.holds(P, beat(P), b"")
    assert moves.next_frame() is None
    moves.prefilled(MOVE)
    assert moves.next_frame() == (D, [pulled()], b"")
    moves.arrived(pulled())
    assert moves.holds(D, beat(D, 3), b"later"), "order of one worker's frames is kept"
    assert [moves.next_frame(), moves.next_frame()] == [
        (D, beat(D, 2), b"behind"),
        (D, beat(D, 3), b"later"),
    ]
    assert moves.next_frame() is None
    assert not moves.holds(D, beat(D, 4), b"")
    assert moves.outcomes == {("hand-off", "done"): 1}


def test_two_moves_to_one_target_wait_each_for_its_own() -> None:
    moves = Moves()
    moves.begun(pull(), 1.0)
    moves.begun(pull(MoveId(6), RequestId(8)), 1.0)
    assert moves.holds(D, [pulled()], b"")
    assert moves.holds(D, [pulled(MoveId(6), RequestId(8))], b"")
    moves.prefilled(MOVE)
    assert moves.next_frame() == (D, [pulled()], b"")
    assert moves.next_frame() is None
    moves.prefilled(MoveId(6))
    assert moves.next_frame() is not None


def test_nobody_waits_for_a_dead_source_nor_hears_a_dead_target() -> None:
    moves = Moves()
    moves.begun(pull(), 1.0)
    assert moves.holds(D, [pulled()], b"")
    moves.worker_down(P)
    assert moves.next_frame() == (D, [pulled()], b"")
    assert moves.outcomes == {("hand-off", "source_died"): 1}

    moves.begun(pull(), 1.0)
    assert moves.holds(D, [pulled()], b"")
    moves.worker_down(D)
    moves.prefilled(MOVE)
    assert moves.next_frame() is None
    assert moves.outcomes["hand-off", "target_died"] == 1


def test_a_source_that_dies_after_its_last_word_leaves_the_move_to_its_target() -> None:
    moves = Moves()
    moves.begun(pull(), 1.0)
    moves.prefilled(MOVE)
    moves.worker_down(P)
    assert MOVE in moves.under_way
    assert not moves.holds(D, [pulled()], b"")


def test_a_request_placed_anew_waits_for_no_old_move() -> None:
    moves = Moves()
    moves.begun(pull(), 1.0)
    assert moves.holds(D, [pulled()], b"")
    moves.given_up(R)
    assert moves.next_frame() is not None
    assert moves.outcomes == {("hand-off", "given_up"): 1}


def test_every_end_is_counted_and_a_migration_is_known_in_either_order() -> None:
    moves = Moves()
    seen: list[tuple[str, str, float]] = []
    moves.observe = lambda *facts: seen.append(facts)
    migrate = Migrate(worker=P, move=MOVE, request_id=R, target=D, live=True)
    moves.migrating(migrate)
    moves.begun(pull(), 1.0)
    moves.prefilled(MOVE)
    moves.arrived(pulled())
    moves.begun(pull(MoveId(6)), 1.0)
    moves.migrating(Migrate(worker=P, move=MoveId(6), request_id=R, target=D, live=True))
    failed = PullFailed(worker=D, move=MoveId(6), request_id=R, source=P, reason="no room")
    moves.failed(failed)
    moves.begun(pull(MoveId(7)), 1.0)
    moves.released(Released(worker=P, move=MoveId(7), request_id=R, expired=True))
    moves.resuming(Resume(worker=P, move=MoveId(7), request_id=R))
    moves.released(Released(worker=P, move=MOVE, request_id=R))
    moves.released(Released(worker=P, move=MOVE, request_id=R, expired=True))
    assert moves.outcomes == {
        ("migration", "done"): 1,
        ("migration", "failed"): 1,
        ("hand-off", "resumed"): 1,
    }
    assert (moves.resumed, moves.expired_leases) == (1, 1)
    assert seen == [("migration", "shared memory", 0.5)]
    ((kind, path, source, target, count),) = moves.counts()
    assert (kind, path, source, target) == ("migration", "shared memory", P, D)
    assert (count.num, count.num_bytes, count.seconds) == (1, 1000, 0.5)


def test_prefixes_are_counted_by_what_came_of_them() -> None:
    moves = Moves()
    for wanted, came, source in ((4, 4, P), (4, 2, HOST_TIER), (4, 0, P)):
        report = PrefixPulled(
            worker=D,
            request_id=R,
            source=source,
            wanted=wanted,
            num_blocks=came,
            num_bytes=100 * came,
            seconds=0.1,
            path="shared memory",
        )
        moves.prefix_pulled(report)
    assert moves.prefixes == {"all": 1, "some": 1, "none": 1}
    names = [(source_name(source), count.num_bytes) for _, _, source, _, count in moves.counts()]
    assert names == [("host", 200), ("0", 400)]


def test_links_are_those_of_living_incarnations() -> None:
    moves = Moves()
    up = LinkUp(worker=D, peer=P, peer_epoch=2, path="shared memory", bytes_per_second=1e9)
    moves.link_up(up)
    moves.link_down(LinkDown(worker=D, peer=P, peer_epoch=1, reason="old"))
    assert moves.links == {(D, P): up}
    moves.link_down(LinkDown(worker=D, peer=P, peer_epoch=2, reason="gone"))
    assert moves.links == {}
    moves.link_up(up)
    moves.worker_down(P)
    assert moves.links == {}
