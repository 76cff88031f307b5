"""One life of one worker: its process, its channel, its last words, and how it ended.

The channel is a socket pair of this incarnation alone, so a frame can never belong to another
one. A life ends when the process has exited *and* its channel is read to the end; whichever comes
first waits a moment for the other, because the exit status is the better cause of death. A
channel that ends while the process lives means a broken worker: it is killed. A worker that the
node kills is not listened to any more.
"""

import asyncio
import os
import signal
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import cast

import msgspec

from appliance.core.messages import Command, Report
from appliance.core.start import WorkerStart
from appliance.core.types import Record
from appliance.core.wire import FrameBuffer, FrameCodec, WireError
from appliance.live.forkserver import describe_exit
from appliance.live.spawner import Spawner, SpawnRequest

EXIT_GRACE = 0.05
"""Seconds between the end of the channel and the kill of a process that has not exited."""
GIVE_UP = 1.0
"""Seconds after which a killed process that does not go away is no longer waited for."""
MAX_LINE_BYTES = 64 * 1024
"""A longer line on a worker's stderr is cut into several."""
_LENGTH = struct.Struct("<I")


class Codecs(Record, frozen=True, kw_only=True):
    """The coders of the control channel, shared by all incarnations."""

    commands: FrameCodec[Command]
    reports: FrameCodec[Report]


class Death(Record, frozen=True, kw_only=True):
    """How a life ended. `confirmed`: the process is known to be gone, its slabs are safe to
    reuse."""

    cause: str
    confirmed: bool


class Incarnation(asyncio.Protocol):
    """A worker process from its start to its death. Not reused."""

    def __init__(
        self,
        start: WorkerStart,
        *,
        codecs: Codecs,
        clock: Callable[[], float],
        on_frame: Callable[["Incarnation", list[Report], bytes], None],
        on_stderr: Callable[["Incarnation", str], None],
        on_death: Callable[["Incarnation", Death], None],
    ) -> None:
        self.start = start
        self.pid: int | None = None
        self.spawned_at: float | None = None
        self.heard_at = clock()
        """When the last bytes came (or the process was born)."""
        self._codecs = codecs
        self._clock = clock
        self._on_frame, self._on_stderr, self._on_death = on_frame, on_stderr, on_death
        self._loop = asyncio.get_running_loop()
        self._buffer = FrameBuffer()
        self._transport: asyncio.WriteTransport | None = None
        self._unsent: list[bytes] = []
        self._closing = False
        self._killed_for: str | None = None
        self._channel_ended = False
        self._status: int | None = None
        self._exited = False
        self._over = False
        """Its death has been reported."""
        self._timer: asyncio.TimerHandle | None = None
        self._stderr_fd = -1
        self._half_line = b""
        self._last_words: deque[str] = deque(maxlen=20)
        self._connecting: asyncio.Task[None] | None = None

    def is_deaf(self) -> bool:
        """The node has given it up: nothing it says counts any more."""
        return self._killed_for is not None

    # --- birth ---------------------------------------------------------------------------------

    def launch(self, spawner: Spawner, *, entry: str, fds: Sequence[int]) -> None:
        """Fork the process and tell it what it is. `fds` (its slabs) stay the caller's.

        Raises `OSError`; then nothing was started and nothing is left open."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            stderr_read, stderr_write = os.pipe2(os.O_CLOEXEC)
        except OSError:
            ours.close()
            theirs.close()
            raise
        os.set_blocking(stderr_read, False)
        record = msgspec.msgpack.encode(self.start)
        try:
            socket.send_fds(ours, [_LENGTH.pack(len(record)) + record], list(fds))
            name = f"appliance-w{self.start.worker}"
            spawner.spawn(
                SpawnRequest(entry=entry, name=name, channel=theirs.fileno(), stderr=stderr_write),
                self,
            )
        except OSError:
            ours.close()
            os.close(stderr_read)
            raise
        finally:
            theirs.close()
            os.close(stderr_write)
        self._stderr_fd = stderr_read
        self._loop.add_reader(stderr_read, self._read_stderr)
        ours.setblocking(False)
        self._connecting = self._loop.create_task(self._connect(ours))

    async def _connect(self, ours: socket.socket) -> None:
        await self._loop.create_unix_connection(lambda: self, sock=ours)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's is not a subclass
        for frame in self._unsent:
            self._transport.write(frame)
        self._unsent.clear()
        if self._closing:
            self._transport.write_eof()
        if self._killed_for is not None or self._over:
            self._transport.abort()

    def spawned(self, pid: int) -> None:
        """The fork server has forked it."""
        self.pid = pid
        self.spawned_at = self.heard_at = self._clock()
        if self._killed_for is not None:
            self._send_kill()

    # --- life ----------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self.is_deaf():
            return
        self.heard_at = self._clock()
        try:
            for frame in self._buffer.feed(data):
                reports, payload = self._codecs.reports.decode(frame)
                self._on_frame(self, reports, payload)
                if self.is_deaf():
                    return
        except WireError as error:
            self.kill(f"it broke the protocol: {error}")

    def send(self, command: Command, payload: bytes = b"") -> None:
        """Send one command; a life that is ending hears nothing any more."""
        if self._killed_for is not None or self._channel_ended or self._closing:
            return
        frame = self._codecs.commands.encode([command], payload)
        if self._transport is None:
            self._unsent.append(frame)
        else:
            self._transport.write(frame)

    def finish(self) -> None:
        """Ask for an orderly end: the worker exits after its running step."""
        if self._closing:
            return
        self._closing = True
        if self._transport is not None and not self._channel_ended:
            self._transport.write_eof()

    # --- death ---------------------------------------------------------------------------------

    def kill(self, reason: str) -> None:
        """End it at once; nothing it still says is heard. Its death is reported when it is gone."""
        if self._over or self._killed_for is not None:
            return
        self._killed_for = reason
        if self._transport is not None:
            self._transport.abort()
        self._send_kill()
        self._wait(GIVE_UP, self._end)

    def connection_lost(self, exc: Exception | None) -> None:
        del exc  # the exit status says more
        self._channel_ended = True
        if self._exited:
            self._end()
        elif self._killed_for is None:
            self._wait(EXIT_GRACE, lambda: self.kill("it closed its channel and did not exit"))

    def exited(self, status: int | None) -> None:
        """The fork server has reaped it (None: the fork server itself died)."""
        self._exited = True
        self._status = status
        if self._channel_ended or self._killed_for is not None:
            self._end()
        else:
            self._wait(EXIT_GRACE, self._end)

    def _send_kill(self) -> None:
        if self.pid is not None and not self._exited:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def _wait(self, seconds: float, then: Callable[[], None]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(seconds, then)

    def _end(self) -> None:
        if self._over:
            return
        self._over = True
        if self._timer is not None:
            self._timer.cancel()
        if self._transport is not None:
            self._transport.abort()
        self._close_stderr()
        self._on_death(self, Death(cause=self._cause(), confirmed=self._exited))

    def _cause(self) -> str:
        if self._killed_for is not None:
            return f"killed by the node: {self._killed_for}"
        if self._status is None:
            return "the fork server died"
        how = describe_exit(self._status)
        chosen = os.WIFEXITED(self._status) and bool(self._last_words)
        return f"{how}: {self._last_words[-1]}" if chosen else how

    # --- last words ----------------------------------------------------------------------------

    def _read_stderr(self) -> None:
        try:
            data = os.read(self._stderr_fd, 1 << 16)
        except BlockingIOError:
            return
        if not data:
            self._loop.remove_reader(self._stderr_fd)
            return
        *lines, self._half_line = (self._half_line + data).split(b"\n")
        if len(self._half_line) > MAX_LINE_BYTES:
            lines.append(self._half_line)
            self._half_line = b""
        self._say_lines(lines)

    def _say_lines(self, lines: Sequence[bytes]) -> None:
        for line in lines:
            text = line.decode(errors="replace").rstrip()
            if text:
                self._last_words.append(text)
                self._on_stderr(self, text)

    def _close_stderr(self) -> None:
        if self._stderr_fd < 0:
            return
        self._loop.remove_reader(self._stderr_fd)
        self._read_stderr()
        self._say_lines([self._half_line])
        os.close(self._stderr_fd)
        self._stderr_fd = -1
