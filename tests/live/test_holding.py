"""Tokens wait to leave together only when the loop is nearly full, never longer than allowed."""

import asyncio
from array import array
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.core.messages import Ended
from appliance.core.payload import Sampling, StepOutputs
from appliance.core.types import FinishReason, RequestId
from appliance.live.holding import FIRST_HOLD, Governor, Holding, HoldSettings, LoopLoad
from appliance.live.records import Delta, End, Ticket
from appliance.live.streams import SWEEP_SECONDS, Stream, Streams

ONE = RequestId(1)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Log:
    """Writes down when what was pushed."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.pushes: list[tuple[float, Delta]] = []
        self.ended_at: float | None = None

    def push(self, delta: Delta) -> None:
        assert self.ended_at is None
        self.pushes.append((self._clock.now, delta))

    def end(self, end: End) -> None:
        self.ended_at = self._clock.now


class World:
    """One stream under a hold that is in force, on a clock that tests turn."""

    def __init__(self, *, hold: float, bound: float | None = None) -> None:
        self.clock = Clock()
        self.log = Log(self.clock)
        rules = HoldSettings(longest=hold)
        self.holding = Holding(rules, clock=self.clock, busy=lambda elapsed: 1.0)
        while hold and self.holding.seconds < hold:
            self.holding.look()
            self.clock.now += rules.interval
        self.streams = Streams(
            on_broken=lambda stream: None, holding=self.holding, clock=self.clock
        )
        stream = Stream(
            ONE,
            Ticket("t", (ONE,)),
            sink=self.log,
            prompt=array("i", [7]).tobytes(),
            sampling=Sampling(),
            salt="",
            bound=bound,
        )
        self.streams.open(stream)
        self.came: list[float] = []

    async def token(self, after: float, text: str = "x") -> None:
        """The next token, so many seconds later; sweeps happen meanwhile."""
        await self.wait(after)
        self.came.append(self.clock.now)
        outputs = StepOutputs(ids=[ONE], tokens=[[len(self.came)]], texts=[text])
        self.streams.fan_out(msgspec.msgpack.encode(outputs))
        await asyncio.sleep(0)

    async def wait(self, seconds: float) -> None:
        """Let the clock run as the loop would: a sweep is due every `SWEEP_SECONDS`."""
        end = self.clock.now + seconds
        while end - self.clock.now > 1e-12:
            self.clock.now = min(end, self.clock.now + SWEEP_SECONDS)
            self.streams._sweep()

    def tokens(self) -> list[list[int]]:
        return [delta.tokens for _, delta in self.log.pushes]

    def waits(self) -> list[float]:
        """How long each token that has left had waited."""
        left = [when for when, delta in self.log.pushes for _ in delta.tokens]
        return [when - came for when, came in zip(left, self.came, strict=False)]

    def end(self) -> None:
        self.streams.end(Ended(request_id=ONE, reason=FinishReason.STOP))


async def test_without_a_hold_every_token_leaves_alone() -> None:
    world = World(hold=0.0)
    for _ in range(5):
        await world.token(0.001)
    assert world.tokens() == [[1], [2], [3], [4], [5]]


async def test_the_first_text_and_the_last_token_do_not_wait() -> None:
    world = World(hold=0.05)
    await world.token(0.0, text="")  # half a character: nothing to see yet
    await world.token(0.01, text="a")
    assert world.tokens() == [[1], [2]]
    await world.token(0.01)
    assert len(world.tokens()) == 2
    world.end()
    assert world.tokens()[2:] == [[3]]
    assert world.log.ended_at == world.clock.now


async def test_tokens_are_joined_up_to_the_hold() -> None:
    world = World(hold=0.05)
    for _ in range(13):
        await world.token(0.02)
    sizes = [len(tokens) for tokens in world.tokens()]
    assert sizes[0] == 1
    assert set(sizes[2:]) == {3}
    assert max(world.waits()) <= 0.05 + 1e-9
    assert world.holding.num_joined == sum(sizes) - len(sizes)


async def test_no_token_waits_longer_than_its_requests_budget_per_token() -> None:
    world = World(hold=0.05, bound=0.025)
    for _ in range(12):
        await world.token(0.01)
    assert max(map(len, world.tokens())) >= 2
    assert max(world.waits()) <= 0.025 + 1e-9


async def test_a_budget_shorter_than_a_sweep_means_no_wait() -> None:
    world = World(hold=0.05, bound=SWEEP_SECONDS / 2)
    for _ in range(4):
        await world.token(0.001)
    assert world.tokens() == [[1], [2], [3], [4]]


async def test_a_token_whose_successor_does_not_come_leaves_in_time() -> None:
    world = World(hold=0.05)
    await world.token(0.0)
    await world.token(0.01)
    await world.token(0.01)
    waiting = world.came[len(world.waits()) :]
    assert waiting
    await world.wait(1.0)
    assert sum(map(len, world.tokens())) == 3
    assert max(world.waits()) <= 0.05 + 1e-9


async def test_slow_answers_are_not_held_at_all() -> None:
    world = World(hold=0.05)
    for _ in range(5):
        await world.token(0.06)
    assert world.waits() == [0.0] * 5


async def test_what_waits_leaves_when_the_hold_is_lifted() -> None:
    world = World(hold=0.05)
    for _ in range(3):
        await world.token(0.01)
    assert len(world.waits()) < 3
    world.holding._busy = lambda elapsed: 0.0
    world.clock.now += 10.0
    world.holding.look()
    assert world.holding.seconds == 0.0
    await world.token(0.0)
    assert sum(map(len, world.tokens())) == 4


async def test_a_cancelled_answer_gets_nothing_of_what_waited() -> None:
    world = World(hold=0.05)
    await world.token(0.0)
    await world.token(0.01)
    await world.token(0.01)
    before = len(world.tokens())
    stream = world.streams.get(ONE)
    assert stream is not None
    assert stream.tokens
    stream.cancelled = True
    await world.wait(0.1)
    world.end()
    assert len(world.tokens()) == before


async def test_a_sequence_that_moves_takes_the_waiting_tokens_with_it() -> None:
    world = World(hold=0.05)
    for _ in range(3):
        await world.token(0.01)
    stream = world.streams.get(ONE)
    assert stream is not None
    assert array("i", stream.state().emitted).tolist() == [1, 2, 3]


@settings(deadline=None, max_examples=60)
@given(
    gaps=st.lists(st.floats(0.0, 0.12), min_size=1, max_size=30),
    hold=st.sampled_from([0.0, 0.01, 0.02, 0.05]),
    bound=st.sampled_from([None, 0.001, 0.008, 0.03, 0.2]),
    texts=st.data(),
)
def test_whatever_comes_order_and_text_are_unchanged_and_no_bound_is_passed(
    gaps: Sequence[float], hold: float, bound: float | None, texts: st.DataObject
) -> None:
    async def run() -> None:
        world = World(hold=hold, bound=bound)
        said = [texts.draw(st.sampled_from(["", "a", "é", "long word"])) for _ in gaps]
        for gap, text in zip(gaps, said, strict=True):
            await world.token(gap, text)
        world.end()
        pushes = [delta for _, delta in world.log.pushes]
        assert [token for delta in pushes for token in delta.tokens] == [
            at + 1 for at in range(len(gaps))
        ]
        assert "".join(delta.text for delta in pushes) == "".join(said)
        limit = hold if bound is None else min(hold, bound)
        assert max(world.waits()) <= limit + 1e-9
        assert world.waits()[0] == 0.0

    asyncio.run(run())


# --- the load -------------------------------------------------------------------------------------

RULES = HoldSettings(busy_above=0.9, calm_below=0.45, longest=0.05, interval=0.1)


def test_below_the_threshold_there_is_no_hold() -> None:
    governor = Governor(RULES)
    for _ in range(100):
        governor.observe(0.9, 0.1)
    assert governor.hold == 0.0


def test_the_hold_grows_to_its_bound_stays_while_it_is_needed_and_falls_to_nothing() -> None:
    governor = Governor(RULES)
    grown = []
    for _ in range(5):
        governor.observe(0.95, 0.1)
        grown.append(governor.hold)
    assert grown[0] == FIRST_HOLD
    assert grown == sorted(grown)
    assert grown[-1] == 0.05
    governor.observe(0.8, 0.1)
    assert governor.hold == 0.05
    fallen = []
    for _ in range(5):
        governor.observe(0.2, 0.1)
        fallen.append(governor.hold)
    assert fallen == sorted(fallen, reverse=True)
    assert fallen[-1] == 0.0


def test_the_hold_falls_slowly_while_the_loop_has_some_air() -> None:
    governor = Governor(RULES)
    for _ in range(5):
        governor.observe(0.95, 0.1)
    fallen = []
    for _ in range(40):
        governor.observe(0.6, 0.1)
        fallen.append(governor.hold)
    assert fallen == sorted(fallen, reverse=True)
    assert 0.04 < fallen[0] < 0.05
    assert fallen[-1] == 0.0


def test_a_hold_does_not_outlive_a_pause() -> None:
    governor = Governor(RULES)
    for _ in range(5):
        governor.observe(0.95, 0.1)
    governor.observe(0.1, 5.0)
    assert governor.hold == 0.0


@pytest.mark.parametrize("rules", [HoldSettings(longest=0.0), HoldSettings(busy_above=1.0)])
def test_it_can_be_switched_off(rules: HoldSettings) -> None:
    governor = Governor(rules)
    governor.observe(1.0, 0.1)
    assert governor.hold == 0.0


def test_load_is_the_share_in_which_the_thread_ran_or_waited(tmp_path: Path) -> None:
    account = tmp_path / "schedstat"
    load = LoopLoad(path=account)
    account.write_text("1000000000 500000000 17\n")
    assert load.busy(0.1) == 0.0
    account.write_text("1030000000 520000000 18\n")
    assert load.busy(0.1) == pytest.approx(0.5)
    account.write_text("9030000000 520000000 18\n")
    assert load.busy(0.1) == 1.0


def test_without_the_kernels_account_running_counts(tmp_path: Path) -> None:
    load = LoopLoad(path=tmp_path / "nothing")
    load.busy(0.1)
    assert 0.0 <= load.busy(10.0) < 0.5
