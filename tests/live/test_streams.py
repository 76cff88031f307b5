"""Fan-out of steps to sinks: order, liveness, and the state from which any worker can go on."""

import asyncio
from array import array

import msgspec
import pytest

from appliance.core.messages import Ended
from appliance.core.payload import Sampling, SequenceState, StepOutputs, TokenLogprobs
from appliance.core.types import ErrorKind, FinishReason, RequestId
from appliance.live.records import Delta, End, Ticket
from appliance.live.streams import DELIVERIES, Stream, Streams


class Log:
    """A sink that writes down its calls."""

    def __init__(self) -> None:
        self.calls: list[Delta | End] = []

    def push(self, delta: Delta) -> None:
        self.calls.append(delta)

    def end(self, end: End) -> None:
        self.calls.append(end)


class Breaks(Log):
    """A sink that always raises."""

    def push(self, delta: Delta) -> None:
        raise ConnectionResetError

    def end(self, end: End) -> None:
        super().end(end)
        raise ConnectionResetError


def step(*rows: tuple[int, list[int], str]) -> bytes:
    return msgspec.msgpack.encode(
        StepOutputs(
            ids=[RequestId(row[0]) for row in rows],
            tokens=[row[1] for row in rows],
            texts=[row[2] for row in rows],
            logprobs=[[TokenLogprobs(-0.5)] * len(row[1]) for row in rows],
        )
    )


class World:
    """Streams 1 and 2 of one ticket."""

    def __init__(self, *sinks: Log) -> None:
        self.broken: list[int] = []
        self.streams = Streams(on_broken=lambda stream: self.broken.append(stream.id))
        self.ticket = Ticket("t", tuple(RequestId(i + 1) for i in range(len(sinks))))
        for request_id, sink in zip(self.ticket.request_ids, sinks, strict=True):
            self.streams.open(
                Stream(
                    request_id,
                    self.ticket,
                    sink=sink,
                    prompt=array("i", [7, 8]).tobytes(),
                    sampling=Sampling(seed=request_id),
                    salt="s",
                )
            )

    async def turn(self, *rows: tuple[int, list[int], str]) -> int:
        """One step, and the end of the loop's turn."""
        num_tokens = self.streams.fan_out(step(*rows))
        await asyncio.sleep(0)
        return num_tokens

    def end(self, request_id: int, **how: object) -> None:
        self.streams.end(Ended(request_id=RequestId(request_id), **how))  # type: ignore[arg-type]


async def test_a_step_reaches_each_sink_with_its_own_tokens() -> None:
    one, two = Log(), Log()
    world = World(one, two)
    assert await world.turn((2, [5, 6], "ab"), (1, [4], "c")) == 3
    assert one.calls == [Delta(tokens=[4], text="c", logprobs=[TokenLogprobs(-0.5)])]
    assert two.calls == [Delta(tokens=[5, 6], text="ab", logprobs=[TokenLogprobs(-0.5)] * 2)]


async def test_steps_of_one_turn_are_one_push_in_order_and_another_turn_is_another() -> None:
    one, two = Log(), Log()
    world = World(one, two)
    world.streams.fan_out(step((1, [4], "a"), (2, [5], "b")))
    await world.turn((1, [6, 7], "cd"))
    await world.turn((1, [8], "e"))
    pushes = [call for call in one.calls if isinstance(call, Delta)]
    assert [(push.tokens, push.text) for push in pushes] == [([4, 6, 7], "acd"), ([8], "e")]
    assert [len(push.logprobs or ()) for push in pushes] == [3, 1]
    assert [push.steps() for push in pushes] == [[(1, "a"), (2, "cd")], [(1, "e")]]
    assert len(two.calls) == 1


async def test_the_last_tokens_precede_an_end_of_the_same_turn() -> None:
    log = Log()
    world = World(log)
    world.streams.fan_out(step((1, [4], "a")))
    world.end(1, reason=FinishReason.STOP)
    await asyncio.sleep(0)
    assert [type(call) for call in log.calls] == [Delta, End]


async def test_more_streams_than_one_callback_takes_are_all_delivered() -> None:
    logs = [Log() for _ in range(DELIVERIES + 3)]
    world = World(*logs)
    await world.turn(*((at + 1, [at], "x") for at in range(len(logs))))
    assert sum(len(log.calls) for log in logs) == DELIVERIES
    await asyncio.sleep(0)
    assert [len(log.calls) for log in logs] == [1] * len(logs)


async def test_the_state_of_a_sequence_is_all_that_was_asked_and_sent() -> None:
    world = World(Log())
    await world.turn((1, [300], "x"))
    await world.turn((1, [2, 70_000], "y"))
    state = msgspec.msgpack.decode(world.streams.payload(RequestId(1)), type=SequenceState)
    assert array("i", state.prompt).tolist() == [7, 8]
    assert array("i", state.emitted).tolist() == [300, 2, 70_000]
    assert (state.salt, state.sampling) == ("s", Sampling(seed=1))


async def test_r1_nothing_follows_the_end_and_the_ticket_waits_for_all() -> None:
    one, two = Log(), Log()
    world = World(one, two)
    await world.turn((1, [4], "c"))
    world.end(1, reason=FinishReason.STOP, cached_tokens=1)
    world.end(1, error=ErrorKind.INTERNAL)
    assert await world.turn((1, [5], "late"), (99, [1], "unknown")) == 0
    assert one.calls[1:] == [
        End(
            reason=FinishReason.STOP,
            error=None,
            message="",
            prompt_tokens=2,
            cached_tokens=1,
            emitted_tokens=1,
        )
    ]
    assert not world.ticket.done.done()
    world.streams.end_all(ErrorKind.INTERNAL, "the node failed")
    assert world.ticket.done.done()
    assert [call.message for call in two.calls if isinstance(call, End)] == ["the node failed"]
    assert len(world.streams) == 0


async def test_a_cancelled_stream_hears_only_its_end() -> None:
    log = Log()
    world = World(log)
    stream = world.streams.get(RequestId(1))
    assert stream is not None
    stream.cancelled = True
    assert await world.turn((1, [4], "c")) == 0
    assert stream.num_emitted == 0
    world.end(1, error=ErrorKind.CANCELLED)
    assert [type(call) for call in log.calls] == [End]


async def test_a_sink_that_raises_harms_nobody_else() -> None:
    bad, good = Breaks(), Log()
    world = World(bad, good)
    await world.turn((1, [4], "c"), (2, [5], "d"))
    await world.turn((1, [6], "e"), (2, [7], "f"))
    assert world.broken == [1]
    assert len(good.calls) == 2
    world.end(1, error=ErrorKind.INTERNAL)
    world.end(2, reason=FinishReason.LENGTH)
    assert world.ticket.done.done()
    assert len(bad.calls) == 1


async def test_a_payload_of_another_kind_is_refused_whole() -> None:
    log = Log()
    world = World(log)
    with pytest.raises(msgspec.MsgspecError):
        world.streams.fan_out(b"\x93\x01\x02\x03")
    crooked = StepOutputs(ids=[RequestId(1), RequestId(2)], tokens=[[4]], texts=["c", "d"])
    with pytest.raises(ValueError, match="differ in length"):
        world.streams.fan_out(msgspec.msgpack.encode(crooked))
    assert log.calls == []
