"""Introducing workers to each other, so that KV can move between them.

Every incarnation of a worker has, beside its control channel, a *links* channel on which the node
tells it of its peers (`appliance.core.peer_links`). When an incarnation is up, it and every other
living one get the memory of each other's KV pool and the two ends of a socket pair of their own,
the doorbell. What they then say to each other does not pass through the node.

The channel's packets carry descriptors, so asyncio's transports cannot send them. A packet that
does not fit waits here, with its own copies of the descriptors, until the socket can be written:
the loop never waits for a worker. What waits for a reader about a peer that has died is not sent
any more, so a worker that reads nothing holds at most two packets per peer.
"""

import asyncio
import errno
import logging
import os
import socket
from collections import deque
from collections.abc import Sequence

from appliance.core.peer_links import LinkCodec, LinkMessage, PeerDown, PeerUp
from appliance.core.types import Record, WorkerId

log = logging.getLogger(__name__)
RETRY_SECONDS = 0.05
_SHORT = frozenset({errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM})
"""What the kernel says when too many descriptors are under way, or memory is short."""


class PoolShape(Record, frozen=True, kw_only=True):
    """What a peer must know to read a pool (`appliance.core.kv_layout`)."""

    num_blocks: int
    block_bytes: int
    index_offset: int


class LinksChannel:
    """The node's end of one incarnation's links channel."""

    def __init__(self, worker: WorkerId, epoch: int, sock: socket.socket) -> None:
        self.worker = worker
        self.epoch = epoch
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._codec = LinkCodec()
        self._queue: deque[tuple[LinkMessage, tuple[int, ...]]] = deque()
        self._watching = False
        self._retry: asyncio.TimerHandle | None = None

    @property
    def num_waiting(self) -> int:
        """Packets that the worker has not taken."""
        return len(self._queue)

    def send(self, message: LinkMessage, fds: Sequence[int] = ()) -> None:
        """Send a packet, now or when it fits. Takes over `fds`."""
        self._queue.append((message, tuple(fds)))
        if len(self._queue) == 1:
            self._flush()

    def forget(self, peer: WorkerId) -> None:
        """Drop what still waits to be said about this peer."""
        kept = deque[tuple[LinkMessage, tuple[int, ...]]]()
        for message, fds in self._queue:
            if message.peer == peer:
                _close_all(fds)
            else:
                kept.append((message, fds))
        self._queue = kept

    def close(self) -> None:
        """The worker hears nothing more. Idempotent."""
        self._watch(wanted=False)
        if self._retry is not None:
            self._retry.cancel()
        while self._queue:
            _close_all(self._queue.popleft()[1])
        self._sock.close()

    def _flush(self) -> None:
        self._retry = None
        while self._queue:
            message, fds = self._queue[0]
            try:
                socket.send_fds(self._sock, [self._codec.encode(message)], fds)
            except BlockingIOError:
                self._watch(wanted=True)
                return
            except OSError as error:
                self._watch(wanted=False)
                if error.errno in _SHORT:
                    self._retry = self._loop.call_later(RETRY_SECONDS, self._flush)
                    return
                log.debug("links channel is gone", extra={"worker": self.worker})
                while self._queue:  # so is its worker, or will be
                    _close_all(self._queue.popleft()[1])
                return
            self._queue.popleft()
            _close_all(fds)
        self._watch(wanted=False)

    def _watch(self, *, wanted: bool) -> None:
        if wanted != self._watching:
            self._watching = wanted
            if wanted:
                self._loop.add_writer(self._sock.fileno(), self._flush)
            else:
                self._loop.remove_writer(self._sock.fileno())


class Links:
    """The links channels of all living incarnations, and who has been introduced."""

    def __init__(self, shape: PoolShape) -> None:
        self._shape = shape
        self._channels: dict[WorkerId, LinksChannel] = {}
        self._pools: dict[WorkerId, int] = {}
        """Of those that are up: a descriptor of the pool, owned by whoever said so."""

    def channel(self, worker: WorkerId) -> LinksChannel | None:
        """That of the worker's present incarnation."""
        return self._channels.get(worker)

    def open(self, worker: WorkerId, epoch: int) -> socket.socket:
        """Make the channel of a new incarnation; the worker's end of it, which becomes the
        caller's. Raises `OSError`."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self._channels[worker] = LinksChannel(worker, epoch, ours)
        return theirs

    def up(self, worker: WorkerId, pool: int) -> None:
        """The worker serves, with this memory as its pool: introduce it to all others."""
        channel = self._channels.get(worker)
        if channel is None or worker in self._pools:
            return
        self._pools[worker] = pool
        for peer in self._pools:
            if peer != worker:
                self._introduce(channel, self._channels[peer])

    def down(self, worker: WorkerId) -> None:
        """The incarnation is gone: tell the others."""
        channel = self._channels.pop(worker, None)
        if channel is None:
            return
        was_up = self._pools.pop(worker, None) is not None
        channel.close()
        if was_up:
            for peer in self._pools:
                other = self._channels[peer]
                other.forget(worker)
                other.send(PeerDown(peer=worker, epoch=channel.epoch))

    def close(self) -> None:
        """Close all channels."""
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()
        self._pools.clear()

    def _introduce(self, one: LinksChannel, other: LinksChannel) -> None:
        """Tell both of each other. A pair for which descriptors are short stays without a link, and
        the log says so."""
        fds: list[int] = []
        try:
            bells = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            fds += [bell.detach() for bell in bells]
            fds += [os.dup(self._pools[each.worker]) for each in (other, one)]
        except OSError as error:
            _close_all(fds)
            log.error(
                "no link between two workers: KV cannot move between them",
                extra={"workers": [one.worker, other.worker], "cause": str(error)},
            )
            return
        one.send(self._peer_up(other), [fds[2], fds[0]])
        other.send(self._peer_up(one), [fds[3], fds[1]])

    def _peer_up(self, peer: LinksChannel) -> PeerUp:
        shape = self._shape
        return PeerUp(
            peer=peer.worker,
            epoch=peer.epoch,
            num_blocks=shape.num_blocks,
            block_bytes=shape.block_bytes,
            index_offset=shape.index_offset,
        )


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
