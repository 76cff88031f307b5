"""HyperFlexis inside a step: who bounds the chunk, and who goes before whom in scarce memory."""

import pytest

from appliance.core.messages import Assign, Pull
from appliance.core.peer import CopyDone, Offered
from appliance.core.types import MoveId, Request, RequestId, Slo, WorkerId
from appliance.policy.hyperflexis_step import CATCH_UP
from tests.core.toy_worker import WORKER
from tests.policy.test_hyperflexis_step import BASE, PER_DECODE, Rig, tokens

FULL = 2048
PREFIX = tuple(range(1000, 1040))
"""Names of 40 blocks."""


@pytest.mark.parametrize(("behind", "binds"), [(0.5, True), (2.0, False)])
def test_an_answer_that_cannot_catch_up_does_not_bound_the_chunk(
    behind: float, *, binds: bool
) -> None:
    """`behind`: seconds, as a part of what steps without prompts could make good."""
    rig = Rig()
    tpot = 0.01
    rig.assign(1, prompt=10, slo=Slo(ttft=1.0, tpot=tpot))
    rig.step()
    reach = CATCH_UP * (tpot - BASE - PER_DECODE)
    rig.now += tpot + behind * reach  # the host was away
    rig.assign(2, prompt=8000, slo=Slo(ttft=60.0))
    got = tokens(rig.plan())
    assert got[1] == 1, "it is decoded all the same"
    assert (got[2] < 100) if binds else (got[2] == FULL - 1)


def test_an_answer_that_cannot_catch_up_leaves_the_bound_to_the_others() -> None:
    rig = Rig()
    rig.assign(1, prompt=10, slo=Slo(ttft=1.0, tpot=0.005))
    rig.assign(2, prompt=10, slo=Slo(ttft=1.0, tpot=0.05))
    rig.step()
    rig.now += 0.3  # the host was away
    rig.assign(3, prompt=8000, slo=Slo(ttft=60.0))
    plan = rig.plan()
    assert set(tokens(plan)) == {1, 2, 3}
    assert 0.02 < rig.seconds(plan) <= 0.05


def with_prefix(rig: Rig, number: int, *, slo: Slo, prompt: int, max_tokens: int) -> None:
    """Assign a request that begins with `PREFIX`."""
    wanted = Request(
        id=RequestId(number),
        arrived=rig.now,
        prompt_tokens=prompt,
        max_tokens=max_tokens,
        slo=slo,
        prefix_hashes=PREFIX,
    )
    rig.batcher.handle(Assign(worker=WORKER, request=wanted), rig.now)


@pytest.mark.parametrize(("num_blocks", "fits"), [(600, False), (700, True)])
def test_running_prompts_do_not_wait_for_a_cached_one_that_may_not_fit(
    num_blocks: int, *, fits: bool
) -> None:
    """What is cached of it is no memory yet: until it is taken, others may get those blocks."""
    rig = Rig(num_blocks=num_blocks)
    with_prefix(rig, 1, slo=Slo(), prompt=641, max_tokens=1)
    while rig.batcher.has_work():
        rig.step()
    rig.assign(2, prompt=5000, slo=Slo(ttft=50.0))
    rig.step()
    rig.assign(3, prompt=4000, slo=Slo(ttft=40.0))
    assert set(tokens(rig.step())) == {2, 3}
    with_prefix(rig, 4, slo=Slo(ttft=1.0), prompt=700, max_tokens=500)
    got = tokens(rig.plan())
    assert (4 in got) is fits
    if not fits:
        assert sum(got.values()) == FULL, "the step is full of what is here"
        assert got[3] > FULL / 2


def test_what_an_answer_saved_before_it_moved_here_may_be_spent_and_no_more() -> None:
    rig = Rig()
    tpot, emitted, first = 0.02, 11, rig.now - 0.1
    wanted = Request(
        id=RequestId(1),
        arrived=first - 1.0,
        prompt_tokens=9,
        max_tokens=500,
        slo=Slo(ttft=2.0, tpot=tpot),
    )
    source, move = WorkerId(1), MoveId(7)
    pull = Pull(worker=WORKER, move=move, request=wanted, source=source, emitted_tokens=emitted)
    rig.batcher.handle(pull, rig.now)
    offer = Offered(
        move=move,
        first=0,
        blocks=(4, 5),
        generations=(1, 1),
        num_tokens=8 + emitted,
        final=True,
        num_emitted=emitted,
        first_token_at=first,
    )
    rig.batcher.hear_peer(source, offer, rig.now, hashes=(1,))
    done = CopyDone(move=move, num_bytes=1, seconds=0.0, path="memory", failed="")
    assert rig.batcher.drain_copies()
    rig.batcher.copied(done, rig.now)
    rig.assign(2, prompt=8000, slo=Slo(ttft=60.0))
    left = first + emitted * tpot - rig.now
    plan = rig.plan()
    assert set(tokens(plan)) == {1, 2}
    assert 0.75 * left < rig.seconds(plan) <= left
