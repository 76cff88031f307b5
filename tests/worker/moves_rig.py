"""The node's end of several workers that pass sequences to each other.

Workers run as threads (quick) or as processes (to be killed); sockets, pools and doorbells are
those of the product. The rig does what the node and its Dispatcher do of a move and nothing else:
it introduces workers, orders moves, waits with frames of a target until the source has stopped, and
answers `KvPulled` with `Release`.
"""

import select
import signal
import socket
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from appliance.core.hashes import chain, root_hash
from appliance.core.kv_layout import index_offset
from appliance.core.messages import (
    Abort,
    Aborted,
    Assign,
    Command,
    KvPulled,
    LinkUp,
    Migrate,
    Prefilled,
    Pull,
    PullFailed,
    Release,
    Report,
    Resume,
    StepReported,
    WorkerUp,
)
from appliance.core.payload import Sampling, SequenceState, StepOutputs
from appliance.core.peer_links import PeerDown, PeerUp
from appliance.core.types import (
    FinishReason,
    MoveId,
    Request,
    RequestId,
    Slo,
    WorkerId,
)
from appliance.core.wire import command_codec, report_codec
from tests.worker.moves_ends import BLOCK, KEY, ROOT, End, Slabs, Wrap, serve_in_thread

CODE = (
    "import socket, sys; from appliance.worker.main import run; "
    "run(socket.socket(fileno=int(sys.argv[1])))"
)
GREEDY = Sampling(temperature=0.0, eos_token_ids=(2,), ignore_eos=True)


def packed(ids: Sequence[int]) -> bytes:
    return array("i", ids).tobytes()


def names(ids: Sequence[int], salt: str = "") -> list[int]:
    return chain(packed(ids), BLOCK, key=KEY, parent=root_hash(key=KEY, salt=salt))


class Answer:
    """What the node knows of one request."""

    def __init__(self, request: Request, state: SequenceState, owner: int) -> None:
        self.request = request
        self.state = state
        self.owner = owner
        self.tokens: list[int] = list(array("i", state.emitted))
        self.text = ""
        self.reason: FinishReason | None = None
        self.cached = 0
        self.served_by: list[int] = []
        """Workers that emitted, in order, without repetition."""

    def state_now(self) -> SequenceState:
        return msgspec.structs.replace(self.state, emitted=packed(self.tokens))


Hook = Callable[[int, Report], None]


class MovesNode:
    """Several workers and the answers they make together."""

    def __init__(self, slabs: Slabs, tmp_path: Path, *, processes: bool = False) -> None:
        self.slabs = slabs
        self._processes = processes
        self._tmp = tmp_path
        self.ends: dict[int, End] = {}
        self.answers: dict[int, Answer] = {}
        self.log: list[tuple[int, Report]] = []
        """(worker, report) in the order in which the node takes them."""
        self.moves: dict[int, tuple[int, int, int]] = {}
        """Move -> request, source, target."""
        self.stopped: set[int] = set()
        self.open: set[int] = set()
        """Moves whose end has not been dealt with."""
        self.release = True
        self.recover = False
        """Do what the Dispatcher does when a move fails or a worker dies."""
        self._again: dict[int, int] = {}
        """Request -> worker that serves it again as soon as it says `Aborted`."""
        self.hook: Hook = lambda _worker, _report: None
        self._encode = command_codec().encode
        self._codec = report_codec()
        self._num_moves = 0

    # --- workers --------------------------------------------------------------------------------

    def add(
        self,
        worker: int,
        *,
        wrap: Wrap = lambda opened: opened,
        **changes: object,
    ) -> "MovesNode":
        start = msgspec.structs.replace(
            self.slabs.start, worker=WorkerId(worker), devices=(f"cpu:{worker}",), **changes
        )
        if (before := self.ends.get(worker)) is not None:
            before.close()
        end = self.ends[worker] = End(start, self.slabs.fds(worker))
        if self._processes:
            log = self._tmp / f"{worker}-{start.epoch}.log"
            with log.open("wb") as stderr:
                end.process = subprocess.Popen(
                    [sys.executable, "-c", CODE, str(end.theirs.fileno())],
                    cwd=ROOT,
                    stderr=stderr,
                    pass_fds=(end.theirs.fileno(),),
                )
            end.theirs.close()
        else:
            end.thread = threading.Thread(target=serve_in_thread, args=(end, wrap))
            end.thread.start()
        return self

    def ready(self, *workers: int) -> "MovesNode":
        """Wait until these are up and every pair of living workers has a link both ways."""
        chosen = workers or tuple(self.ends)
        self.until(lambda: all(self.ends[worker].up for worker in chosen))
        pairs = {(a, b) for a in self.ends for b in self.ends if a != b and not self.is_gone(a, b)}
        self.until(lambda: pairs <= self.linked())
        return self

    def is_gone(self, *workers: int) -> bool:
        return any(self.ends[worker].gone for worker in workers)

    def linked(self) -> set[tuple[int, int]]:
        return {
            (worker, report.peer)
            for worker, report in self.log
            if isinstance(report, LinkUp)
            and report.peer_epoch == self.ends[report.peer].start.epoch
        }

    def _introduce(self, worker: int) -> None:
        for other, end in self.ends.items():
            if other == worker or not end.up or end.gone:
                continue
            one, two = socket.socketpair()
            with one, two:
                self._meet(worker, other, one)
                self._meet(other, worker, two)

    def _meet(self, worker: int, peer: int, bell: socket.socket) -> None:
        num_blocks, size = self.slabs.start.num_blocks, self.slabs.block_bytes
        up = PeerUp(
            peer=WorkerId(peer),
            epoch=self.ends[peer].start.epoch,
            num_blocks=num_blocks,
            block_bytes=size,
            index_offset=index_offset(num_blocks=num_blocks, block_bytes=size),
        )
        self.ends[worker].tell(up, [self.slabs.pool(peer), bell.fileno()])

    def kill(self, worker: int, number: int = signal.SIGKILL) -> None:
        process = self.ends[worker].process
        assert process is not None
        process.send_signal(number)

    def stop(self, worker: int) -> None:
        """SIGSTOP, and wait until it has."""
        self.kill(worker, signal.SIGSTOP)
        while not self._is_stopped(self.ends[worker]):
            time.sleep(0.01)

    def bury(self, worker: int) -> None:
        """The worker has died: hear its last words, tell the others, place what it had anew."""
        end = self.ends[worker]
        end.gone = True
        while self._take_next(worker):
            pass
        for other, each in self.ends.items():
            if other != worker and each.up and not each.gone:
                each.tell(PeerDown(peer=WorkerId(worker), epoch=end.start.epoch))
        if self.recover:
            self._recover(worker)

    def _recover(self, dead: int) -> None:
        for move in sorted(self.open):
            number, source, target = self.moves[move]
            if dead == target:
                self.open.discard(move)
                self.resume(move)
            elif dead == source and move not in self.stopped:
                self.open.discard(move)
                self._again[number] = target
                self.abort(number, target)
        waiting = {self.moves[move][0] for move in self.open} | set(self._again)
        for number, answer in self.answers.items():
            if answer.owner == dead and answer.reason is None and number not in waiting:
                self.assign_again(number, self._living())

    def _failed(self, move: int) -> None:
        number, source, _ = self.moves[move]
        if move not in self.open:
            return
        self.open.discard(move)
        if self.ends[source].gone:
            self.assign_again(number, self._living())
        else:
            self.resume(move)

    def _living(self) -> int:
        return next(worker for worker, end in self.ends.items() if end.up and not end.gone)

    def _kill_stopped(self) -> None:
        """What the node's watch does to processes that were stopped."""
        for worker, end in self.ends.items():
            if end.up and not end.gone and self._is_stopped(end):
                self.kill(worker)

    def _is_stopped(self, end: End) -> bool:
        assert end.process is not None
        stat = Path(f"/proc/{end.process.pid}/stat").read_bytes()
        return stat[stat.rindex(b")") + 2 :][:1] == b"T"

    # --- requests -------------------------------------------------------------------------------

    def send(self, worker: int, command: Command, payload: bytes = b"") -> None:
        with suppress(OSError):
            if worker in self.ends:
                self.ends[worker].node.sendall(self._encode([command], payload))

    def assign(
        self,
        number: int,
        worker: int,
        prompt: Sequence[int],
        *,
        max_tokens: int = 40,
        sampling: Sampling = GREEDY,
        pull_from: int | None = None,
        slo: Slo | None = None,
        salt: str = "",
    ) -> None:
        state = SequenceState(prompt=packed(prompt), sampling=sampling, salt=salt)
        request = Request(
            id=RequestId(number),
            arrived=float(number),
            prompt_tokens=len(prompt),
            max_tokens=max_tokens,
            prefix_hashes=tuple(names(prompt, salt)),
            slo=slo or Slo(),
        )
        self.answers[number] = Answer(request, state, worker)
        self._assign(number, worker, pull_from=pull_from)

    def assign_again(self, number: int, worker: int) -> None:
        """Place a request whose worker died, with what was emitted so far."""
        self.answers[number].owner = worker
        self._assign(number, worker)

    def _assign(self, number: int, worker: int, *, pull_from: int | None = None) -> None:
        answer = self.answers[number]
        command = Assign(
            worker=WorkerId(worker),
            request=answer.request,
            emitted_tokens=len(answer.tokens),
            pull_from=None if pull_from is None else WorkerId(pull_from),
            pull_blocks=0 if pull_from is None else len(answer.request.prefix_hashes),
        )
        self.send(worker, command, msgspec.msgpack.encode(answer.state_now()))

    def move(
        self, number: int, target: int, *, live: bool = False, lease_seconds: float = 10.0
    ) -> int:
        """Order the sequence to go from its worker to `target`; the number of the move."""
        answer = self.answers[number]
        source = answer.owner
        self._num_moves += 1
        move = MoveId(self._num_moves)
        self.moves[move] = (number, source, target)
        self.open.add(move)
        pull = Pull(
            worker=WorkerId(target),
            move=move,
            request=answer.request,
            source=WorkerId(source),
            emitted_tokens=len(answer.tokens),
        )
        migrate = Migrate(
            worker=WorkerId(source),
            move=move,
            request_id=answer.request.id,
            target=WorkerId(target),
            live=live,
            lease_seconds=lease_seconds,
        )
        orders: list[tuple[int, Command, bytes]] = [
            (target, pull, msgspec.msgpack.encode(answer.state_now())),
            (source, migrate, b""),
        ]
        for worker, command, payload in orders if move % 2 else orders[::-1]:
            self.send(worker, command, payload)
        return move

    def resume(self, move: int) -> None:
        number, source, _ = self.moves[move]
        id_ = RequestId(number)
        self.send(source, Resume(worker=WorkerId(source), move=MoveId(move), request_id=id_))

    def abort(self, number: int, worker: int) -> None:
        self.send(worker, Abort(worker=WorkerId(worker), request_id=RequestId(number)))

    # --- what comes back ------------------------------------------------------------------------

    def until(self, done: Callable[[], bool], *, seconds: float = 60.0) -> "MovesNode":
        deadline = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < deadline, self.story()
            assert not any(end.error for end in self.ends.values()), self.story()
            self.pump()
        return self

    def pump(self, seconds: float = 0.5) -> None:
        """Take in what has arrived, waiting a little."""
        sockets = {end.node: worker for worker, end in self.ends.items() if not end.gone}
        for sock in select.select(list(sockets), [], [], seconds)[0]:
            self._read(sockets[sock])
        while sum(self._take_next(worker) for worker in self.ends):
            pass
        if self._processes and self.recover:
            self._kill_stopped()

    def _read(self, worker: int) -> None:
        end = self.ends[worker]
        try:
            data = end.node.recv(1 << 18)
        except ConnectionResetError:
            data = b""
        if not data:
            self.bury(worker)
            return
        for frame in end.buffer.feed(data):
            end.held.append(self._codec.decode(frame))

    def _take_next(self, worker: int) -> bool:
        held = self.ends[worker].held
        if not held or self._must_wait(held[0][0]):
            return False
        self._take(worker, *held.popleft())
        return True

    def _must_wait(self, reports: Sequence[Report]) -> bool:
        pulled = [report.move for report in reports if isinstance(report, KvPulled)]
        assert not pulled or len(reports) == 1, "KvPulled comes in a frame of its own"
        return any(
            move not in self.stopped and not self.is_gone(self.moves[move][1]) for move in pulled
        )

    def _take(self, worker: int, reports: Sequence[Report], payload: bytes) -> None:
        end = self.ends[worker]
        for report in reports:
            if isinstance(report, StepReported):
                self._take_step(worker, report, payload)
            self.log.append((worker, report))
            match report:
                case WorkerUp():
                    end.up = True
                    self._introduce(worker)
                case Prefilled(move=move):
                    self.stopped.add(move)
                case KvPulled(move=move, request_id=number):
                    _, source, target = self.moves[move]
                    self.open.discard(move)
                    self.answers[number].owner = target
                    assert report.emitted_tokens == len(self.answers[number].tokens)
                    if self.release:
                        release = Release(
                            worker=WorkerId(source), move=move, request_id=RequestId(number)
                        )
                        self.send(source, release)
                case PullFailed(move=move) if self.recover:
                    self._failed(move)
                case Aborted(request_id=number) if number in self._again:
                    self.assign_again(number, self._again.pop(number))
                case _:
                    pass
            load = getattr(report, "load", None)
            if load is not None:
                end.load = load
            self.hook(worker, report)

    def _take_step(self, worker: int, step: StepReported, payload: bytes) -> None:
        outputs = msgspec.msgpack.decode(payload, type=StepOutputs)
        for id_, ids, text in zip(outputs.ids, outputs.tokens, outputs.texts, strict=True):
            answer = self.answers[id_]
            assert answer.owner == worker, f"request {id_} is answered by {worker}: {self.story()}"
            answer.tokens += ids
            answer.text += text
            if worker not in answer.served_by[-1:]:
                answer.served_by.append(worker)
        for finished in step.finished:
            answer = self.answers[finished.id]
            answer.reason, answer.cached = finished.reason, finished.cached_tokens

    def of(self, kind: type[Report], worker: int | None = None) -> list[Report]:
        return [
            report for who, report in self.log if type(report) is kind and worker in (None, who)
        ]

    def failures(self, move: int) -> list[str]:
        return [
            report.reason
            for _, report in self.log
            if isinstance(report, PullFailed) and report.move == move
        ]

    def emitted(self, number: int, count: int) -> "MovesNode":
        """Wait until the answer has so many tokens."""
        return self.until(lambda: len(self.answers[number].tokens) >= count)

    def finish(self, *numbers: int) -> "MovesNode":
        chosen = numbers or tuple(self.answers)
        return self.until(lambda: all(self.answers[n].reason is not None for n in chosen))

    def settle(self) -> "MovesNode":
        """Wait until every living worker says that it holds and leases nothing."""
        return self.until(
            lambda: all(
                end.gone
                or (end.load is not None and not end.load.blocks_held + end.load.blocks_leased)
                for end in self.ends.values()
            )
        )

    def story(self) -> str:
        lines = [f"{worker} {report}" for worker, report in self.log[-40:]]
        errors = [f"{w} {end.error!r}" for w, end in self.ends.items() if end.error is not None]
        logs = [f"{log.name}: {log.read_text()[-800:]}" for log in sorted(self._tmp.glob("*.log"))]
        return "\n".join([*lines, *errors, *logs])

    def close(self) -> None:
        for end in self.ends.values():
            if end.thread is not None and not end.gone:
                with suppress(OSError):
                    end.node.shutdown(socket.SHUT_WR)
        for end in self.ends.values():
            if end.thread is not None:
                end.thread.join(20)
                assert not end.thread.is_alive()
            end.close()
        self.slabs.close()
