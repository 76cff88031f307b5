"""A worker's ties to its peers: the node's news of them, their pools, and the doorbells.

The links channel says who lives (`appliance.core.peer_links`). For each peer there is a *pool*,
which stays readable when the peer has died, until its successor brings another; and a *doorbell*, a
stream to that one incarnation, whose end is the peer's death. What was written before the end is
read before it.

Ringing never waits: what the peer's socket does not take stays here and leaves when there is room.
A peer that has read nothing while `MOST_UNSENT` bytes were kept is given up.

One epoll set holds all of it, so the step loop asks once whether anything has happened, and sleeps
on one descriptor.
"""

import logging
import os
import select
import socket
from collections.abc import Callable, Iterator, Sequence

import msgspec

from appliance.core.peer import PeerMessage
from appliance.core.peer_links import (
    MAX_LINK_BYTES,
    NUM_PEER_FDS,
    LinkCodec,
    PeerDown,
    PeerUp,
)
from appliance.core.types import Record, WorkerId
from appliance.core.wire import FrameBuffer, WireError, peer_codec
from appliance.worker.transfer import PeerPool, Transfer

log = logging.getLogger(__name__)

RECEIVE_BYTES = 1 << 18
MOST_UNSENT = 64 << 20


class Opened(Record, frozen=True, kw_only=True):
    """The pool of this incarnation of a peer is mapped."""

    peer: WorkerId
    epoch: int
    pool: PeerPool


class Lost(Record, frozen=True, kw_only=True):
    """This incarnation of a peer says nothing any more, or could not be tied to at all."""

    peer: WorkerId
    epoch: int
    reason: str


class Heard(Record, frozen=True, kw_only=True):
    """A peer has said this."""

    peer: WorkerId
    message: PeerMessage
    payload: bytes


class Ready(Record, frozen=True, kw_only=True):
    """A descriptor given to `Links.also` is readable."""

    fd: int


News = Opened | Lost | Heard | Ready


class Doorbell:
    """One end of a stream of frames to one incarnation of a peer. Never waits."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._codec = peer_codec()
        self._buffer = FrameBuffer()
        self._unsent = bytearray()
        self.failure = ""
        """Why it can be used no more."""

    def fileno(self) -> int:
        """Of the socket."""
        return self._sock.fileno()

    @property
    def has_unsent(self) -> bool:
        """Whether something waits for room in the peer's socket."""
        return bool(self._unsent)

    def ring(self, message: PeerMessage, payload: bytes) -> None:
        """Send one frame, now or later."""
        self._unsent += self._codec.encode([message], payload)
        self.flush()
        if len(self._unsent) > MOST_UNSENT:
            self._fail(f"it has left {len(self._unsent)} bytes unread")

    def flush(self) -> None:
        """Send what the socket takes."""
        while self._unsent and not self.failure:
            try:
                sent = self._sock.send(self._unsent, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            except OSError as error:
                # what the peer said before it went can still be read
                self._unsent.clear()
                log.debug("a peer does not listen", extra={"reason": str(error)})
                return
            del self._unsent[:sent]

    def receive(self) -> Iterator[tuple[PeerMessage, bytes]]:
        """What has arrived; sets `failure` at the end of the stream."""
        while not self.failure:
            try:
                data = self._sock.recv(RECEIVE_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                self._fail(str(error))
                return
            if not data:
                self._fail("its process has ended")
                return
            try:
                for frame in self._buffer.feed(data):
                    messages, payload = self._codec.decode(frame)
                    for message in messages:
                        yield message, payload
            except WireError as error:
                self._fail(f"it broke the protocol: {error}")
            if len(data) < RECEIVE_BYTES:
                return

    def close(self) -> None:
        """Hang up."""
        self._sock.close()

    def _fail(self, reason: str) -> None:
        self.failure = self.failure or reason
        self._unsent.clear()


class _Peer:
    """The latest incarnation of a peer that was heard of."""

    __slots__ = ("bell", "epoch", "pool", "writing")

    def __init__(self, epoch: int, pool: PeerPool | None, bell: Doorbell | None) -> None:
        self.epoch = epoch
        self.pool = pool
        self.bell = bell
        self.writing = False
        """The set also waits for room in the doorbell."""


class Links:
    """All peers of one worker. Belongs to the step loop."""

    def __init__(
        self,
        sock: socket.socket,
        transfer: Transfer,
        *,
        refuses: Callable[[str], bool] = lambda _point: False,
    ) -> None:
        """`sock` is the worker's end of the links channel; `refuses` asks a plan of faults."""
        sock.setblocking(False)
        self._sock = sock
        self._transfer = transfer
        self._refuses = refuses
        self._codec = LinkCodec()
        self._peers: dict[WorkerId, _Peer] = {}
        self._by_fd: dict[int, WorkerId] = {}
        self._failed: list[Lost] = []
        """Doorbells that failed while they were rung."""
        self._set = select.epoll()
        self._set.register(sock, select.EPOLLIN)
        self._open = True

    def fileno(self) -> int:
        """Readable when `hear` has something to give."""
        return self._set.fileno()

    def also(self, fd: int) -> None:
        """Tell of this descriptor too, as long as it is readable."""
        self._set.register(fd, select.EPOLLIN)

    def pool(self, peer: WorkerId) -> PeerPool | None:
        """What can be copied from; also of a dead peer."""
        found = self._peers.get(peer)
        return None if found is None else found.pool

    def epoch(self, peer: WorkerId) -> int | None:
        """Of the incarnation that its doorbell leads to; None without one."""
        found = self._peers.get(peer)
        return None if found is None or found.bell is None else found.epoch

    def ring(self, peer: WorkerId, message: PeerMessage, payload: bytes = b"") -> bool:
        """Tell a peer, without waiting. False when nobody is there to be told."""
        found = self._peers.get(peer)
        if found is None or found.bell is None or found.bell.failure:
            return False
        found.bell.ring(message, payload)
        self._settle(peer, found)
        return True

    def failed(self) -> list[News]:
        """Peers that were given up while they were rung, since the last call."""
        if not self._failed:
            return []
        failed, self._failed = self._failed, []
        return [*failed]

    def hear_node(self) -> list[News]:
        """What the node has said about peers; to be asked before its commands are obeyed."""
        news: list[News] = []
        while self._open:
            try:
                packet, fds, _, _ = socket.recv_fds(
                    self._sock, MAX_LINK_BYTES, NUM_PEER_FDS, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                break
            except OSError as error:
                self._end(str(error))
                break
            if not packet:
                self._end("the node closed the links channel")
                break
            try:
                news += self._obey(packet, fds)
            finally:
                for fd in fds:
                    os.close(fd)
        return news

    def hear(self) -> list[News]:
        """All that has happened: what the node and the peers have said."""
        news = self.failed()
        for fd, events in self._set.poll(0):
            if fd == self._sock.fileno():
                news += self.hear_node()
            elif (peer := self._by_fd.get(fd)) is not None:
                news += self._listen(peer, events)
            else:
                news.append(Ready(fd=fd))
        return news

    def close(self) -> None:
        """Hang up everywhere."""
        for peer in self._peers.values():
            if peer.bell is not None:
                peer.bell.close()
        self._peers.clear()
        self._by_fd.clear()
        self._set.close()
        self._sock.close()

    # --- the node -------------------------------------------------------------------------------

    def _end(self, reason: str) -> None:
        """Nothing more will be said here; the control channel knows whether that is the end."""
        log.debug("no more news of peers", extra={"reason": reason})
        self._open = False
        self._set.unregister(self._sock)

    def _obey(self, packet: bytes, fds: Sequence[int]) -> list[News]:
        try:
            message = self._codec.decode(packet)
        except msgspec.MsgspecError as error:
            raise WireError(f"the links channel says nonsense: {error}") from error
        match message:
            case PeerUp():
                if len(fds) != NUM_PEER_FDS:
                    raise WireError(f"{len(fds)} descriptors instead of 2 came with {message}")
                return self._meet(message, fds[0], os.dup(fds[1]))
            case PeerDown(peer=peer, epoch=epoch):
                found = self._peers.get(peer)
                if found is None or found.epoch != epoch:
                    return []
                return self._part(peer, found, "the node says that it is gone")

    def _meet(self, up: PeerUp, pool_fd: int, bell_fd: int) -> list[News]:
        """Tie to a new incarnation; what the one before it said last is heard first."""
        bell = Doorbell(socket.socket(fileno=bell_fd))
        before = self._peers.get(up.peer)
        if before is not None and before.epoch >= up.epoch:
            bell.close()
            return []
        news = [] if before is None else self._part(up.peer, before, "it has a successor")
        try:
            if self._refuses("link.up"):
                raise ValueError("injected at link.up")
            pool = self._transfer.open(up, pool_fd)
        except (ValueError, OSError) as error:
            bell.close()
            self._peers[up.peer] = _Peer(up.epoch, None, None)
            return [*news, Lost(peer=up.peer, epoch=up.epoch, reason=str(error))]
        self._peers[up.peer] = _Peer(up.epoch, pool, bell)
        self._by_fd[bell.fileno()] = up.peer
        self._set.register(bell, select.EPOLLIN)
        return [*news, Opened(peer=up.peer, epoch=up.epoch, pool=pool)]

    # --- peers ----------------------------------------------------------------------------------

    def _listen(self, peer: WorkerId, events: int) -> list[News]:
        found = self._peers[peer]
        bell = found.bell
        if bell is None:
            return []
        if events & select.EPOLLOUT:
            bell.flush()
        news: list[News] = [
            Heard(peer=peer, message=message, payload=payload)
            for message, payload in bell.receive()
        ]
        if bell.failure:
            news.append(self._hang_up(peer, found, bell, bell.failure))
        else:
            self._settle(peer, found)
        return news

    def _part(self, peer: WorkerId, found: _Peer, reason: str) -> list[News]:
        """End the conversation with an incarnation, after its last words."""
        if found.bell is None:
            return []
        news = self._listen(peer, 0)
        if found.bell is not None:
            news.append(self._hang_up(peer, found, found.bell, reason))
        return news

    def _settle(self, peer: WorkerId, found: _Peer) -> None:
        """Wait for room in the doorbell while something is unsent; give up one that failed."""
        bell = found.bell
        if bell is None:
            return
        if bell.failure:
            self._failed.append(self._hang_up(peer, found, bell, bell.failure))
        elif bell.has_unsent != found.writing:
            found.writing = bell.has_unsent
            events = select.EPOLLIN | (select.EPOLLOUT if found.writing else 0)
            self._set.modify(bell, events)

    def _hang_up(self, peer: WorkerId, found: _Peer, bell: Doorbell, reason: str) -> Lost:
        self._set.unregister(bell)
        del self._by_fd[bell.fileno()]
        bell.close()
        found.bell = None
        return Lost(peer=peer, epoch=found.epoch, reason=reason)
