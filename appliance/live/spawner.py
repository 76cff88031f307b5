"""The server's end of the fork server: ask for workers, hear of their exits.

`Spawner(preload)` starts the fork server and returns at once, so that its imports overlap with
the rest of the start-up; call it on the main thread and before any other thread exists. `attach`
connects it to the event loop. A fork server that dies takes its workers with it (they are killed,
all exits are reported) and is started anew by the next `spawn`.
"""

import asyncio
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

import msgspec

from appliance.core.types import Record
from appliance.live.forkserver import (
    MESSAGE_BYTES,
    Answer,
    Exited,
    Ready,
    Spawn,
    Spawned,
    boot_arguments,
)

CLOSE_SECONDS = 0.5


class SpawnRequest(Record, frozen=True, kw_only=True):
    """A worker to be forked. `channel` and `stderr` are descriptors that the caller keeps
    owning."""

    entry: str
    name: str
    channel: int
    stderr: int


class ProcessEvents(Protocol):
    """What the owner of a spawned process hears. Every process is first spawned, then exits
    once; one that could not be forked only exits."""

    def spawned(self, pid: int) -> None:
        """The process exists."""

    def exited(self, status: int | None) -> None:
        """It has ended with this wait status (None: its fork server died and it was killed)."""


class Spawner:
    """One fork server and the processes it has forked."""

    def __init__(self, preload: Sequence[str]) -> None:
        self._preload = tuple(preload)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._next_key = 0
        self._events: dict[int, ProcessEvents] = {}
        self._pids: dict[int, int] = {}
        self.is_ready = False
        """The present fork server has done its imports."""
        self._start()

    @property
    def pid(self) -> int:
        """Process id of the fork server."""
        return self._process.pid

    def attach(self, loop: asyncio.AbstractEventLoop, on_ready: Callable[[], None]) -> None:
        """Hear the fork server on this loop; `on_ready` is called when its imports are done."""
        self._loop = loop
        self._on_ready = on_ready
        loop.add_reader(self._channel.fileno(), self._readable)

    def spawn(self, request: SpawnRequest, events: ProcessEvents) -> None:
        """Fork a worker; the answer comes through `events`."""
        if self._loop is None:
            raise RuntimeError("attach the spawner to a loop before the first spawn")
        if self._channel.fileno() < 0:
            self._start()
            self._loop.add_reader(self._channel.fileno(), self._readable)
        key = self._next_key
        self._next_key += 1
        self._events[key] = events
        message = self._encoder.encode(Spawn(key=key, entry=request.entry, name=request.name))
        try:
            socket.send_fds(self._channel, [message], [request.channel, request.stderr])
        except OSError:
            self._loop.call_soon(self._lost)

    def kill(self) -> None:
        """SIGKILL the fork server. Its workers are lost with it, and the next spawn starts another
        one."""
        self._process.kill()

    def close(self) -> None:
        """End the fork server and whatever it still has as children; returns when it is reaped."""
        self._disconnect()
        try:
            self._process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:  # still at its imports: it has no children yet
            self._process.kill()
            self._process.wait()

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                boot_arguments(theirs.fileno(), self._preload),
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        ours.setblocking(False)
        self._channel = ours
        self.is_ready = False

    def _disconnect(self) -> None:
        if self._loop is not None and self._channel.fileno() >= 0:
            self._loop.remove_reader(self._channel.fileno())
        self._channel.close()

    def _readable(self) -> None:
        while self._channel.fileno() >= 0:
            try:
                data = self._channel.recv(MESSAGE_BYTES)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._lost()
                return
            self._handle(self._decoder.decode(data))

    def _handle(self, answer: Answer) -> None:
        match answer:
            case Ready():
                self.is_ready = True
                self._on_ready()
            case Spawned(key=key, pid=pid):
                self._pids[key] = pid
                self._events[key].spawned(pid)
            case Exited(key=key, status=status):
                self._pids.pop(key, None)  # none if it could not be forked
                self._events.pop(key).exited(status)

    def _lost(self) -> None:
        """The fork server has died: nothing it forked can be watched any more."""
        if self._channel.fileno() < 0:
            return
        self._disconnect()
        self._process.kill()
        self._process.wait()
        for pid in self._pids.values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        events, self._events, self._pids = list(self._events.values()), {}, {}
        for each in events:
            each.exited(None)
