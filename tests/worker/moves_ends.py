"""Workers as the node sees them: their memory, their sockets, a thread or a process behind them."""

import os
import socket
import struct
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from appliance.core.batcher import Batcher
from appliance.core.faults import FaultPlan, FaultRule
from appliance.core.invariants import BatchWatch
from appliance.core.kv_layout import pool_bytes
from appliance.core.messages import Report, WorkerUp
from appliance.core.peer_links import LinkCodec, LinkMessage
from appliance.core.start import WorkerStart
from appliance.core.types import BatcherConfig, WorkerId, WorkerLoad
from appliance.core.wire import FrameBuffer
from appliance.policy import make_policy
from appliance.worker.channel import Channel, Progress, receive_start
from appliance.worker.fault_actions import FaultPoints
from appliance.worker.loop import StepLoop
from appliance.worker.main import OpenedEngine, make_tier, open_engine, open_pool_ties
from appliance.worker.text import TokenText

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "tiny-tasks"
KEY = b"node key"
BLOCK = 16
Wrap = Callable[[OpenedEngine], OpenedEngine]


class Slabs:
    """The memory of one node."""

    def __init__(self, start: WorkerStart, *, block_bytes: int, weight_bytes: int = 0) -> None:
        self.start = start
        self.block_bytes = block_bytes
        self.pools: dict[int, int] = {}
        self.weights: int | None = None
        if weight_bytes:
            self.weights = os.memfd_create("weights")
            os.ftruncate(self.weights, weight_bytes)

    def pool(self, worker: int) -> int:
        if worker not in self.pools:
            self.pools[worker] = fd = os.memfd_create(f"kv-{worker}")
            size = pool_bytes(num_blocks=self.start.num_blocks, block_bytes=self.block_bytes)
            os.ftruncate(fd, size)
        return self.pools[worker]

    def fds(self, worker: int) -> list[int]:
        weights = [] if self.weights is None else [self.weights]
        return [*weights, self.pool(worker)]

    def close(self) -> None:
        for fd in (*self.pools.values(), *([] if self.weights is None else [self.weights])):
            os.close(fd)


class End:
    """The node's ends of one incarnation."""

    def __init__(self, start: WorkerStart, fds: Sequence[int]) -> None:
        self.start = start
        self.node, self.theirs = socket.socketpair()
        self.links, links_theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        record = msgspec.msgpack.encode(start)
        with links_theirs:
            message = [struct.pack("<I", len(record)) + record]
            socket.send_fds(self.node, message, [*fds, links_theirs.fileno()])
        self.buffer = FrameBuffer()
        self.held: deque[tuple[list[Report], bytes]] = deque()
        """Frames that wait for a `Prefilled`."""
        self.up = False
        self.gone = False
        self.load: WorkerLoad | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None
        self.batcher: Batcher | None = None
        self.loop: StepLoop | None = None
        self.engine: OpenedEngine | None = None

    def tell(self, message: LinkMessage, fds: Sequence[int] = ()) -> None:
        with suppress(OSError):
            socket.send_fds(self.links, [LinkCodec().encode(message)], fds)

    def close(self) -> None:
        self.node.close()
        self.links.close()
        self.theirs.close()
        if self.process is not None:
            if self.process.poll() is None:
                self.process.kill()
            self.process.wait(30)


def serve_in_thread(end: End, wrap: Wrap) -> None:
    """What `worker.main` does, in a thread."""
    pool = None
    try:
        start, fds = receive_start(end.theirs)
        plan = FaultPlan(start.faults, worker=start.worker, epoch=start.epoch)
        faults = FaultPoints(plan)
        opened = wrap(open_engine(start, fds, reach=faults.reach))
        pool = open_pool_ties(start, fds, opened=opened, faults=faults)
        assert pool is not None
        for fd in fds:
            os.close(fd)
        channel = Channel(end.theirs)
        batcher = end.batcher = Batcher(
            start.worker,
            start.batcher,
            groups=opened.engine.info.groups,
            policy=make_policy("fcfs", {}).batch,
            inherited=pool.ties.index.inherited,
            checksum=pool.transfer.checksum,
            tier=make_tier(start),
        )
        end.engine = opened
        loop = end.loop = StepLoop(
            start,
            channel=channel,
            engine=opened.engine,
            batcher=batcher,
            tokens=TokenText.load(start.model_dir),
            faults=faults,
            progress=Progress(),
            ties=pool.ties,
            on_idle=opened.on_idle,
            took=opened.took,
            after_step=BatchWatch(batcher).check,
        )
        opened.attend(loop.listen_until)
        up = WorkerUp(
            worker=start.worker,
            epoch=start.epoch,
            groups=opened.engine.info.groups,
            max_num_seqs=start.batcher.max_num_seqs,
            max_batch_tokens=start.batcher.max_batch_tokens,
        )
        channel.send([up])
        if inherited := batcher.announce():
            channel.send(inherited)
        loop.run()
    except Exception as error:
        end.error = error
    finally:
        if pool is not None:
            pool.ties.mover.stop()
            pool.ties.links.close()
        end.theirs.close()


def paced_start(**changes: object) -> WorkerStart:
    start = WorkerStart(
        worker=WorkerId(0),
        epoch=1,
        devices=("paced:0",),
        engine="paced",
        model_dir=str(MODEL),
        dtype="float32",
        batcher=BatcherConfig(max_model_len=1024, max_batch_tokens=128),
        block_tokens=BLOCK,
        num_blocks=96,
        has_weights_fd=False,
        load_weights=False,
        hash_key=KEY,
        profile="fixed-1ms",
        heartbeat_seconds=0.05,
        validate=True,
    )
    return msgspec.structs.replace(start, **changes)


def fault(point: str, action: str, worker: int, **more: object) -> FaultRule:
    return msgspec.convert(
        {"point": point, "action": action, "worker": worker, "epoch": 1, **more}, FaultRule
    )
