"""The node end of a step loop that runs in a thread; an engine that says what a test wrote."""

import socket
import threading
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from appliance.core.batcher import Batcher
from appliance.core.faults import FaultPlan, FaultRule
from appliance.core.hashes import chain, root_hash
from appliance.core.invariants import BatchWatch
from appliance.core.messages import Assign, Command, Heartbeat, Report, StepReported
from appliance.core.payload import Sampling, SequenceState, StepOutputs
from appliance.core.profiles import AnswerLength, Fitted, paced_kv_slab_bytes
from appliance.core.start import WorkerStart
from appliance.core.types import (
    BatcherConfig,
    CacheGroupSpec,
    FinishReason,
    Request,
    RequestId,
    StepPlan,
    WorkerId,
    WorkerLoad,
)
from appliance.core.wire import FrameBuffer, command_codec, report_codec
from appliance.policy import make_policy
from appliance.worker.channel import Channel, Progress
from appliance.worker.engine import Engine, EngineInfo, SampledToken
from appliance.worker.fault_actions import FaultPoints
from appliance.worker.loop import StepLoop
from appliance.worker.paced_engine import PacedEngine
from appliance.worker.text import TokenText

MODEL = Path(__file__).resolve().parents[2] / "models" / "tiny-tasks"
W = WorkerId(1)
BLOCK = 4
EOS = 2
KEY = b"node key"
AT_ONCE = Fitted(
    name="at-once",
    note="",
    kv_tokens=0,
    answers=AnswerLength(median=12, sigma=0.7, longest=40),
    base=0.0,
    per_token=0.0,
    per_sample=0.0,
    per_pair=0.0,
    per_kv_token=0.0,
)


def packed(ids: Sequence[int]) -> bytes:
    return array("i", ids).tobytes()


class ScriptedEngine:
    """Says what the test wrote down for a request, token by token."""

    def __init__(self, scripts: Mapping[int, Sequence[int]], *, num_blocks: int = 64) -> None:
        self._scripts = {number: list(script) for number, script in scripts.items()}
        self._left: dict[RequestId, list[int]] = {}
        self.dropped: list[int] = []
        self.error: Exception | None = None
        self.during: Callable[[StepPlan], None] = lambda plan: None
        group = CacheGroupSpec(num_blocks=num_blocks, block_tokens=BLOCK)
        self.info = EngineInfo(
            groups=(group,), vocab_size=1024, max_positions=256, weights_source="none"
        )

    def add(self, request_id: RequestId, state: SequenceState) -> None:
        self._left[request_id] = self._scripts[request_id][len(state.emitted) // 4 :]

    def drop(self, request_id: RequestId) -> None:
        self.dropped.append(request_id)
        self._left.pop(request_id, None)

    def execute(self, plan: StepPlan) -> Sequence[SampledToken]:
        if self.error is not None:
            raise self.error
        self.during(plan)
        return [
            SampledToken(id=work.id, token=self._left[work.id].pop(0))
            for work in plan.work
            if work.samples and work.id in self._left
        ]


def paced(tokens: TokenText, *, num_blocks: int = 64) -> PacedEngine:
    return PacedEngine(
        memoryview(bytearray(paced_kv_slab_bytes(num_blocks=num_blocks, block_tokens=BLOCK))),
        profile=AT_ONCE,
        tokens=tokens,
        num_blocks=num_blocks,
        block_tokens=BLOCK,
        max_positions=256,
        validate=True,
    )


class Answer:
    """What the node put together of one request."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self.reason: FinishReason | None = None
        self.cached = 0


class Rig:
    """The node's end of a running loop."""

    def __init__(
        self,
        engine: Engine,
        tokens: TokenText,
        *,
        faults: Sequence[FaultRule] = (),
        **config: int | bool,
    ) -> None:
        bounds = msgspec.convert({"max_model_len": 256, **config}, BatcherConfig)
        start = WorkerStart(
            worker=W,
            epoch=1,
            devices=("paced:1",),
            engine="paced",
            model_dir=str(MODEL),
            dtype="float32",
            batcher=bounds,
            block_tokens=BLOCK,
            num_blocks=engine.info.groups[0].num_blocks,
            has_weights_fd=False,
            load_weights=False,
            hash_key=KEY,
        )
        self.batcher = Batcher(
            W, bounds, groups=engine.info.groups, policy=make_policy("fcfs", {}).batch
        )
        self.node, self.worker = socket.socketpair()
        self.node.settimeout(20)
        self.loop = StepLoop(
            start,
            channel=Channel(self.worker),
            engine=engine,
            batcher=self.batcher,
            tokens=tokens,
            faults=FaultPoints(FaultPlan(tuple(faults), worker=W, epoch=1)),
            progress=Progress(),
            after_step=BatchWatch(self.batcher).check,
        )
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run)
        self._encode = command_codec().encode
        self._codec, self._buffer = report_codec(), FrameBuffer()
        self.frames: list[tuple[list[Report], StepOutputs | None]] = []
        self.answers: dict[int, Answer] = {}
        self.load: WorkerLoad | None = None
        self._held: bytearray | None = None

    def _run(self) -> None:
        try:
            self.loop.run()
        except Exception as error:
            self.error = error
        finally:
            self.worker.close()

    def start(self) -> "Rig":
        self._thread.start()
        return self

    def send(self, command: Command, payload: bytes = b"") -> None:
        frame = self._encode([command], payload)
        if self._held is not None:
            self._held += frame
            return
        with suppress(ConnectionError):  # a test of a loop that dies looks at `error`
            self.node.sendall(frame)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is sent in here comes to the loop at once, before its next step."""
        self._held = bytearray()
        yield
        held, self._held = self._held, None
        self.node.sendall(held)

    def assign(
        self,
        number: int,
        prompt: Sequence[int],
        *,
        max_tokens: int = 50,
        sampling: Sampling | None = None,
        emitted: Sequence[int] = (),
        group: int | None = None,
    ) -> None:
        state = SequenceState(
            prompt=packed(prompt),
            sampling=sampling or Sampling(eos_token_ids=(EOS,)),
            emitted=packed(emitted),
        )
        request = Request(
            id=RequestId(number),
            arrived=float(number),
            prompt_tokens=len(prompt),
            max_tokens=max_tokens,
            prefix_hashes=tuple(names(prompt)),
            group=None if group is None else RequestId(group),
        )
        command = Assign(worker=W, request=request, emitted_tokens=len(emitted))
        self.answers.setdefault(number, Answer())
        self.send(command, msgspec.msgpack.encode(state))

    def read(self) -> bool:
        """Take in what the loop sends next; False when it has closed."""
        try:
            data = self.node.recv(1 << 16)
        except ConnectionResetError:  # it left without reading everything
            return False
        for frame in self._buffer.feed(data):
            reports, payload = self._codec.decode(frame)
            outputs = None
            if payload:
                outputs = msgspec.msgpack.decode(payload, type=StepOutputs)
            self.frames.append((reports, outputs))
            self._take(reports, outputs)
        return bool(data)

    def _take(self, reports: Sequence[Report], outputs: StepOutputs | None) -> None:
        for report in reports:
            if isinstance(report, StepReported | Heartbeat) and report.load is not None:
                self.load = report.load
            if not isinstance(report, StepReported):
                continue
            assert outputs is not None
            assert tuple(outputs.ids) == report.ids
            for id_, ids, text in zip(outputs.ids, outputs.tokens, outputs.texts, strict=True):
                self.answers[id_].tokens += ids
                self.answers[id_].text += text
            for finished in report.finished:
                answer = self.answers[finished.id]
                answer.reason, answer.cached = finished.reason, finished.cached_tokens
                assert finished.emitted_tokens >= len(answer.tokens)

    def until(self, done: Callable[[], bool]) -> None:
        while not done():
            assert self.read(), self.error

    def finish(self, *numbers: int) -> None:
        """Read until these requests have ended."""
        self.until(lambda: all(self.answers[number].reason is not None for number in numbers))

    def reports(self, kind: type[Report]) -> list[Report]:
        return [report for reports, _ in self.frames for report in reports if type(report) is kind]

    def end(self) -> None:
        """Close the writing side and read the rest."""
        if self._thread.ident is not None:
            self.node.shutdown(socket.SHUT_WR)
            while self.read():
                pass
            self._thread.join(20)
            assert not self._thread.is_alive()
        self.node.close()
        self.worker.close()


def names(ids: Sequence[int]) -> list[int]:
    return chain(packed(ids), BLOCK, key=KEY, parent=root_hash(key=KEY))
