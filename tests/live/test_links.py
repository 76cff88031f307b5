"""Introducing workers to each other: who hears of whom, what waits, what is never left open."""

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.core.peer_links import LinkCodec, LinkMessage, PeerDown, PeerUp
from appliance.core.types import WorkerId
from appliance.live.links import Links, LinksChannel, PoolShape

SHAPE = PoolShape(num_blocks=7, block_bytes=64, index_offset=4096)
A, B, C = WorkerId(0), WorkerId(1), WorkerId(2)


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class Peer:
    """A worker's end of its links channel."""

    def __init__(self, links: Links, worker: WorkerId, epoch: int = 1) -> None:
        self.worker = worker
        self.sock = links.open(worker, epoch)
        self.sock.setblocking(False)
        self.pool = os.memfd_create(f"pool-{worker}-{epoch}")
        os.write(self.pool, f"pool of {worker}.{epoch}".encode())
        self.fds: list[int] = []

    def hears(self) -> list[tuple[LinkMessage, list[int]]]:
        """All that has come."""
        heard = []
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self.sock, 4096, 2)
            except BlockingIOError:
                return heard
            if not data:
                return heard
            self.fds += fds
            heard.append((LinkCodec().decode(data), list(fds)))

    def close(self) -> None:
        self.sock.close()
        for fd in [*self.fds, self.pool]:
            os.close(fd)


@pytest.fixture
async def links() -> Iterator[Links]:
    made = Links(SHAPE)
    yield made
    made.close()


async def test_each_hears_of_each_with_its_pool_and_a_doorbell_of_their_own(links: Links) -> None:
    before = open_fds()
    peers = [Peer(links, worker) for worker in (A, B, C)]
    links.up(A, peers[0].pool)
    assert peers[0].hears() == []
    links.up(B, peers[1].pool)
    links.up(C, peers[2].pool)
    heard = [peer.hears() for peer in peers]
    assert [[message.peer for message, _ in each] for each in heard] == [[B, C], [A, C], [A, B]]
    up, (pool, bell) = heard[0][0]
    assert up == PeerUp(peer=B, epoch=1, num_blocks=7, block_bytes=64, index_offset=4096)
    assert os.pread(pool, 100, 0) == b"pool of 1.1"
    other_bell = heard[1][0][1][1]
    os.write(bell, b"ring")
    assert os.read(other_bell, 10) == b"ring"
    assert os.pread(heard[2][0][1][0], 100, 0) == b"pool of 0.1"
    for peer in peers:
        peer.close()
    links.close()
    assert open_fds() == before


async def test_a_death_is_said_and_the_successor_is_introduced_with_what_is_its_pool_now(
    links: Links,
) -> None:
    one, other = Peer(links, A), Peer(links, B)
    links.up(A, one.pool)
    links.up(B, other.pool)
    one.hears()
    _, (_, bell) = other.hears()[0]
    links.down(A)
    one.close()
    assert [message for message, _ in other.hears()] == [PeerDown(peer=A, epoch=1)]
    assert os.read(bell, 1) == b"", "the node keeps no end of a doorbell"
    successor = Peer(links, A, epoch=2)
    links.up(A, successor.pool)
    (up, (pool, _)) = other.hears()[0]
    assert isinstance(up, PeerUp)
    assert (up.peer, up.epoch) == (A, 2)
    assert os.pread(pool, 100, 0) == b"pool of 0.2"
    assert [message.peer for message, _ in successor.hears()] == [B]
    successor.close()
    other.close()


async def test_one_that_dies_before_it_was_up_is_nobody_s_peer(links: Links) -> None:
    one, other = Peer(links, A), Peer(links, B)
    links.up(A, one.pool)
    links.down(B)
    other.close()
    links.down(B)
    links.up(B, one.pool)
    assert one.hears() == []
    one.close()


async def test_a_worker_that_reads_nothing_holds_nobody_up_and_keeps_little(links: Links) -> None:
    deaf, lively = Peer(links, A), Peer(links, B)
    links.up(A, deaf.pool)
    before = open_fds()
    for epoch in range(1, 600):
        if epoch > 1:
            lively = Peer(links, B, epoch=epoch)
        links.up(B, lively.pool)
        assert [message.peer for message, _ in lively.hears()] == [A]
        links.down(B)
        lively.close()
    channel = links.channel(A)
    assert channel is not None
    assert 0 < channel.num_waiting <= 2
    assert open_fds() <= before + 8
    while channel.num_waiting:
        deaf.hears()
        await asyncio.sleep(0.01)
    last = deaf.hears() or [(None, [])]
    assert last[-1][0] in (None, PeerDown(peer=B, epoch=599))
    deaf.close()


async def test_what_waited_is_sent_in_order_when_it_is_read() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    theirs.setblocking(False)
    channel = LinksChannel(A, 1, ours)
    for epoch in range(2000):
        channel.send(PeerDown(peer=B, epoch=epoch))
    assert channel.num_waiting
    heard: list[int] = []
    async with asyncio.timeout(20):
        while len(heard) < 2000:
            try:
                heard.append(LinkCodec().decode(theirs.recv(4096)).epoch)
            except BlockingIOError:
                await asyncio.sleep(0)
    assert heard == list(range(2000))
    channel.close()
    channel.close()
    theirs.close()


async def test_words_to_one_that_is_gone_are_dropped_with_their_descriptors() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    channel = LinksChannel(A, 1, ours)
    theirs.close()
    read, write = os.pipe()
    channel.send(PeerDown(peer=B, epoch=1), [write])
    assert channel.num_waiting == 0
    assert os.read(read, 1) == b""
    os.close(read)
    channel.close()
