"""A worker process from its first byte to its exit status.

`run` is the entry point. The process learns what it is from the start record, opens its engine,
says `WeightsLoaded` and `WorkerUp`, and serves until one of these ends it:

====================================  ==  ====================================================
the node closes its writing side       0  the running step is finished first
the start fails                        3  `Refused(command="Start")` and the last line on stderr
engine, Batcher or protocol fail      70  nothing more is sent; the last line on stderr
the node dies, or reads nothing       71  at once, whatever is being computed
====================================  ==  ====================================================

Ctrl-C and SIGTERM are the node's business: it drains, and then closes its side.
"""

import ctypes
import faulthandler
import gc
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Never

from appliance.core.batcher import Batcher
from appliance.core.blocks import UnsupportedCacheGroup
from appliance.core.faults import FaultPlan
from appliance.core.host_tier import HostTier
from appliance.core.kv_layout import index_offset
from appliance.core.messages import Refused, WeightsLoaded, WorkerUp
from appliance.core.profiles import KV_SLOT_BYTES
from appliance.core.start import WorkerStart
from appliance.core.step_model import StepModel
from appliance.core.types import ErrorKind
from appliance.logs import set_up
from appliance.policy import make_policy
from appliance.worker.channel import Channel, Heart, NodeGone, Progress, receive_start
from appliance.worker.engine import Engine, EngineError
from appliance.worker.fault_actions import FaultPoints
from appliance.worker.host_memory import HostMemory
from appliance.worker.kv_index import OwnIndex, map_own_index
from appliance.worker.links import Links
from appliance.worker.loop import StepLoop
from appliance.worker.mover import Mover
from appliance.worker.moves import Ties
from appliance.worker.paced_engine import PacedEngine
from appliance.worker.text import TokenText
from appliance.worker.transfer import SharedMemoryTransfer, Transfer

log = logging.getLogger(__name__)

EXIT_START = 3
EXIT_FAILED = 70
EXIT_ORPHANED = 71

_PR_SET_PDEATHSIG = 1
_MEMORY_WORDS = ("out of memory", "can't allocate memory", "cannot allocate memory")


def run(sock: socket.socket) -> None:
    """Serve the node at the other end of `sock`; returns at the orderly end only."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    _die_with_parent()
    faulthandler.enable()
    try:
        start, fds = receive_start(sock)
    except NodeGone:
        os._exit(EXIT_ORPHANED)
    _Worker(sock, start).serve(fds)


class _Worker:
    """The parts of one worker process, put together."""

    def __init__(self, sock: socket.socket, start: WorkerStart) -> None:
        self._start = start
        set_up(style="json" if start.log_json else "human", level=start.log_level)
        _name_records(start)
        self._channel = Channel(sock)
        self._progress = Progress()
        self._heart = Heart(
            self._channel,
            self._progress,
            worker=start.worker,
            seconds=start.heartbeat_seconds,
            on_death=lambda: os._exit(EXIT_ORPHANED),
        )

    def serve(self, fds: Sequence[int]) -> None:
        """Start, work, end. Every way out but the orderly one leaves the process here."""
        self._heart.start()
        try:
            loop = self._open(fds)
        except NodeGone:
            os._exit(EXIT_ORPHANED)
        except Exception as error:
            self._give_up_start(error)
        try:
            loop.run()
        except NodeGone as gone:
            log.warning("the node has gone", extra={"cause": str(gone)})
            os._exit(EXIT_ORPHANED)
        except Exception as error:
            self._fail(error)
        self._heart.stop()
        log.debug("the node has ended this worker")

    def _open(self, fds: Sequence[int]) -> StepLoop:
        start, began = self._start, time.monotonic()
        faults = FaultPoints(FaultPlan(start.faults, worker=start.worker, epoch=start.epoch))
        faults.reach("worker.start")
        policy = make_policy(start.policy, start.policy_settings)
        try:
            opened = open_engine(start, fds, reach=faults.reach)
            faults.reach("worker.weights")
            pool = open_pool_ties(start, fds, opened=opened, faults=faults)
        finally:
            for fd in fds:
                os.close(fd)
        engine = opened.engine
        batcher = Batcher(
            start.worker,
            start.batcher,
            groups=engine.info.groups,
            policy=policy.batch,
            role=start.role,
            inherited=None if pool is None else pool.ties.index.inherited,
            checksum=pool.transfer.checksum if pool is not None and start.validate else None,
            tier=make_tier(start),
            steps=StepModel(start.steps),
        )
        loop = StepLoop(
            start,
            channel=self._channel,
            engine=engine,
            batcher=batcher,
            tokens=TokenText.load(start.model_dir),
            faults=faults,
            progress=self._progress,
            ties=None if pool is None else pool.ties,
            on_idle=opened.on_idle,
            took=opened.took,
            after_step=_laws_of(batcher) if start.validate else _nothing,
        )
        opened.attend(loop.listen_until)
        gc.collect()
        gc.freeze()  # what lives now lives for ever: the collector need not look at it
        seconds = time.monotonic() - began
        self._announce(engine, batcher, seconds)
        return loop

    def _announce(self, engine: Engine, batcher: Batcher, seconds: float) -> None:
        start, info = self._start, engine.info
        for note in info.notes:
            log.info("engine: %s", note)
        log.info("worker is ready", extra={"seconds": seconds, "weights": info.weights_source})
        loaded = WeightsLoaded(
            worker=start.worker,
            source=info.weights_source,
            seconds=info.weights_seconds,
            num_bytes=info.weights_bytes,
            notes=info.weights_notes,
            fingerprint=info.weights_fingerprint,
        )
        up = WorkerUp(
            worker=start.worker,
            epoch=start.epoch,
            groups=info.groups,
            max_num_seqs=start.batcher.max_num_seqs,
            max_batch_tokens=start.batcher.max_batch_tokens,
            role=start.role,
        )
        self._channel.send([loaded])
        self._channel.send([up])
        if inherited := batcher.announce():
            self._channel.send(inherited)

    def _give_up_start(self, error: Exception) -> Never:
        log.error("worker cannot start", exc_info=error)
        line = last_line(self._start, error)
        refused = Refused(
            worker=self._start.worker, command="Start", kind=ErrorKind.INTERNAL, reason=line
        )
        with suppress(NodeGone):
            self._channel.send([refused])
        _leave(EXIT_START, line)

    def _fail(self, error: Exception) -> Never:
        log.error("worker has failed", exc_info=error)
        _leave(EXIT_FAILED, last_line(self._start, error))


Attend = Callable[[Callable[[float], None]], None]


def _nothing(*_: object) -> None:
    """A hook that an engine has no use for."""


@dataclass(frozen=True)
class OpenedEngine:
    """An engine, its KV blocks, and how it wants to be treated."""

    engine: Engine
    memory: memoryview
    block_bytes: int
    on_idle: Callable[[], None] = _nothing
    """To be called when nothing is to be computed."""
    attend: Attend = _nothing
    """Wants to be told how to wait."""
    took: Callable[[], float] | None = None
    """Seconds of the last step by the device's own clock; None: it has none."""


def open_engine(
    start: WorkerStart, fds: Sequence[int], *, reach: Callable[[str], None]
) -> OpenedEngine:
    """The engine that the record names. The descriptors stay open; the engine has mapped what is
    behind them. `reach` is told of the places at which a fault may be injected.

    Raises `ValueError` for an unknown engine, and what the engine raises."""
    weight_fds, kv_fd = fds[: _kv_place(start)], fds[_kv_place(start)]
    match start.engine:
        case "paced":
            paced = PacedEngine.open(start, weights_fd=None, kv_fd=kv_fd)
            size = KV_SLOT_BYTES * start.block_tokens
            return OpenedEngine(
                paced, paced.memory, size, paced.rest, paced.wait_with, took=paced.took
            )
        case "torch":
            if not weight_fds:
                raise ValueError("the torch engine needs the descriptor of a weight slab")
            from appliance.worker.torch_engine import TorchEngine

            own, *sources = weight_fds
            engine = TorchEngine.open(
                start, weights_fd=own, source_fds=sources, kv_fd=kv_fd, reach=reach
            )
            return OpenedEngine(engine, engine.pool.buffer, engine.pool.block_bytes)
        case other:
            raise ValueError(f"unknown engine {other!r}; use 'torch' or 'paced'")


@dataclass(frozen=True)
class PoolTies:
    """What lets KV move to and from this worker's pool."""

    ties: Ties
    transfer: Transfer


def open_pool_ties(
    start: WorkerStart, fds: Sequence[int], *, opened: OpenedEngine, faults: FaultPoints
) -> PoolTies | None:
    """Open the index of the engine's pool, and the links channel. None when the record came without
    one: a worker without peers. The descriptors stay open.

    Raises `IndexMismatch`, and `ValueError` or `OSError` when there can be no host tier."""
    place = _kv_place(start)
    if len(fds) <= place + 1:
        if start.host_blocks:
            raise ValueError("a host tier (kv.host_memory) needs the links channel")
        return None
    num_blocks, block_bytes = start.num_blocks, opened.block_bytes
    offset = index_offset(num_blocks=num_blocks, block_bytes=block_bytes)
    mapped = map_own_index(fds[place], num_blocks=num_blocks, offset=offset)
    index = OwnIndex(mapped, num_blocks=num_blocks, block_bytes=block_bytes, epoch=start.epoch)
    transfer = SharedMemoryTransfer(opened.memory, num_blocks=num_blocks, block_bytes=block_bytes)
    channel = socket.socket(fileno=os.dup(fds[place + 1]))
    links = Links(channel, transfer, refuses=faults.refuses)
    mover = Mover(checksum=transfer.checksum, faults=faults)
    host = None
    if start.host_blocks:
        host = HostMemory(
            opened.memory, num_blocks=num_blocks, block_bytes=block_bytes, slots=start.host_blocks
        )
    return PoolTies(Ties(index=index, links=links, mover=mover, host=host), transfer)


def make_tier(start: WorkerStart) -> HostTier | None:
    """The books of the host tier, if there is one."""
    return HostTier(start.host_blocks) if start.host_blocks else None


def _kv_place(start: WorkerStart) -> int:
    """Where the descriptor of the KV pool stands; that of the links channel is the next."""
    return start.has_weights_fd + len(start.weights.sources)


def _laws_of(batcher: Batcher) -> Callable[[], None]:
    """What `--validate` checks after each step."""
    from appliance.core.invariants import BatchWatch

    return BatchWatch(batcher).check


def last_line(start: WorkerStart, error: Exception) -> str:
    """One line that names worker, device, cause and what to do."""
    who = f"worker {start.worker} on {', '.join(start.devices)}"
    what = " ".join(str(error).split()) or type(error).__name__
    if any(words in what.lower() for words in _MEMORY_WORDS) or isinstance(error, MemoryError):
        what = what.removesuffix(".")
        advice = "" if "lower " in what else "; lower [kv] memory or [batch] max_batch_tokens"
        return f"{who}: {what}{advice}"
    if isinstance(error, EngineError | OSError | ValueError | UnsupportedCacheGroup):
        return f"{who}: {what}"
    return f"{who}: {type(error).__name__}: {what}; a defect, please report the traceback above"


def _leave(code: int, line: str) -> Never:
    print(line, file=sys.stderr, flush=True)  # noqa: T201 - the last line, in plain words
    os._exit(code)


def _name_records(start: WorkerStart) -> None:
    """Every log record of this process says which worker speaks."""

    def add_worker(record: logging.LogRecord) -> bool:
        record.worker = start.worker
        return True

    for handler in logging.getLogger().handlers:
        handler.addFilter(add_worker)


def _die_with_parent() -> None:
    """Backstop for a node that dies so that nobody closes the socket: the kernel kills this process
    with the fork server, which ends with the node."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
