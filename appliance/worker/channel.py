"""The worker's end of the control socket: frames, a heart beat, and the two ways in which it ends.

Two threads share the socket. The step loop reads, and sends one frame per step; the heart sends a
beat on a timer, also while a long forward runs (the computing library releases the interpreter
lock). One lock keeps their frames apart. The heart never waits on a full socket: it skips a beat
instead, so it cannot hold up the loop.

The node says goodbye by closing its writing side: the stream ends, and the worker may still send.
A node that has died closes both: the kernel reports a hang-up, which the heart sees at once,
whatever the step loop is doing.
"""

import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence

import msgspec

from appliance.core.messages import Command, Heartbeat, Report
from appliance.core.start import WorkerStart
from appliance.core.types import WorkerId
from appliance.core.wire import FrameBuffer, command_codec, report_codec

RECEIVE_BYTES = 1 << 18
_LENGTH = struct.Struct("<I")
_MAX_START_BYTES = 1 << 24
_MAX_FDS = 16
_GONE = select.POLLHUP | select.POLLERR | select.POLLNVAL


class NodeGone(Exception):
    """The node has died, or has read nothing for very long: there is nobody to work for."""


class Channel:
    """Frames over one connected stream socket.

    `receive`, `wait` and `ended` belong to one thread; `send` and `offer` may be called by any."""

    def __init__(self, sock: socket.socket, *, send_seconds: float = 30.0) -> None:
        """A send that makes no progress for `send_seconds` is given up as `NodeGone`."""
        self._sock = sock
        self._send_seconds = send_seconds
        self._lock = threading.Lock()
        self._encode = report_codec().encode
        self._decode = command_codec().decode
        self._buffer = FrameBuffer()
        self.ended = False
        """The node will send no more (orderly end)."""

    def send(self, reports: Sequence[Report], payload: bytes = b"") -> None:
        """Send one frame. Raises `NodeGone`."""
        frame = self._encode(reports, payload)
        if not self._lock.acquire(timeout=self._send_seconds):
            raise NodeGone(f"another thread has been sending for {self._send_seconds:g} s")
        try:
            self._send_all(memoryview(frame))
        finally:
            self._lock.release()

    def offer(self, reports: Sequence[Report]) -> bool:
        """Send one small frame if that needs no waiting; False if it was not sent."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            if not self._poll(select.POLLOUT, 0) & select.POLLOUT:
                return False
            self._send_all(memoryview(self._encode(reports)))
        finally:
            self._lock.release()
        return True

    def receive(self) -> list[tuple[list[Command], bytes]]:
        """All complete frames that have arrived, without waiting. Sets `ended` at the end of the
        stream; raises `NodeGone` when the node closed both directions, `WireError` on bad bytes."""
        frames: list[tuple[list[Command], bytes]] = []
        while not self.ended:
            try:
                data = self._sock.recv(RECEIVE_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except ConnectionError as error:
                raise NodeGone(str(error)) from error
            if not data:
                if self._poll(0, 0) & _GONE:
                    raise NodeGone("the node closed the connection")
                self.ended = True
                break
            frames.extend(self._decode(frame) for frame in self._buffer.feed(data))
            if len(data) < RECEIVE_BYTES:
                break
        return frames

    def wait(self, seconds: float | None, also: Sequence[int] = ()) -> bool:
        """Sleep until something can be received, or one of `also` can be read (True), or `seconds`
        are over. Resolution: what the kernel's timers give, not milliseconds."""
        if seconds is not None and seconds <= 0:
            return False
        return bool(select.select([self._sock.fileno(), *also], [], [], seconds)[0])

    def watch(self, seconds: float) -> bool:
        """Sleep for `seconds`, less if the node dies meanwhile: True then. For a thread beside the
        one that receives."""
        return bool(self._poll(0, int(seconds * 1000)) & _GONE)

    def _poll(self, events: int, milliseconds: int) -> int:
        poller = select.poll()
        poller.register(self._sock, events)
        return next((happened for _, happened in poller.poll(milliseconds)), 0)

    def _send_all(self, frame: memoryview) -> None:
        while frame:
            try:
                sent = self._sock.send(frame, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                frame = frame[sent:]
            except BlockingIOError:
                happened = self._poll(select.POLLOUT, int(self._send_seconds * 1000))
                if not happened & select.POLLOUT:
                    raise NodeGone(
                        f"the node has read nothing for {self._send_seconds:g} s"
                    ) from None
            except OSError as error:
                raise NodeGone(str(error)) from error


class Progress:
    """What the heart may say of the step loop: written by the loop, read by the heart."""

    __slots__ = ("began", "step")

    def __init__(self) -> None:
        self.step = 0
        """Number of the last finished step."""
        self.began: float | None = None
        """When the running step began; None: idle."""


class Heart(threading.Thread):
    """Beats until stopped, and calls `on_death` once when the node dies."""

    def __init__(
        self,
        channel: Channel,
        progress: Progress,
        *,
        worker: WorkerId,
        seconds: float,
        on_death: Callable[[], None],
    ) -> None:
        super().__init__(name="heart", daemon=True)
        self._channel = channel
        self._progress = progress
        self._worker = worker
        self._seconds = seconds
        self._on_death = on_death
        self._stopped = False

    def run(self) -> None:
        """Beat, watch the node for one interval, and so on."""
        while not self._stopped:
            began, step = self._progress.began, self._progress.step
            in_step = None if began is None else time.monotonic() - began
            try:
                self._channel.offer([Heartbeat(worker=self._worker, step=step, in_step=in_step)])
                gone = self._channel.watch(self._seconds)
            except (NodeGone, ValueError):  # ValueError: the socket was closed on this side
                gone = True
            if gone:
                if not self._stopped:
                    self._on_death()
                return

    def stop(self) -> None:
        """Beat no more; the thread ends within one interval."""
        self._stopped = True


def receive_start(sock: socket.socket) -> tuple[WorkerStart, list[int]]:
    """Read the start record and the descriptors beside it (weight slab if any, slabs that it may be
    copied from, KV pool, links channel if any), waiting for them. Nothing behind the record is
    consumed. Raises `NodeGone` or `ValueError`."""
    head, fds, _, _ = socket.recv_fds(sock, _LENGTH.size, _MAX_FDS)
    for fd in fds:
        os.set_inheritable(fd, False)
    head += _receive_exactly(sock, _LENGTH.size - len(head))
    (size,) = _LENGTH.unpack(head)
    if size > _MAX_START_BYTES:
        raise ValueError(f"start record of {size} bytes is over the limit of {_MAX_START_BYTES}")
    start = msgspec.msgpack.decode(_receive_exactly(sock, size), type=WorkerStart)
    expected = 1 + start.has_weights_fd + len(start.weights.sources)
    if len(fds) not in (expected, expected + 1):
        for fd in fds:
            os.close(fd)
        raise ValueError(
            f"start record came with {len(fds)} descriptors instead of {expected} "
            "(one more with a links channel)"
        )
    return start, list(fds)


def _receive_exactly(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = sock.recv(size - len(data))
        if not part:
            raise NodeGone("the node closed the connection before the worker had started")
        data += part
    return bytes(data)
