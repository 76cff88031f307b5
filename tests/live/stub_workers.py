"""Worker entry points that misbehave in one way each; they run in forked processes."""

import os
import signal
import socket
import sys
import time

from appliance.core.messages import Heartbeat, Report, WorkerUp
from appliance.core.start import WorkerStart
from appliance.core.types import CacheGroupSpec
from appliance.core.wire import report_codec
from appliance.worker.channel import receive_start


def begin(sock: socket.socket) -> tuple[WorkerStart, list[int]]:
    """Hear the start record, say that the worker is up."""
    start, fds = receive_start(sock)
    groups = (CacheGroupSpec(num_blocks=start.num_blocks, block_tokens=start.block_tokens),)
    up = WorkerUp(
        worker=start.worker,
        epoch=start.epoch,
        groups=groups,
        max_num_seqs=start.batcher.max_num_seqs,
        max_batch_tokens=start.batcher.max_batch_tokens,
    )
    say(sock, up)
    return start, fds


def say(sock: socket.socket, *reports: Report, payload: bytes = b"") -> None:
    sock.sendall(report_codec().encode(list(reports), payload))


def deaf(sock: socket.socket) -> None:
    """Alive, idle, and blind to every command."""
    start, _ = begin(sock)
    while True:
        say(sock, Heartbeat(worker=start.worker, step=0))
        time.sleep(0.02)


def mute(sock: socket.socket) -> None:
    """Says nothing after its start, as a process that hangs in a driver."""
    begin(sock)
    time.sleep(3600)


def garbled(sock: socket.socket) -> None:
    """Sends bytes that are no frame."""
    begin(sock)
    sock.sendall(b"\xff" * 64)
    time.sleep(3600)


def bad_payload(sock: socket.socket) -> None:
    """Sends a frame whose payload is not what it should be."""
    start, _ = begin(sock)
    say(sock, Heartbeat(worker=start.worker, step=0), payload=b"\xc1")
    time.sleep(3600)


def hangs_up(sock: socket.socket) -> None:
    """Closes its channel and lives on."""
    begin(sock)
    sock.shutdown(socket.SHUT_RDWR)
    sock.close()
    time.sleep(3600)


def half_a_frame(sock: socket.socket) -> None:
    """Dies in the middle of a frame."""
    start, _ = begin(sock)
    frame = report_codec().encode([Heartbeat(worker=start.worker, step=99)])
    sock.sendall(frame[:-1])
    os.kill(os.getpid(), signal.SIGKILL)


def last_words(sock: socket.socket) -> None:
    """Ends with a cause on its standard error, without a newline."""
    begin(sock)
    sys.stderr.write("first line\n\nthe disk is full; free some space")
    sys.exit(7)


def raises(sock: socket.socket) -> None:
    """Ends with an exception."""
    begin(sock)
    raise RuntimeError("a bug")


def never_ends(sock: socket.socket) -> None:
    """Ignores the orderly end."""
    begin(sock)
    while True:
        time.sleep(60)


def counts_lives(sock: socket.socket) -> None:
    """Adds one to the first byte of its KV slab and shows it as the step of a heartbeat."""
    start, fds = begin(sock)
    pool = fds[start.has_weights_fd]
    life = os.pread(pool, 1, 0)[0] + 1
    os.pwrite(pool, bytes([life]), 0)
    say(sock, Heartbeat(worker=start.worker, step=life))
    while sock.recv(4096):
        pass


def chatters(sock: socket.socket) -> None:
    """Writes to stderr without ever ending a line."""
    begin(sock)
    for _ in range(40):
        os.write(2, b"x" * 16_384)
    while True:
        time.sleep(1)
