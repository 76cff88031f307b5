"""A worker as a process of its own: how it starts, what it promises, every way in which it ends."""

import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import pytest
from tokenizers import Tokenizer

from appliance.core.faults import FaultRule
from appliance.core.messages import (
    Assign,
    Heartbeat,
    Refused,
    Report,
    StepReported,
    WeightsLoaded,
    WorkerUp,
)
from appliance.core.model_shape import ModelShape, kv_slab_bytes, parse_config, slab_bytes
from appliance.core.payload import Sampling, SequenceState, StepOutputs
from appliance.core.profiles import paced_kv_slab_bytes
from appliance.core.start import WorkerStart
from appliance.core.types import BatcherConfig, Request, RequestId, WorkerId
from appliance.core.wire import FrameBuffer, command_codec, report_codec
from appliance.worker.main import EXIT_FAILED, EXIT_ORPHANED, EXIT_START

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "tiny-tasks"
W = WorkerId(4)
CODE = (
    "import socket, sys; from appliance.worker.main import run; "
    "run(socket.socket(fileno=int(sys.argv[1])))"
)
PROMPT = list(range(100, 111))

pytestmark = pytest.mark.procs


def start_record(**changes: object) -> WorkerStart:
    start = WorkerStart(
        worker=W,
        epoch=3,
        devices=("paced:4",),
        engine="paced",
        model_dir=str(MODEL),
        dtype="float32",
        batcher=BatcherConfig(max_model_len=512),
        block_tokens=16,
        num_blocks=64,
        has_weights_fd=False,
        load_weights=False,
        hash_key=b"key",
        profile="h200-8b",
        heartbeat_seconds=0.02,
        validate=True,
    )
    return msgspec.structs.replace(start, **changes)


def paced_slab(start: WorkerStart) -> int:
    slab = os.memfd_create("kv")
    size = paced_kv_slab_bytes(num_blocks=start.num_blocks, block_tokens=start.block_tokens)
    os.ftruncate(slab, size)
    return slab


class Worker:
    """A worker process and the node's end of its channel."""

    def __init__(self, start: WorkerStart, log: Path, *, slabs: Sequence[int]) -> None:
        self.node, theirs = socket.socketpair()
        self.node.settimeout(60)
        record = msgspec.msgpack.encode(start)
        socket.send_fds(self.node, [struct.pack("<I", len(record)) + record], slabs)
        self._log = log
        with theirs, log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-c", CODE, str(theirs.fileno())],
                cwd=ROOT,
                stderr=stderr,
                pass_fds=(theirs.fileno(),),
            )
        self._codec, self._buffer = report_codec(), FrameBuffer()
        self._encode = command_codec().encode
        self.reports: list[Report] = []
        self.tokens: dict[int, list[int]] = {}

    def read(self) -> bool:
        """Take in what comes next; False when the worker has gone."""
        try:
            data = self.node.recv(1 << 16)
        except ConnectionResetError:
            return False
        for frame in self._buffer.feed(data):
            reports, payload = self._codec.decode(frame)
            self.reports += reports
            if payload:
                outputs = msgspec.msgpack.decode(payload, type=StepOutputs)
                for id_, ids in zip(outputs.ids, outputs.tokens, strict=True):
                    self.tokens.setdefault(id_, []).extend(ids)
        return bool(data)

    def until(self, done: Callable[[], bool]) -> "Worker":
        while not done():
            assert self.read(), self.stderr
        return self

    def ready(self) -> "Worker":
        return self.until(lambda: bool(self.of(WorkerUp)))

    def of(self, kind: type[Report]) -> list[Report]:
        return [report for report in self.reports if type(report) is kind]

    def assign(
        self, number: int, prompt: Sequence[int], *, max_tokens: int, emitted: Sequence[int] = ()
    ) -> None:
        state = SequenceState(
            prompt=array("i", prompt).tobytes(),
            emitted=array("i", emitted).tobytes(),
            sampling=Sampling(temperature=0.0, eos_token_ids=(2,), ignore_eos=True),
        )
        request = Request(
            id=RequestId(number),
            arrived=time.monotonic(),
            prompt_tokens=len(prompt),
            max_tokens=max_tokens,
        )
        command = Assign(worker=W, request=request, emitted_tokens=len(emitted))
        self.node.sendall(self._encode([command], msgspec.msgpack.encode(state)))

    def finished(self, number: int) -> bool:
        return any(
            end.id == number
            for report in self.reports
            if isinstance(report, StepReported)
            for end in report.finished
        )

    def exit_code(self) -> int:
        return self.process.wait(30)

    @property
    def stderr(self) -> str:
        return self._log.read_text()

    @property
    def last_line(self) -> str:
        return self.stderr.rstrip().rsplit("\n", 1)[-1]

    def end(self) -> None:
        self.node.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(30)


Launch = Callable[..., Worker]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Starts workers; those that a test leaves running are ended."""
    workers: list[Worker] = []

    def start(slabs: Sequence[int] = (), **changes: object) -> Worker:
        record, log = start_record(**changes), tmp_path / f"{len(workers)}.log"
        own = [] if slabs else [paced_slab(record)]
        workers.append(Worker(record, log, slabs=slabs or own))
        for fd in own:
            os.close(fd)
        return workers[-1]

    yield start
    for worker in workers:
        worker.end()


@pytest.fixture
def slabs() -> Iterator[list[int]]:
    """Weights and KV of the bundled model, as the node keeps them."""
    shape = read_shape(MODEL)
    fds = [os.memfd_create("weights"), os.memfd_create("kv")]
    os.ftruncate(fds[0], slab_bytes(shape, "float32"))
    os.ftruncate(fds[1], kv_slab_bytes(shape, "float32", num_blocks=64, block_tokens=16))
    yield fds
    for fd in fds:
        os.close(fd)


def read_shape(model: Path) -> ModelShape:
    return parse_config(msgspec.json.decode((model / "config.json").read_bytes()))


def rule(action: str, point: str = "worker.before_step", **more: object) -> Mapping[str, object]:
    return {"faults": (FaultRule(point=point, action=action, **more),)}  # type: ignore[arg-type]


def test_worker_starts_serves_and_ends_in_order(launch: Launch) -> None:
    worker = launch().ready()
    loaded, up = worker.of(WeightsLoaded)[0], worker.of(WorkerUp)[0]
    assert isinstance(loaded, WeightsLoaded)
    assert (loaded.source, loaded.seconds) == ("none", 0.0)
    assert isinstance(up, WorkerUp)
    assert (up.worker, up.epoch, up.groups[0].num_blocks) == (W, 3, 64)
    for number in (1, 2, 3):
        worker.assign(number, [*PROMPT, number], max_tokens=20)
    worker.until(lambda: all(worker.finished(number) for number in (1, 2, 3)))
    assert [len(worker.tokens[number]) for number in (1, 2, 3)] == [20, 20, 20]
    worker.node.shutdown(socket.SHUT_WR)
    while worker.read():
        pass
    assert worker.exit_code() == 0
    assert "worker is ready  worker=4" in re.sub(r" seconds=\S+ weights=none", "", worker.stderr)


def test_paced_worker_loads_no_torch(launch: Launch) -> None:
    worker = launch().ready()
    assert "torch" not in Path(f"/proc/{worker.process.pid}/maps").read_text()


def test_log_lines_can_be_json_and_hold_no_prompt(launch: Launch) -> None:
    worker = launch(log_json=True, log_level="debug").ready()
    worker.assign(1, PROMPT, max_tokens=5)
    worker.until(lambda: worker.finished(1))
    lines = [msgspec.json.decode(line) for line in worker.stderr.splitlines()]
    assert all(line["worker"] == 4 for line in lines)
    assert any(line.get("request") == 1 for line in lines)
    fields = {field for line in lines for field in line}
    ids_and_numbers = {"worker", "request", "prompt_tokens", "seconds", "weights"}
    assert fields == {"time", "level", "logger", "message"} | ids_and_numbers


def test_signals_of_the_terminal_are_the_nodes_business(launch: Launch) -> None:
    worker = launch().ready()
    worker.process.send_signal(signal.SIGTERM)
    worker.process.send_signal(signal.SIGINT)
    worker.assign(1, PROMPT, max_tokens=5)
    worker.until(lambda: worker.finished(1))
    assert worker.process.poll() is None


def test_r7_worker_ends_with_its_node_while_it_computes(launch: Launch) -> None:
    worker = launch(**rule("delay", seconds=100.0)).ready()
    worker.assign(1, PROMPT, max_tokens=5)
    worker.until(
        lambda: any(isinstance(r, Heartbeat) and r.in_step is not None for r in worker.reports)
    )
    worker.node.close()
    assert worker.exit_code() == EXIT_ORPHANED


def test_r7_worker_ends_with_its_parent(tmp_path: Path) -> None:
    """The socket stays open here, so only the parent-death signal can tell."""
    node, theirs = socket.socketpair()
    middle = (
        "import subprocess, sys, time; "
        "child = subprocess.Popen([sys.executable, '-c', *sys.argv[1:]], "
        "pass_fds=(int(sys.argv[2]),)); print(child.pid, flush=True); time.sleep(100)"
    )
    with node, theirs:
        parent = subprocess.Popen(
            [sys.executable, "-c", middle, CODE, str(theirs.fileno())],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            pass_fds=(theirs.fileno(),),
        )
        theirs.close()
        assert parent.stdout is not None
        with parent.stdout:
            pid = int(parent.stdout.readline())
        record = msgspec.msgpack.encode(start_record())
        slab = paced_slab(start_record())
        socket.send_fds(node, [struct.pack("<I", len(record)) + record], [slab])
        os.close(slab)
        node.settimeout(60)
        assert node.recv(1)  # it lives
        watch = os.pidfd_open(pid)
        try:
            parent.kill()
            parent.wait(30)
            assert select.select([watch], [], [], 30)[0]
        finally:
            os.close(watch)


@pytest.mark.parametrize(
    ("action", "status", "words"),
    [
        ("kill", -signal.SIGKILL, ""),
        ("segv", -signal.SIGSEGV, ""),
        ("exit", 1, ""),
        (
            "raise",
            EXIT_FAILED,
            "worker 4 on paced:4: InjectedFault: injected at worker.before_step",
        ),
        ("oom", EXIT_FAILED, "worker 4 on paced:4: device out of memory .*lower \\[kv\\] memory"),
    ],
)
def test_r4_injected_fault_ends_the_process_as_asked(
    launch: Launch, action: str, status: int, words: str
) -> None:
    worker = launch(**rule(action, nth=4)).ready()
    worker.assign(1, PROMPT, max_tokens=50)
    while worker.read():
        pass
    assert worker.exit_code() == status
    assert len(worker.tokens[1]) == 3
    assert re.search(words, worker.last_line)


def test_r4_stopped_worker_is_silent_and_can_be_killed(launch: Launch) -> None:
    worker = launch(**rule("stop")).ready()
    worker.assign(1, PROMPT, max_tokens=50)
    stat = Path(f"/proc/{worker.process.pid}/stat")
    while stat.read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.01)
    worker.process.kill()
    assert worker.exit_code() == -signal.SIGKILL


def test_r8_heart_beats_through_a_long_step(launch: Launch) -> None:
    worker = launch(**rule("delay", seconds=0.5)).ready()
    worker.assign(1, PROMPT, max_tokens=3)
    worker.until(lambda: worker.finished(1))
    first = next(i for i, r in enumerate(worker.reports) if isinstance(r, StepReported))
    beats = [r.in_step for r in worker.reports[:first] if isinstance(r, Heartbeat)]
    long = [beat for beat in beats if beat is not None and beat > 0.05]
    assert len(long) > 2
    assert long == sorted(long)


def test_r5_successor_goes_on_from_the_tokens_already_sent(launch: Launch) -> None:
    whole = launch().ready()
    whole.assign(1, PROMPT, max_tokens=40)
    whole.until(lambda: whole.finished(1))
    dying = launch(**rule("kill", "worker.before_send", nth=15)).ready()
    dying.assign(1, PROMPT, max_tokens=40)
    while dying.read():
        pass
    sent = dying.tokens[1]
    assert len(sent) == 14
    successor = launch(epoch=4).ready()
    successor.assign(1, PROMPT, max_tokens=40, emitted=sent)
    successor.until(lambda: successor.finished(1))
    assert [*sent, *successor.tokens[1]] == whole.tokens[1]


def test_r5_r6_model_worker_dies_and_its_successor_maps_the_weights_and_goes_on(
    launch: Launch, slabs: list[int]
) -> None:
    model = {"engine": "torch", "has_weights_fd": True, "slabs": slabs, "devices": ("cpu",)}
    prompt = Tokenizer.from_file(str(MODEL / "tokenizer.json")).encode("the spoon and the").ids
    dying = launch(**model, load_weights=True, **rule("kill", nth=9)).ready()
    dying.assign(1, prompt, max_tokens=24)
    while dying.read():
        pass
    sent = dying.tokens[1]
    assert len(sent) == 8
    successor = launch(**model, epoch=4).ready()
    loaded = successor.of(WeightsLoaded)[0]
    assert isinstance(loaded, WeightsLoaded)
    assert loaded.source == "slab"
    successor.assign(1, prompt, max_tokens=24, emitted=sent)
    successor.assign(2, prompt, max_tokens=24)
    successor.until(lambda: successor.finished(1) and successor.finished(2))
    assert [*sent, *successor.tokens[1]] == successor.tokens[2]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"profile": "h300"}, "unknown device profile 'h300'; use one of: cpu, h100-8b, h200-8b"),
        ({"model_dir": "/nowhere"}, "/nowhere/tokenizer.json is missing"),
        ({"engine": "magic"}, "unknown engine 'magic'; use 'torch' or 'paced'"),
        ({"engine": "torch"}, "needs the descriptor of a weight slab"),
        ({"policy": "fcsf"}, "no policy 'fcsf'; did you mean 'fcfs'"),
        (rule("explode"), "unknown fault action 'explode'"),
        (rule("raise", "worker.weights"), "injected at worker.weights"),
    ],
)
def test_r20_failed_start_is_refused_and_its_last_line_says_why(
    launch: Launch, changes: Mapping[str, object], words: str
) -> None:
    worker = launch(**changes)
    while worker.read():
        pass
    assert worker.exit_code() == EXIT_START
    (refused,) = worker.of(Refused)
    assert isinstance(refused, Refused)
    assert (refused.command, refused.request_id) == ("Start", None)
    assert words in refused.reason
    assert worker.last_line == refused.reason
    assert refused.reason.startswith("worker 4 on paced:4: ")


def test_bytes_that_are_no_frames_end_the_worker(launch: Launch) -> None:
    worker = launch().ready()
    worker.node.sendall(b"\xff" * 64)
    while worker.read():
        pass
    assert worker.exit_code() == EXIT_FAILED
    assert "impossible frame length" in worker.last_line
