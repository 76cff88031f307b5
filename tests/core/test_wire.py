"""Frames survive any cut of the stream, and nonsense is an error and not a hang."""

import struct
import typing
from types import UnionType

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.core import messages, wire
from appliance.core.messages import (
    Abort,
    Assign,
    CacheChanged,
    Heartbeat,
    SeqFinished,
    StepReported,
    WorkerUp,
)
from appliance.core.types import (
    CacheGroupSpec,
    FinishReason,
    Record,
    Request,
    RequestId,
    Slo,
    WorkerId,
)
from appliance.core.wire import FrameBuffer, WireError, command_codec, report_codec
from tests.core.node_kit import load

COMMANDS: list[messages.Command] = [
    Assign(
        worker=WorkerId(0),
        request=Request(
            id=RequestId(1),
            arrived=0.1,
            prompt_tokens=40,
            max_tokens=5,
            slo=Slo(ttft=0.5, tpot=0.05),
            prefix_hashes=(2**64 - 1, 0),
            group=RequestId(1),
            tenant="müller",
        ),
        emitted_tokens=3,
    ),
    Abort(worker=WorkerId(0), request_id=RequestId(2**62)),
]
REPORTS: list[messages.Report] = [
    WorkerUp(
        worker=WorkerId(3),
        epoch=2,
        groups=(CacheGroupSpec(num_blocks=8, block_tokens=16),),
        max_num_seqs=4,
        max_batch_tokens=64,
    ),
    StepReported(
        worker=WorkerId(3),
        step=9,
        elapsed=1 / 3,
        prefill_tokens=0,
        decode_tokens=2,
        ids=(RequestId(1), RequestId(2)),
        counts=(1, 3),
        load=load(free=3),
        finished=(
            SeqFinished(
                id=RequestId(1), reason=FinishReason.LENGTH, emitted_tokens=7, cached_tokens=16
            ),
        ),
    ),
    CacheChanged(worker=WorkerId(3), added=(2**64 - 1,), removed=(5,)),
    CacheChanged(worker=WorkerId(3), tier_added=(2**64 - 1,), tier_removed=(5,)),
    Heartbeat(worker=WorkerId(3), step=9),
]


def cut(data: bytes, sizes: list[int]) -> list[bytes]:
    pieces, at = [], 0
    for size in sizes:
        pieces.append(data[at : at + size])
        at += size
    return [*pieces, data[at:]]


@given(
    st.lists(
        st.tuples(st.lists(st.sampled_from(REPORTS), max_size=4), st.binary(max_size=50)),
        max_size=6,
    ),
    st.lists(st.integers(0, 90), max_size=30),
)
def test_frames_arrive_whole_and_in_order_however_the_stream_is_cut(
    frames: list[tuple[list[messages.Report], bytes]], sizes: list[int]
) -> None:
    codec, buffer = report_codec(), FrameBuffer()
    stream = b"".join(codec.encode(said, payload) for said, payload in frames)
    heard = [codec.decode(frame) for piece in cut(stream, sizes) for frame in buffer.feed(piece)]
    assert heard == frames


def test_commands_travel_as_they_are() -> None:
    codec, buffer = command_codec(), FrameBuffer()
    (frame,) = [codec.decode(f) for f in buffer.feed(codec.encode(COMMANDS, b"state"))]
    assert frame == (COMMANDS, b"state")


def test_a_reader_may_stop_in_the_middle_of_a_batch() -> None:
    codec, buffer = report_codec(), FrameBuffer()
    one = codec.encode(REPORTS[:1], b"a")
    reader = buffer.feed(one + codec.encode(REPORTS[1:2], b"b"))
    assert codec.decode(next(reader))[1] == b"a"
    reader.close()
    # the frame that was being looked at when the reader stopped is seen again, none is lost
    assert [codec.decode(frame)[1] for frame in buffer.feed(b"")] == [b"a", b"b"]


def members(union: UnionType) -> list[type[Record]]:
    return list(typing.get_args(union))


@pytest.mark.parametrize(
    "kind",
    [
        *members(messages.Command),
        *members(messages.Report),
        *members(messages.Event),
        *members(messages.Effect),
    ],
    ids=lambda kind: kind.__name__,
)
def test_every_message_is_frozen_and_tagged_with_its_name(kind: type[Record]) -> None:
    config = kind.__struct_config__
    assert config.frozen
    assert config.tag_field == "t"
    assert config.tag == kind.__name__


@settings(max_examples=200)
@given(st.binary(max_size=60))
def test_nonsense_is_a_wire_error(data: bytes) -> None:
    codec, buffer = report_codec(), FrameBuffer()
    try:
        for frame in buffer.feed(data):
            codec.decode(frame)
    except WireError:
        return


def test_impossible_lengths_are_refused_before_memory_is_asked_for() -> None:
    with pytest.raises(WireError, match="impossible frame length"):
        list(FrameBuffer().feed(struct.pack("<II", wire.MAX_FRAME_BYTES + 1, 0)))
    with pytest.raises(WireError, match="impossible frame length 3"):
        list(FrameBuffer().feed(struct.pack("<I", 3)))
    with pytest.raises(WireError, match="header is longer"):
        report_codec().decode(memoryview(struct.pack("<I", 99)))
    with pytest.raises(WireError, match="too short"):
        report_codec().decode(memoryview(b"ab"))


def test_a_command_is_not_a_report() -> None:
    frame = memoryview(command_codec().encode(COMMANDS))[4:]
    with pytest.raises(WireError, match="does not decode"):
        report_codec().decode(frame)
    header = msgspec.msgpack.encode([{"t": "Heartbeat"}])
    with pytest.raises(WireError, match="worker"):
        report_codec().decode(memoryview(struct.pack("<I", len(header)) + header))


def test_a_frame_over_the_limit_is_refused_by_the_sender(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_FRAME_BYTES", 100)
    with pytest.raises(WireError, match="over the limit"):
        report_codec().encode(REPORTS[:1], b"x" * 100)
