"""Two step loops in threads that hand a sequence from one to the other, with a clock at both ends.

The engines are paced, all else is the product. The thread that plays the node sleeps while a
sequence moves, so that it takes no time from the loops.
"""

import os
import socket
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from appliance.core.batcher import Batcher
from appliance.core.faults import FaultPlan
from appliance.core.kv_layout import index_offset, pool_bytes
from appliance.core.messages import (
    Assign,
    Command,
    KvPulled,
    LinkUp,
    Migrate,
    Pull,
    Release,
    Released,
    Report,
    StepReported,
)
from appliance.core.payload import Sampling, SequenceState
from appliance.core.peer_links import LinkCodec, PeerUp
from appliance.core.start import WorkerStart
from appliance.core.types import (
    BatcherConfig,
    MoveId,
    Record,
    Request,
    RequestId,
    StepPlan,
    WorkerId,
)
from appliance.core.wire import FrameBuffer, command_codec, report_codec
from appliance.policy import make_policy
from appliance.worker.channel import Channel, Progress
from appliance.worker.engine import SampledToken
from appliance.worker.fault_actions import FaultPoints
from appliance.worker.loop import StepLoop
from appliance.worker.main import open_engine, open_pool_ties
from appliance.worker.text import TokenText
from appliance.worker.transfer import SharedPool

MODEL = Path(__file__).resolve().parents[1] / "models" / "tiny-tasks"
BLOCK_TOKENS = 16
BLOCK_BYTES = 8 * BLOCK_TOKENS
SOURCE, TARGET = WorkerId(0), WorkerId(1)
ANSWER_TOKENS = 6


class HandedOff(Record, frozen=True, kw_only=True):
    """Seconds of one hand-off."""

    landed_to_step: float
    """From the end of the copy of the last block to the first step with the sequence."""
    stopped_to_pulled: float
    """From the source's stop to the target's report."""


class Times:
    """When the last copy into the target ended, and when its engine began each step."""

    def __init__(self) -> None:
        self.landed = 0.0
        self.first_step = 0.0
        """The first one after `landed`."""


class _Side:
    """One worker and the node's ends of its channels."""

    def __init__(self, start: WorkerStart, pool: int) -> None:
        self.start = start
        self.node, self.theirs = socket.socketpair()
        self.node.settimeout(30)
        self.links, self.links_theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pool = pool
        self.reports: list[Report] = []
        self._encode, self._codec = command_codec().encode, report_codec()
        self._buffer = FrameBuffer()
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.times: Times | None = None
        self.error: Exception | None = None
        self.up = threading.Event()

    def _serve(self) -> None:
        try:
            loop = self._loop()
            self.up.set()
            loop.run()
        except Exception as error:
            self.error = error
            self.theirs.close()
            self.up.set()

    def _loop(self) -> StepLoop:
        start = self.start
        fds = [os.dup(self.pool), self.links_theirs.detach()]
        faults = FaultPoints(FaultPlan((), worker=start.worker, epoch=1))
        opened = open_engine(start, fds, reach=faults.reach)
        ties = open_pool_ties(start, fds, opened=opened, faults=faults)
        if ties is None:
            raise RuntimeError("a worker with a links channel has no ties")
        for fd in fds:
            os.close(fd)
        if self.times is not None:
            self._watch(opened.engine, self.times)
        batcher = Batcher(
            start.worker,
            start.batcher,
            groups=opened.engine.info.groups,
            policy=make_policy("fcfs", {}).batch,
        )
        loop = StepLoop(
            start,
            channel=Channel(self.theirs),
            engine=opened.engine,
            batcher=batcher,
            tokens=TokenText.load(start.model_dir),
            faults=faults,
            progress=Progress(),
            ties=ties.ties,
            on_idle=opened.on_idle,
        )
        opened.attend(loop.listen_until)
        return loop

    def _watch(self, engine: object, times: Times) -> None:
        """Note when the engine begins a step."""
        execute: Callable[[StepPlan], Sequence[SampledToken]] = engine.execute  # type: ignore[attr-defined]

        def timed(plan: StepPlan) -> Sequence[SampledToken]:
            if not times.first_step and times.landed:
                times.first_step = time.perf_counter()
            return execute(plan)

        engine.execute = timed  # type: ignore[attr-defined]

    def send(self, command: Command, payload: bytes = b"") -> None:
        self.node.sendall(self._encode([command], payload))

    def until(self, done: Callable[[], bool]) -> None:
        while not done():
            if self.error is not None:
                raise self.error
            data = self.node.recv(1 << 18)
            for frame in self._buffer.feed(data):
                self.reports += self._codec.decode(frame)[0]

    def close(self) -> None:
        self.node.shutdown(socket.SHUT_WR)
        self.thread.join(10)
        for sock in (self.node, self.theirs, self.links):
            sock.close()


class Pair:
    """A source and a target."""

    def __init__(self, *, max_model_len: int) -> None:
        num_blocks = 2 * max_model_len // BLOCK_TOKENS
        size = pool_bytes(num_blocks=num_blocks, block_bytes=BLOCK_BYTES)
        self._times = Times()
        self._real_copy = SharedPool.copy
        self._sides: list[_Side] = []
        for worker in (SOURCE, TARGET):
            pool = os.memfd_create(f"kv-{worker}")
            os.ftruncate(pool, size)
            self._sides.append(_Side(_start(worker, num_blocks, max_model_len), pool))
        self._source, self._target = self._sides
        self._target.times = self._times
        self._time_copies()
        for side in self._sides:
            side.thread.start()
        for side in self._sides:  # a pool has its index when its worker is up
            side.up.wait(30)
        self._introduce(num_blocks)

    def _time_copies(self) -> None:
        real, times = self._real_copy, self._times

        def timed(
            pool: SharedPool, sources: Sequence[int], targets: Sequence[int]
        ) -> Iterator[None]:
            yield from real(pool, sources, targets)
            times.first_step = 0.0
            times.landed = time.perf_counter()

        SharedPool.copy = timed  # type: ignore[method-assign,assignment]

    def _introduce(self, num_blocks: int) -> None:
        one, two = socket.socketpair()
        with one, two:
            for side, peer, bell in (
                (self._source, self._target, one),
                (self._target, self._source, two),
            ):
                up = PeerUp(
                    peer=peer.start.worker,
                    epoch=1,
                    num_blocks=num_blocks,
                    block_bytes=BLOCK_BYTES,
                    index_offset=index_offset(num_blocks=num_blocks, block_bytes=BLOCK_BYTES),
                )
                packet = LinkCodec().encode(up)
                socket.send_fds(side.links, [packet], [peer.pool, bell.fileno()])
        for side in self._sides:
            side.until(lambda side=side: _has(side.reports, LinkUp))  # type: ignore[misc]

    def hand_off(self, number: int, *, prompt_tokens: int) -> HandedOff:
        """Serve one request whose prompt is computed by the source and whose answer by the
        target."""
        ids = array("i", [(7 * number + place) % 900 + 10 for place in range(prompt_tokens)])
        sampling = Sampling(temperature=0.0, ignore_eos=True)
        state = SequenceState(prompt=ids.tobytes(), sampling=sampling, salt=str(number))
        payload = msgspec.msgpack.encode(state)
        request = Request(
            id=RequestId(number),
            arrived=float(number),
            prompt_tokens=prompt_tokens,
            max_tokens=ANSWER_TOKENS,
        )
        move, id_ = MoveId(number), request.id
        pull = Pull(worker=TARGET, move=move, request=request, source=SOURCE)
        migrate = Migrate(worker=SOURCE, move=move, request_id=id_, target=TARGET)
        self._times.landed = self._times.first_step = 0.0
        for side in self._sides:
            side.reports.clear()
        self._target.send(pull, payload)
        self._source.send(Assign(worker=SOURCE, request=request), payload)
        self._source.send(migrate)
        time.sleep(0.15 + prompt_tokens * 3e-5)
        self._target.until(lambda: _finished(self._target.reports, id_))
        (pulled,) = (report for report in self._target.reports if isinstance(report, KvPulled))
        self._source.send(Release(worker=SOURCE, move=move, request_id=id_))
        self._source.until(lambda: _has(self._source.reports, Released))
        return HandedOff(
            landed_to_step=self._times.first_step - self._times.landed,
            stopped_to_pulled=pulled.seconds,
        )

    def close(self) -> None:
        """End both workers."""
        SharedPool.copy = self._real_copy  # type: ignore[method-assign]
        for side in self._sides:
            side.close()
            os.close(side.pool)


def _start(worker: WorkerId, num_blocks: int, max_model_len: int) -> WorkerStart:
    return WorkerStart(
        worker=worker,
        epoch=1,
        devices=(f"paced:{worker}",),
        engine="paced",
        model_dir=str(MODEL),
        dtype="float32",
        batcher=BatcherConfig(max_model_len=max_model_len),
        block_tokens=BLOCK_TOKENS,
        num_blocks=num_blocks,
        has_weights_fd=False,
        load_weights=False,
        hash_key=b"key",
        profile="fixed-5ms",
    )


def _has(reports: Sequence[Report], kind: type[Report]) -> bool:
    return any(isinstance(report, kind) for report in reports)


def _finished(reports: Sequence[Report], request_id: RequestId) -> bool:
    return any(
        end.id == request_id
        for report in reports
        if isinstance(report, StepReported)
        for end in report.finished
    )
