"""A process that has the imports done and forks workers in milliseconds.

The server starts it first of all, as an ordinary child, and asks it for workers over a socket
pair whose messages keep their borders (`SOCK_SEQPACKET`). A request names an entry point and
carries descriptors; the answer is a pid, and later the exit status, because the fork server is
the parent of all workers. It never touches a device, runs no thread and keeps nothing of what it
forks.

Three properties are why it is our own and not that of `multiprocessing`: it has no name in the
file system (nothing to collide, nothing left behind after a SIGKILL), a worker does not import
the server's main module, and nothing is pickled.

Death: end-of-file on the request socket means that the server is gone; every worker is killed,
stopped ones too, and the fork server ends. A parent-death signal covers the time of its imports.
"""

import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence

import msgspec

from appliance.core.types import Record

BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from appliance.live.forkserver import serve; serve(sys.argv[2:])"
)
MESSAGE_BYTES = 4096
_PR_SET_PDEATHSIG = 1
_NOT_FORKED = 1 << 8
"""Wait status of a worker that could not be forked: exit code 1."""
_FORK_FIX = "use fewer devices (--devices), or give this user more memory or processes"


class Spawn(Record, frozen=True, kw_only=True, tag=True):
    """Fork a worker. Descriptors beside it: its channel, then the write end of its stderr pipe."""

    key: int
    entry: str
    """`module:function`; called with the channel as a socket."""
    name: str


class Ready(Record, frozen=True, kw_only=True, tag=True):
    """The imports are done."""


class Spawned(Record, frozen=True, kw_only=True, tag=True):
    """The worker of this key is a process now."""

    key: int
    pid: int


class Exited(Record, frozen=True, kw_only=True, tag=True):
    """The worker of this key has ended, or could not be forked; `status` as of `os.waitpid`."""

    key: int
    status: int


Answer = Ready | Spawned | Exited


def describe_exit(status: int) -> str:
    """Words for a wait status: `exit code 3` or `killed by SIGSEGV`."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def serve(arguments: Sequence[str]) -> None:
    """Main function of the fork server: request socket's descriptor and pid of the server, then the
    modules to import. Returns when the server has gone and all workers have been killed."""
    descriptor, parent, *preload = arguments
    _die_with_parent(int(parent))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with socket.socket(fileno=int(descriptor)) as channel:
        for module in preload:
            try:
                importlib.import_module(module)
            except ImportError:
                traceback.print_exc()
        gc.collect()
        gc.freeze()
        _Server(channel).run()


def _die_with_parent(parent: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


class _Server:
    """The loop: answer requests, report exits, until the request socket ends."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Spawn)
        self._keys: dict[int, int] = {}
        """Key of every living worker by pid."""

    def run(self) -> None:
        wake_r, wake_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        poller = select.poll()
        poller.register(self._channel.fileno(), select.POLLIN)
        poller.register(wake_r, select.POLLIN)
        try:
            self._say(Ready())
            while True:
                ready = {fd for fd, _ in poller.poll()}
                if wake_r in ready:
                    os.read(wake_r, 4096)
                self._reap()
                if self._channel.fileno() in ready and not self._answer((wake_r, wake_w)):
                    return
        except (BrokenPipeError, ConnectionResetError):
            return
        finally:
            for pid in self._keys:
                os.kill(pid, signal.SIGKILL)

    def _answer(self, wakeup_fds: tuple[int, int]) -> bool:
        """Carry out one request; False at the end of the requests."""
        data, descriptors, _, _ = socket.recv_fds(self._channel, MESSAGE_BYTES, 4)
        if not data:
            return False
        request = self._decoder.decode(data)
        worker_fd, stderr_fd = descriptors
        try:
            pid = os.fork()
        except OSError as error:  # this worker cannot be had now; the others live on
            os.write(stderr_fd, f"cannot fork: {error.strerror}; {_FORK_FIX}\n".encode())
            for fd in descriptors:
                os.close(fd)
            self._say(Exited(key=request.key, status=_NOT_FORKED))
            return True
        if pid == 0:
            signal.set_wakeup_fd(-1)
            for fd in (*wakeup_fds, self._channel.detach()):
                os.close(fd)
            _become_worker(request, worker_fd, stderr_fd)
        for fd in descriptors:
            os.close(fd)
        self._keys[pid] = request.key
        self._say(Spawned(key=request.key, pid=pid))
        return True

    def _reap(self) -> None:
        while self._keys:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            self._say(Exited(key=self._keys.pop(pid), status=status))

    def _say(self, answer: Answer) -> None:
        self._channel.send(self._encoder.encode(answer))


def _become_worker(request: Spawn, worker_fd: int, stderr_fd: int) -> None:
    """Run the entry point in the forked child; never returns."""
    code = 1
    try:
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(stderr_fd, 2)
        os.close(stderr_fd)
        _name_process(request.name)
        resolve_entry(request.entry)(socket.socket(fileno=worker_fd))
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def resolve_entry(entry: str) -> Callable[[socket.socket], object]:
    """The function that `module:function` names. Raises `ImportError` or `AttributeError`."""
    module, _, function = entry.partition(":")
    found: Callable[[socket.socket], object] = getattr(importlib.import_module(module), function)
    return found


def _name_process(name: str) -> None:
    """Show `name` in process lists (15 bytes at most)."""
    with open("/proc/self/comm", "w") as comm:
        comm.write(name[:15])


def boot_arguments(descriptor: int, preload: Sequence[str]) -> list[str]:
    """The command line of a fork server for this process."""
    path = json.dumps(sys.path)
    return [sys.executable, "-c", BOOT, path, str(descriptor), str(os.getpid()), *preload]
