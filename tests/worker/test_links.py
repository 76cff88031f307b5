"""Ties to peers: nothing that was said before a death is lost, and ringing never waits."""

import os
import select
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import pytest

from appliance.core.peer import Asked, PeerMessage
from appliance.core.peer_links import LinkCodec, LinkMessage, PeerDown, PeerUp
from appliance.core.types import MoveId, WorkerId
from appliance.core.wire import FrameBuffer, WireError, peer_codec
from appliance.worker.links import Heard, Links, Lost, News, Opened, Ready
from appliance.worker.transfer import PeerPool

P = WorkerId(5)


class FakeTransfer:
    """Opens pools that are named by their epoch."""

    def __init__(self) -> None:
        self.refusal = ""

    def open(self, peer: PeerUp, fd: int) -> PeerPool:
        os.fstat(fd)
        if self.refusal:
            raise ValueError(self.refusal)
        return f"pool {peer.peer}.{peer.epoch}"  # type: ignore[return-value]

    def checksum(self, block: int) -> int:
        return block


class Rig:
    """The node's end of a links channel, and the peers' ends of the doorbells."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.node, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stack.enter_context(self.node)
        self.transfer = FakeTransfer()
        self.links = Links(ours, self.transfer)
        stack.callback(self.links.close)

    def tell(self, message: LinkMessage, fds: Sequence[int] = ()) -> None:
        socket.send_fds(self.node, [LinkCodec().encode(message)], fds)

    def up(self, peer: int = P, epoch: int = 1) -> socket.socket:
        """Introduce a peer; its end of the doorbell."""
        theirs, ours = socket.socketpair()
        self._stack.enter_context(theirs)
        pool = os.memfd_create("pool")
        message = PeerUp(
            peer=WorkerId(peer), epoch=epoch, num_blocks=1, block_bytes=1, index_offset=4096
        )
        with ours:
            self.tell(message, [pool, ours.fileno()])
        os.close(pool)
        return theirs

    def hear(self, count: int = 1) -> list[News]:
        news: list[News] = []
        while len(news) < count:
            assert select.select([self.links], [], [], 20)[0]
            news += self.links.hear()
        return news


@pytest.fixture
def rig() -> Iterator[Rig]:
    with ExitStack() as stack:
        yield Rig(stack)


def asked(move: int) -> Asked:
    return Asked(move=MoveId(move), num_blocks=0, room=1)


def say(bell: socket.socket, *messages: PeerMessage, payload: bytes = b"") -> None:
    for message in messages:
        bell.sendall(peer_codec().encode([message], payload))


def read(bell: socket.socket, count: int) -> list[tuple[list[PeerMessage], bytes]]:
    codec, buffer, frames = peer_codec(), FrameBuffer(), list[tuple[list[PeerMessage], bytes]]()
    bell.settimeout(20)
    while len(frames) < count:
        frames += [codec.decode(frame) for frame in buffer.feed(bell.recv(1 << 20))]
    return frames


def test_peers_are_met_and_talked_to(rig: Rig) -> None:
    bell = rig.up()
    assert rig.hear() == [Opened(peer=P, epoch=1, pool=rig.links.pool(P))]  # type: ignore[arg-type]
    say(bell, asked(1), asked(2), payload=b"ids")
    assert rig.hear(2) == [Heard(peer=P, message=asked(n), payload=b"ids") for n in (1, 2)]
    assert rig.links.ring(P, asked(3), b"more")
    assert read(bell, 1) == [([asked(3)], b"more")]
    assert rig.links.epoch(P) == 1


def test_news_of_the_node_are_there_before_its_commands_are_obeyed(rig: Rig) -> None:
    """`hear_node` needs no turn of the set."""
    rig.up()
    assert [type(news) for news in rig.links.hear_node()] == [Opened]
    assert rig.links.hear_node() == []


def test_what_a_peer_said_before_its_death_is_heard_before_it(rig: Rig) -> None:
    bell = rig.up()
    rig.hear()
    say(bell, asked(1))
    bell.close()
    heard, lost = rig.hear(2)
    assert isinstance(heard, Heard)
    assert lost == Lost(peer=P, epoch=1, reason="its process has ended")
    assert rig.links.pool(P) == "pool 5.1"  # what it left can still be read
    assert rig.links.epoch(P) is None
    assert not rig.links.ring(P, asked(2))


@pytest.mark.parametrize("how", ["down", "successor"])
def test_last_words_come_before_the_news_of_the_death(rig: Rig, how: str) -> None:
    bell = rig.up()
    rig.hear()
    say(bell, asked(1))
    if how == "down":
        rig.tell(PeerDown(peer=P, epoch=1))
    else:
        rig.up(epoch=2)
    news = rig.links.hear_node()
    kinds = [type(each) for each in news]
    assert kinds == [Heard, Lost, *([Opened] if how == "successor" else [])]
    assert rig.links.pool(P) == ("pool 5.1" if how == "down" else "pool 5.2")


def test_news_of_an_older_incarnation_mean_nothing(rig: Rig) -> None:
    rig.up(epoch=3)
    rig.hear()
    rig.tell(PeerDown(peer=P, epoch=2))
    rig.up(epoch=2)
    rig.tell(PeerDown(peer=WorkerId(99), epoch=1))
    assert rig.links.hear_node() == []
    assert rig.links.epoch(P) == 3


def test_pool_that_cannot_be_opened_is_a_lost_peer(rig: Rig) -> None:
    rig.transfer.refusal = "blocks have another size"
    bell = rig.up()
    assert rig.hear() == [Lost(peer=P, epoch=1, reason="blocks have another size")]
    assert rig.links.pool(P) is None
    assert not rig.links.ring(P, asked(1))
    assert bell.recv(1) == b""


def test_ringing_a_peer_that_reads_nothing_never_waits_and_loses_nothing(rig: Rig) -> None:
    bell = rig.up()
    rig.hear()
    payload = bytes(100_000)
    for number in range(50):
        assert rig.links.ring(P, asked(number), payload)
    frames: list[tuple[list[PeerMessage], bytes]] = []
    codec, buffer = peer_codec(), FrameBuffer()
    bell.setblocking(False)
    while len(frames) < 50:
        rig.links.hear()
        try:
            frames += [codec.decode(frame) for frame in buffer.feed(bell.recv(1 << 18))]
        except BlockingIOError:
            assert select.select([rig.links], [], [], 20)[0]
    assert [messages for messages, _ in frames] == [[asked(number)] for number in range(50)]
    assert all(got == payload for _, got in frames)
    assert not select.select([rig.links], [], [], 0)[0]  # nothing is waited for any more


def test_peer_that_leaves_too_much_unread_is_given_up(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.worker.links.MOST_UNSENT", 1 << 20)
    rig.up()
    rig.hear()
    for number in range(20):
        rig.links.ring(P, asked(number), bytes(100_000))
    (lost,) = rig.links.failed()
    assert isinstance(lost, Lost)
    assert "bytes unread" in lost.reason
    assert rig.links.failed() == rig.links.hear() == []


@pytest.mark.parametrize("nonsense", [b"\xff" * 64, b"\x06\0\0\0\x02\0\0\0\xc1\xc1"])
def test_peer_that_breaks_the_protocol_is_given_up(rig: Rig, nonsense: bytes) -> None:
    bell = rig.up()
    rig.hear()
    say(bell, asked(1))
    bell.sendall(nonsense)
    news = rig.hear(2)
    assert isinstance(news[0], Heard)
    assert isinstance(news[1], Lost)
    assert "it broke the protocol" in news[1].reason


def test_nonsense_of_the_node_is_an_error(rig: Rig) -> None:
    rig.node.send(b"\xc1")
    with pytest.raises(WireError, match="links channel says nonsense"):
        rig.links.hear()
    rig.tell(PeerUp(peer=P, epoch=1, num_blocks=1, block_bytes=1, index_offset=0))
    with pytest.raises(WireError, match="0 descriptors instead of 2"):
        rig.links.hear()


def test_end_of_the_channel_ends_no_conversation(rig: Rig) -> None:
    bell = rig.up()
    rig.hear()
    rig.node.close()
    assert rig.links.hear() == []
    say(bell, asked(1))
    assert len(rig.hear()) == 1


def test_other_descriptors_are_told_of_as_long_as_they_can_be_read(rig: Rig) -> None:
    event = os.eventfd(0)
    try:
        rig.links.also(event)
        os.eventfd_write(event, 1)
        assert rig.links.hear() == rig.links.hear() == [Ready(fd=event)]
        os.eventfd_read(event)
        assert rig.links.hear() == []
    finally:
        os.close(event)


def test_descriptors_do_not_pile_up(rig: Rig) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    first = rig.up(epoch=1)
    rig.links.hear_node()
    before = count()
    for epoch in range(2, 30):
        rig.up(epoch=epoch).close()
        rig.links.hear_node()
        rig.links.hear()
    assert first.recv(1) == b""
    assert count() <= before
