"""Frames in both directions, a heart that holds nothing up, the two ends of a connection."""

import os
import socket
import struct
import threading
from collections.abc import Iterator

import msgspec
import pytest

from appliance.core.messages import Abort, Heartbeat, Released, Report
from appliance.core.start import WorkerStart
from appliance.core.types import BatcherConfig, MoveId, RequestId, WorkerId
from appliance.core.wire import FrameBuffer, WireError, command_codec, report_codec
from appliance.worker.channel import Channel, Heart, NodeGone, Progress, receive_start

W = WorkerId(3)
Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    node, worker = socket.socketpair()
    node.settimeout(10)
    with node, worker:
        yield node, worker


def abort(number: int) -> Abort:
    return Abort(worker=W, request_id=RequestId(number))


def read_reports(node: socket.socket, count: int) -> list[tuple[list[Report], bytes]]:
    codec, buffer = report_codec(), FrameBuffer()
    frames: list[tuple[list[Report], bytes]] = []
    while len(frames) < count:
        data = node.recv(1 << 16)
        assert data, "the worker closed its end"
        frames.extend(codec.decode(frame) for frame in buffer.feed(data))
    return frames


def flood(channel: Channel, report: Report) -> None:
    for _ in range(100):
        channel.send([report], bytes(1 << 16))


def test_frames_arrive_in_order_however_they_were_cut(pair: Pair) -> None:
    node, worker = pair
    channel = Channel(worker)
    encode = command_codec().encode
    stream = b"".join(encode([abort(n)], bytes(n)) for n in range(50))
    received = []
    for at in range(0, len(stream), 7):
        node.sendall(stream[at : at + 7])
        received += channel.receive()
    assert received == [([abort(n)], bytes(n)) for n in range(50)]
    assert not channel.ended


def test_waiting_ends_when_something_arrives_and_when_time_is_over(pair: Pair) -> None:
    node, worker = pair
    channel = Channel(worker)
    assert channel.receive() == []
    assert not channel.wait(0.001)
    assert not channel.wait(-1.0)
    node.sendall(command_codec().encode([abort(1)]))
    assert channel.wait(None)
    assert channel.receive() == [([abort(1)], b"")]


def test_closed_writing_side_is_the_orderly_end_and_reports_still_go_out(pair: Pair) -> None:
    node, worker = pair
    channel = Channel(worker)
    node.sendall(command_codec().encode([abort(1)]))
    node.shutdown(socket.SHUT_WR)
    assert channel.receive() == [([abort(1)], b"")]
    assert channel.receive() == []
    assert channel.ended
    channel.send([Released(worker=W, move=MoveId(1), request_id=RequestId(1))], b"payload")
    ((reports, payload),) = read_reports(node, 1)
    assert reports == [Released(worker=W, move=MoveId(1), request_id=RequestId(1))]
    assert payload == b"payload"


def test_r7_dead_node_is_told_apart_from_the_orderly_end(pair: Pair) -> None:
    node, worker = pair
    channel = Channel(worker)
    node.close()
    with pytest.raises(NodeGone, match="closed the connection"):
        channel.receive()
    with pytest.raises(NodeGone):
        channel.send([Released(worker=W, move=MoveId(1), request_id=RequestId(1))])
    assert channel.watch(60)


def test_bad_bytes_are_an_error_and_not_a_guess(pair: Pair) -> None:
    node, worker = pair
    node.sendall(b"\xff" * 64)
    with pytest.raises(WireError):
        Channel(worker).receive()


def test_stuck_node_does_not_hold_a_send_for_ever(pair: Pair) -> None:
    _, worker = pair
    channel = Channel(worker, send_seconds=0.05)
    report = Released(worker=W, move=MoveId(1), request_id=RequestId(1))
    with pytest.raises(NodeGone, match="has read nothing"):
        flood(channel, report)


def test_offer_skips_instead_of_waiting(pair: Pair) -> None:
    node, worker = pair
    channel = Channel(worker, send_seconds=0.05)
    beat = Heartbeat(worker=W, step=1)
    assert channel.offer([beat])
    assert read_reports(node, 1) == [([beat], b"")]
    with pytest.raises(NodeGone):
        flood(channel, beat)
    assert not channel.offer([beat])


def test_threads_do_not_mix_their_frames(pair: Pair) -> None:
    node, worker = pair
    channel = Channel(worker)

    def chatter(number: int) -> None:
        for _ in range(40):
            channel.send(
                [Released(worker=W, move=MoveId(1), request_id=RequestId(number))], bytes(30_000)
            )

    threads = [threading.Thread(target=chatter, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    frames = read_reports(node, 120)
    for thread in threads:
        thread.join()
    assert all(payload == bytes(30_000) for _, payload in frames)


def test_r8_heart_beats_with_progress_until_stopped(pair: Pair) -> None:
    node, worker = pair
    progress = Progress()
    progress.step, progress.began = 7, 0.0
    died = threading.Event()
    heart = Heart(Channel(worker), progress, worker=W, seconds=0.01, on_death=died.set)
    heart.start()
    frames = read_reports(node, 3)
    heart.stop()
    heart.join(10)
    assert not heart.is_alive()
    assert not died.is_set()
    for (beat,), _ in frames:
        assert isinstance(beat, Heartbeat)
        assert (beat.worker, beat.step) == (W, 7)
        assert beat.in_step is not None
        assert beat.in_step > 0


def test_r7_heart_notices_the_death_of_the_node_between_two_beats(pair: Pair) -> None:
    node, worker = pair
    died = threading.Event()
    heart = Heart(Channel(worker), Progress(), worker=W, seconds=3600, on_death=died.set)
    heart.start()
    read_reports(node, 1)
    node.close()
    assert died.wait(10)
    heart.join(10)
    assert not heart.is_alive()


def start_record(*, weights: bool) -> WorkerStart:
    return WorkerStart(
        worker=W,
        epoch=2,
        devices=("cpu:0",),
        engine="paced",
        model_dir="models/x",
        dtype="float32",
        batcher=BatcherConfig(max_model_len=128),
        block_tokens=16,
        num_blocks=4,
        has_weights_fd=weights,
        load_weights=False,
        hash_key=b"k",
    )


def send_start(node: socket.socket, start: WorkerStart, fds: list[int]) -> None:
    record = msgspec.msgpack.encode(start)
    socket.send_fds(node, [struct.pack("<I", len(record)) + record], fds)


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("slabs", [("kv",), ("kv", "links")])
def test_start_record_brings_descriptors_and_leaves_the_frames(
    pair: Pair, weights: bool, slabs: tuple[str, ...]
) -> None:
    node, worker = pair
    start = start_record(weights=weights)
    files = [os.memfd_create(name) for name in (*(("weights",) if weights else ()), *slabs)]
    for fd in files:
        os.write(fd, b"slab")
    send_start(node, start, files)
    node.sendall(command_codec().encode([abort(9)]))
    received, fds = receive_start(worker)
    try:
        assert received == start
        assert [os.pread(fd, 4, 0) for fd in fds] == [b"slab"] * len(files)
        assert not any(os.get_inheritable(fd) for fd in fds)
    finally:
        for fd in (*files, *fds):
            os.close(fd)
    assert Channel(worker).receive() == [([abort(9)], b"")]


def test_start_record_without_its_descriptors_is_refused(pair: Pair) -> None:
    node, worker = pair
    with open("/dev/null", "rb") as null:
        send_start(node, start_record(weights=True), [null.fileno()])
    with pytest.raises(ValueError, match="1 descriptors instead of 2"):
        receive_start(worker)


def test_node_that_dies_before_the_record_is_gone(pair: Pair) -> None:
    node, worker = pair
    node.sendall(b"\x10\x00\x00\x00abc")
    node.close()
    with pytest.raises(NodeGone):
        receive_start(worker)
