"""Several toy workers, what connects them, and a node that knows just enough to move sequences.

Every wire is a queue whose head may be delivered at any time: commands to a worker, frames from it,
messages from one worker to another, copies. Workers may die at any time and come back with what is
left in their slab. The node here is the smallest that keeps the rules of `docs/moves.md`; it is not
the Dispatcher, and it takes no decision of its own: the test does.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from appliance.core.messages import (
    Abort,
    Aborted,
    Assign,
    Command,
    KvPulled,
    Migrate,
    Prefilled,
    PrefixPulled,
    Pull,
    PullFailed,
    Refused,
    Release,
    Released,
    Report,
    Resume,
    StepReported,
)
from appliance.core.peer import PeerMessage
from appliance.core.types import CacheGroupSpec, MoveId, Request, RequestId, WorkerId
from tests.core.moving_worker import Frame, MovingWorker
from tests.core.toy_slab import Slab
from tests.core.toy_worker import Task, answer, request_of_task

LEASE = 5.0


Rung = tuple[PeerMessage, list[int]] | int | None
"""A message with its payload; None: the sender is dead; a number: it is this incarnation."""


@dataclass
class Moving:
    """A move as the node sees it."""

    id: MoveId
    source: WorkerId
    target: WorkerId
    stopped: bool = False
    source_gone: bool = False


@dataclass
class Served:
    """A request as the node sees it."""

    task: Task
    emitted: list[int] = field(default_factory=list)
    at: WorkerId | None = None
    """Who serves it; None: it is queued, or over."""
    move: Moving | None = None
    resumed: set[MoveId] = field(default_factory=set)
    """Moves that were called off since it was placed."""
    aborting: set[WorkerId] = field(default_factory=set)
    """Workers that owe an `Aborted`."""
    cancelled: bool = False
    over: bool = False


class MovingNode:
    """Workers, wires, and the books of the node."""

    def __init__(
        self,
        num_workers: int,
        group: CacheGroupSpec,
        *,
        start: Callable[["MovingNode", WorkerId], MovingWorker],
        model_len: int,
    ) -> None:
        self.now = 0.0
        self.ids = [WorkerId(number) for number in range(num_workers)]
        self.slabs = {id_: Slab(group.num_blocks, group.block_tokens) for id_ in self.ids}
        self.commands: dict[WorkerId, deque[Command]] = {id_: deque() for id_ in self.ids}
        self.frames: dict[WorkerId, deque[Frame | None]] = {id_: deque() for id_ in self.ids}
        """From each worker; None: it is dead."""
        self.bells: dict[tuple[WorkerId, WorkerId], deque[Rung]] = {
            (one, two): deque() for one in self.ids for two in self.ids if one != two
        }
        """From one worker to another."""
        self.epochs = dict.fromkeys(self.ids, 0)
        self.served: dict[int, Served] = {}
        self.next_move = 0
        self.counts: dict[str, int] = {}
        """What has happened how often."""
        self.prefilled = dict.fromkeys(self.ids, 0)
        self.decoded = dict.fromkeys(self.ids, 0)
        """Tokens by worker."""
        self._model_len = model_len
        self._block_tokens = group.block_tokens
        self._start = start
        self._up: dict[WorkerId, bool] = {}
        """As the node knows it."""
        self.workers: dict[WorkerId, MovingWorker | None] = dict.fromkeys(self.ids)
        for id_ in self.ids:
            self.start(id_)

    # --- wires ----------------------------------------------------------------------------------

    def slab(self, worker: WorkerId) -> Slab:
        return self.slabs[worker]

    def to_node(self, worker: WorkerId, frame: Frame) -> None:
        self.frames[worker].append(frame)

    def to_peer(
        self, worker: WorkerId, peer: WorkerId, message: PeerMessage, payload: list[int]
    ) -> None:
        shell = self.workers[worker]
        assert shell is not None
        if self.workers[peer] is not None and shell.linked.get(peer) == self.epochs[peer]:
            self.bells[worker, peer].append((message, payload))

    def start(self, worker: WorkerId) -> None:
        self.commands[worker].clear()
        self.epochs[worker] += 1
        self._up[worker] = True
        shell = self.workers[worker] = self._start(self, worker)
        for peer in self.ids:
            if peer == worker:
                continue
            self.bells[peer, worker].clear()
            if self.workers[peer] is not None:
                shell.linked[peer] = self.epochs[peer]
                self.bells[worker, peer].append(self.epochs[worker])

    def kill(self, worker: WorkerId) -> None:
        """Its process is gone; what it had sent arrives, what it was sent does not."""
        if self.workers[worker] is None:
            return
        self._count("killed")
        self.workers[worker] = None
        self.frames[worker].append(None)
        for peer in self.ids:
            if peer != worker and self.workers[peer] is not None:
                self.bells[worker, peer].append(None)

    def can_start(self, worker: WorkerId) -> bool:
        return self.workers[worker] is None and not self._up[worker]

    def deliver_command(self, worker: WorkerId) -> bool:
        shell = self.workers[worker]
        if shell is None or not self.commands[worker]:
            return False
        self._links_first(worker, shell)
        command = self.commands[worker].popleft()
        id_ = command.request.id if isinstance(command, Assign | Pull) else command.request_id  # type: ignore[union-attr]
        served = self.served[id_]
        emitted: Sequence[int] = ()
        if isinstance(command, Assign | Pull):
            emitted = served.emitted[: command.emitted_tokens]
        shell.obey(command, served.task, emitted)
        return True

    def _links_first(self, worker: WorkerId, shell: MovingWorker) -> None:
        """News of incarnations do not come later than commands that build on them."""
        for peer in self.ids:
            queue = self.bells[peer, worker] if peer != worker else deque()
            while any(isinstance(item, int) for item in queue):
                item = queue.popleft()
                if isinstance(item, int):
                    if peer in shell.linked:
                        shell.lose(peer)
                    shell.linked[peer] = item

    def deliver_bell(self, sender: WorkerId, peer: WorkerId) -> bool:
        shell, queue = self.workers[peer], self.bells[sender, peer]
        if shell is None or not queue:
            return False
        item = queue.popleft()
        if item is None:
            shell.lose(sender)
        elif isinstance(item, int):
            shell.linked[sender] = item
        else:
            shell.hear(sender, *item)
        return True

    def deliver_frame(self, worker: WorkerId) -> bool:
        queue = self.frames[worker]
        if not queue or self._must_wait(queue[0]):
            return False
        frame = queue.popleft()
        if frame is None:
            self._down(worker)
            return True
        reports, tokens = frame
        for report in reports:
            self._hear(worker, report, tokens)
        return True

    def _must_wait(self, frame: Frame | None) -> bool:
        """`KvPulled` waits for `Prefilled`."""
        for report in frame[0] if frame is not None else []:
            if isinstance(report, KvPulled):
                move = self.served[report.request_id].move
                if move is not None and move.id == report.move:
                    return not move.stopped and not move.source_gone
        return False

    # --- what the test decides ------------------------------------------------------------------

    def arrive(self, task: Task) -> None:
        self.served[task.id] = Served(task)

    def place(
        self,
        request_id: int,
        worker: WorkerId,
        *,
        pull_from: WorkerId | None = None,
        pull_blocks: int = 0,
    ) -> bool:
        served = self.served[request_id]
        free = served.at is None and served.move is None and not served.over
        if not free or not self._up[worker] or worker in served.aborting or served.cancelled:
            return False
        served.at = worker
        served.resumed.clear()
        self._send(
            Assign(
                worker=worker,
                request=self._request(served),
                emitted_tokens=len(served.emitted),
                pull_from=pull_from,
                pull_blocks=pull_blocks,
            )
        )
        return True

    def migrate(
        self, request_id: int, target: WorkerId, *, live: bool, pull_first: bool = True
    ) -> bool:
        served = self.served[request_id]
        source = served.at
        if source is None or source == target or served.move is not None or served.cancelled:
            return False
        if target in served.aborting or not self._up[target] or not self._up[source]:
            return False
        self._count("moves")
        self.next_move += 1
        move = MoveId(self.next_move)
        served.move = Moving(move, source, target)
        pull = Pull(
            worker=target,
            move=move,
            request=self._request(served),
            source=source,
            emitted_tokens=len(served.emitted),
        )
        migrate = Migrate(
            worker=source,
            move=move,
            request_id=RequestId(request_id),
            target=target,
            live=live,
            lease_seconds=LEASE,
        )
        for command in (pull, migrate) if pull_first else (migrate, pull):
            self._send(command)
        return True

    def give_up_move(self, request_id: int) -> bool:
        """As after a time-out."""
        served = self.served[request_id]
        move = served.move
        if move is None or move.source_gone or not self._up[move.target]:
            return False
        self._count("given up")
        served.move = None
        self._abort(served, move.target)
        self._resume(served, move)
        return True

    def cancel(self, request_id: int) -> bool:
        served = self.served[request_id]
        if served.over or served.cancelled:
            return False
        self._count("cancelled")
        served.cancelled = True
        for worker in {served.at, served.move.target if served.move else None}:
            if worker is not None:
                self._abort(served, worker)
        served.at = served.move = None
        self._end_if_cancelled(served)
        return True

    # --- what workers say -----------------------------------------------------------------------

    def _hear(self, worker: WorkerId, report: Report, tokens: dict[int, list[int]]) -> None:
        match report:
            case StepReported(ids=ids, finished=finished):
                self.prefilled[worker] += report.prefill_tokens
                self.decoded[worker] += report.decode_tokens
                for id_ in ids:
                    if self.served[id_].at == worker:
                        self.served[id_].emitted += tokens[id_]
                for end in finished:
                    if self.served[end.id].at == worker:
                        self._finished(self.served[end.id])
            case Prefilled(move=move, request_id=id_, emitted_tokens=emitted):
                served = self.served[id_]
                if served.move is not None and served.move.id == move:
                    served.move.stopped = True
                    assert len(served.emitted) == emitted, "a token was lost or doubled"
                    self._count("stopped")
            case KvPulled():
                self._pulled(report)
            case PullFailed(move=move, request_id=id_):
                reused = "reused" in report.reason
                self._count("reused" if reused else " ".join(report.reason.split()[:7]))
                served = self.served[id_]
                if served.move is not None and served.move.id == move:
                    gone, ended = served.move.source_gone, served.move
                    served.move = None
                    if gone:
                        served.at = None
                    else:
                        self._resume(served, ended)
            case Released(move=move, request_id=id_, expired=True):
                self._count("expired")
                self._expired(self.served[id_], move)
            case PrefixPulled():
                self._count("fetched" if report.num_blocks else "nothing fetched")
            case Refused():
                self._refused(worker, report)
            case Aborted(request_id=id_):
                served = self.served[id_]
                served.aborting.discard(worker)
                self._end_if_cancelled(served)
            case _:
                self._count(type(report).__name__)

    def _pulled(self, report: KvPulled) -> None:
        served = self.served[report.request_id]
        move = served.move
        if move is None or move.id != report.move:
            return
        assert move.stopped, "pulled before it stopped"
        assert len(served.emitted) == report.emitted_tokens, "a token was lost or doubled"
        self._count("pulled")
        served.move, served.at = None, move.target
        served.resumed.clear()
        if self._up[move.source]:
            self._send(
                Release(worker=move.source, move=move.id, request_id=RequestId(served.task.id))
            )

    def _expired(self, served: Served, move: MoveId) -> None:
        """The source has this sequence no more: it may be on its way, or must begin again."""
        moving = served.move
        if moving is not None and moving.id == move:
            moving.source_gone = True
        elif move in served.resumed and not served.over:
            served.resumed.clear()
            served.at = served.move = None
            if moving is not None:
                self._abort(served, moving.target)

    def _refused(self, worker: WorkerId, report: Refused) -> None:
        self._count(f"refused {report.command}")
        assert report.command == "Migrate", f"worker {worker} refused: {report.reason}"

    def _finished(self, served: Served) -> None:
        assert not served.over, "ended twice"
        tokens, _ = answer(served.task, self._model_len)
        assert served.emitted == tokens, "another answer than without moves"
        if served.move is not None:
            self._abort(served, served.move.target)
        served.over, served.at, served.move = True, None, None
        self._count("finished")

    def _down(self, worker: WorkerId) -> None:
        self._up[worker] = False
        self.commands[worker].clear()
        for served in self.served.values():
            served.aborting.discard(worker)
            move = served.move
            if move is None:
                if served.at == worker:
                    served.at = None
            elif move.target == worker:
                served.move = None
                if move.source_gone:
                    served.at = None
                else:
                    self._resume(served, move)
            elif move.source == worker and move.stopped:
                move.source_gone = True
            elif move.source == worker:
                served.move = served.at = None
                self._abort(served, move.target)
            self._end_if_cancelled(served)

    # --- what the node says ---------------------------------------------------------------------

    def _request(self, served: Served) -> Request:
        return request_of_task(served.task, served.emitted, self._block_tokens)

    def _send(self, command: Command) -> None:
        if self._up[command.worker]:
            self.commands[command.worker].append(command)

    def _abort(self, served: Served, worker: WorkerId) -> None:
        if self._up[worker]:
            served.aborting.add(worker)
            self._send(Abort(worker=worker, request_id=RequestId(served.task.id)))

    def _resume(self, served: Served, move: Moving) -> None:
        served.resumed.add(move.id)
        self._send(Resume(worker=move.source, move=move.id, request_id=RequestId(served.task.id)))

    def _end_if_cancelled(self, served: Served) -> None:
        if served.cancelled and not served.aborting and not served.over:
            tokens, _ = answer(served.task, self._model_len)
            assert served.emitted == tokens[: len(served.emitted)]
            served.over = True

    def _count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    # --- to the end -----------------------------------------------------------------------------

    def round(self) -> bool:
        """Let everything happen that can, once. False: nothing could."""
        happened = False
        for id_ in self.ids:
            if self.can_start(id_):
                self.start(id_)
                happened = True
            happened |= self.deliver_command(id_)
            happened |= self.deliver_frame(id_)
            for peer in self.ids:
                if peer != id_:
                    happened |= self.deliver_bell(id_, peer)
            shell = self.workers[id_]
            if shell is not None:
                happened |= bool(shell.wake())
                happened |= bool(shell.step())
                if shell.copies:
                    shell.advance(0, 1000)
                    happened = True
        for number, served in enumerate(self.served.values()):
            if served.at is None and served.move is None:
                happened |= self.place(served.task.id, self.ids[number % len(self.ids)])
        return happened

    def finish(self, max_rounds: int = 4000) -> int:
        """Until every request is over and nothing is left anywhere. Returns how often nothing could
        happen before some time had passed."""
        waits = 0
        for _ in range(max_rounds):
            if self.round():
                continue
            leases = [
                shell
                for shell in self.workers.values()
                if shell is not None and shell.batcher.ledger.leases
            ]
            if not leases and all(served.over for served in self.served.values()):
                break
            waits += 1
            self.now += LEASE
        left = [served for served in self.served.values() if not served.over]
        assert not left, f"never ended: {left}"
        for shell in self.workers.values():
            assert shell is not None
            shell.check_at_rest()
        return waits
