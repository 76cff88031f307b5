"""The real Dispatcher over real Batchers: wires that deliver when they like, workers that die and
come back, operators who flip, park, wake and add.

`MovingNode` has the wires and the workers; here the Dispatcher takes its decisions instead of the
test. What a client got is compared with `answer`, which knows nothing of all this."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence

from appliance.core.asks import Answered, Decided, ParkAsked, RolesAsked, WakeAsked, WorkerAsked
from appliance.core.dispatcher import Dispatcher, DispatcherConfig
from appliance.core.lifecycle import RequestState, WorkerState
from appliance.core.messages import (
    Abort,
    Arrived,
    Assign,
    Cancelled,
    Degrade,
    Ended,
    Input,
    KvPulled,
    LinkUp,
    Migrate,
    Output,
    Park,
    Prefilled,
    Pull,
    Quarantine,
    Reject,
    Release,
    Report,
    Resume,
    SetRole,
    StartWorker,
    StepReported,
    Wake,
    Woke,
    WorkerDown,
    WorkerUp,
)
from appliance.core.slots import DispatchSlots
from appliance.core.types import (
    CacheGroupSpec,
    ErrorKind,
    MoveId,
    RequestId,
    Role,
    WorkerId,
    WorkerSpec,
)
from tests.core.moving_node import MovingNode, Served
from tests.core.moving_worker import Frame, MovingWorker
from tests.core.toy_slab import Slab
from tests.core.toy_worker import Task, answer, request_of_task

READS = (RequestState.ASSIGNED, RequestState.DECODING, RequestState.MIGRATING)


class DispatchedNode(MovingNode):
    """Workers, wires, and the Dispatcher."""

    def __init__(
        self,
        roles: Sequence[Role],
        group: CacheGroupSpec,
        *,
        start: Callable[[MovingNode, WorkerId], MovingWorker],
        model_len: int,
        policy: Callable[[], DispatchSlots],
        limits: Mapping[str, int],
        **config: float,
    ) -> None:
        self.group = group
        self.limits = limits
        self.core: Dispatcher | None = None
        self.wanted: set[WorkerId] = set()
        """Workers whose process is to be started."""
        self.linked_to: dict[WorkerId, dict[WorkerId, int]] = {}
        """Links that each incarnation has told of."""
        self.moves_open: dict[MoveId, Pull] = {}
        self.stopped: set[MoveId] = set()
        self.ended: dict[RequestId, Ended] = {}
        self.inputs: list[tuple[float, Input, list[Output]]] = []
        self.asks: dict[int, Answered | None] = {}
        self.decisions: dict[int, Decided] = {}
        self.poison: int | None = None
        self.poisoned_deaths = 0
        self.flips = 0
        super().__init__(len(roles), group, start=start, model_len=model_len)
        fields = {"respawn_backoff": 0.02, "respawn_backoff_max": 0.1, "block_bytes": 1, **config}
        self.config = DispatcherConfig(
            max_model_len=model_len,
            quarantine_deaths=10_000,
            max_refusals=10_000,
            queue_ahead=1,
            **fields,  # type: ignore[arg-type]
        )
        self.specs = [
            WorkerSpec(id=worker, devices=("toy",), role=role)
            for worker, role in zip(self.ids, roles, strict=True)
        ]
        self.policy = policy
        self.core = Dispatcher(self.config, workers=self.specs, policy=policy(), validate=True)
        self.say(Woke())

    # --- the Dispatcher's shell -------------------------------------------------------------------

    def say(self, message: Input) -> list[Output]:
        """The Dispatcher hears this."""
        assert self.core is not None
        self.now += 1e-6
        outputs = self.core.handle(message, self.now)
        self.inputs.append((self.now, message, outputs))
        for output in outputs:
            self._carry_out(output)
        wakeup = self.core.next_wakeup()
        assert wakeup is None or wakeup > self.now, "asks to be woken in the past"
        return outputs

    def _carry_out(self, output: Output) -> None:
        match output:
            case StartWorker(worker=worker):
                assert self.workers[worker] is None, "started beside a living one"
                self.wanted.add(worker)
            case Assign(request=request):
                assert output.emitted_tokens == len(self.served[request.id].emitted)
                self._send(output)
            case Pull():
                self._count("moves")
                self.moves_open[output.move] = output
                self._send(output)
            case Abort(worker=worker, request_id=request_id):
                for move, pull in list(self.moves_open.items()):
                    if pull.request.id == request_id and worker in (pull.worker, pull.source):
                        del self.moves_open[move]
                self._send(output)
            case Resume(move=move):
                self._count("resumed")
                self.moves_open.pop(move, None)
                self._send(output)
            case Migrate() | Release() | SetRole() | Park() | Wake():
                self._send(output)
            case Ended(request_id=request_id):
                assert request_id not in self.ended, "ended twice"
                self.ended[request_id] = output
                self._check_end(output, self.served[request_id])
            case Answered(ask=ask):
                assert self.asks[ask] is None, "answered twice"
                self.asks[ask] = output
                self._count(f"answered {output.outcome.value}")
            case Decided():
                self.decisions[output.decision] = output
            case Degrade():
                pass  # on record, nothing to carry out
            case Quarantine() | Reject():
                raise AssertionError(f"said {output}")
            case _:
                raise AssertionError(f"said {output}")

    def _check_end(self, end: Ended, served: Served) -> None:
        served.over = True
        tokens, reason = answer(served.task, self._model_len)
        if end.error is None:
            assert served.emitted == tokens, "another answer than without moves"
            assert end.reason is reason
            self._count("finished")
        else:
            assert served.emitted == tokens[: len(served.emitted)]
            cancelled = end.error is ErrorKind.CANCELLED and served.cancelled
            assert cancelled or end.error is ErrorKind.POISON, end

    # --- what happens -----------------------------------------------------------------------------

    def arrive(self, task: Task) -> None:
        super().arrive(task)
        request = request_of_task(task, (), self._block_tokens)
        self.say(Arrived(request=request))

    def cancel(self, request_id: int) -> bool:
        served = self.served[request_id]
        if served.over or served.cancelled:
            return False
        served.cancelled = True
        self._count("cancelled")
        self.say(Cancelled(request_id=RequestId(request_id)))
        return True

    def ask_roles(self, roles: Sequence[tuple[WorkerId, Role]]) -> None:
        self.say(RolesAsked(ask=self._ask(), roles=tuple(roles)))

    def ask_park(self, worker: WorkerId) -> None:
        self.say(ParkAsked(ask=self._ask(), worker=worker))

    def ask_wake(self, worker: WorkerId) -> None:
        self.say(WakeAsked(ask=self._ask(), worker=worker))

    def ask_worker(self, role: Role) -> None:
        new = WorkerId(len(self.ids))
        self.slabs[new] = Slab(self.group.num_blocks, self.group.block_tokens)
        self.commands[new], self.frames[new] = deque(), deque()
        for peer in self.ids:
            self.bells[new, peer], self.bells[peer, new] = deque(), deque()
        self.ids.append(new)
        self.epochs[new], self._up[new], self.workers[new] = 0, False, None
        spec = WorkerSpec(id=new, devices=("toy",), role=role)
        self.say(WorkerAsked(ask=self._ask(), spec=spec))

    def _ask(self) -> int:
        number = len(self.asks) + 1
        self.asks[number] = None
        return number

    def wake_node(self) -> bool:
        """The time comes that the Dispatcher named, if it has come."""
        assert self.core is not None
        wakeup = self.core.next_wakeup()
        if wakeup is None or wakeup > self.now:
            return False
        self.say(Woke())
        return True

    # --- processes --------------------------------------------------------------------------------

    def can_start(self, worker: WorkerId) -> bool:
        return worker in self.wanted

    def start(self, worker: WorkerId) -> None:
        if self.core is None:
            return
        self.wanted.discard(worker)
        self.linked_to[worker] = {}
        up = WorkerUp(
            worker=worker,
            epoch=self.core.epoch(worker),
            groups=(self.group,),
            max_num_seqs=self.limits["max_num_seqs"],
            max_batch_tokens=self.limits["max_batch_tokens"],
            role=self.specs[worker].role if worker < len(self.specs) else Role.MIXED,
        )
        self.frames[worker].append(([up], {}))
        super().start(worker)
        self._tell_links()

    def deliver_command(self, worker: WorkerId) -> bool:
        shell, queue = self.workers[worker], self.commands[worker]
        if shell is not None and queue and isinstance(queue[0], SetRole | Park | Wake):
            self._links_first(worker, shell)
            shell.handle(queue.popleft())
            happened = True
        else:
            happened = super().deliver_command(worker)
        self._tell_links()
        return happened

    def deliver_bell(self, sender: WorkerId, peer: WorkerId) -> bool:
        happened = super().deliver_bell(sender, peer)
        self._tell_links()
        return happened

    def _tell_links(self) -> None:
        """Each incarnation tells of a doorbell once."""
        for worker, shell in self.workers.items():
            if shell is None:
                continue
            told = self.linked_to[worker]
            for peer, epoch in shell.linked.items():
                if told.get(peer) != epoch:
                    told[peer] = epoch
                    link = LinkUp(
                        worker=worker,
                        peer=peer,
                        peer_epoch=epoch,
                        path="toy",
                        bytes_per_second=1e9,
                    )
                    self.frames[worker].append(([link], {}))

    def step(self, shell: MovingWorker) -> bool:
        """Plan and finish; a poisonous sequence kills the process that computes it."""
        while (plan := shell.plan()) is not None:
            if any(item.id == self.poison for item in plan.work):
                self.poisoned_deaths += 1
                self.kill(shell.worker)
                return True
        if not shell.planned and not shell.executed:
            return False
        shell.finish()
        return True

    # --- what workers say -------------------------------------------------------------------------

    def _must_wait(self, frame: Frame | None) -> bool:
        for report in frame[0] if frame is not None else []:
            if isinstance(report, KvPulled) and report.move in self.moves_open:
                return report.move not in self.stopped
        return False

    def _hear(self, worker: WorkerId, report: Report, tokens: dict[int, list[int]]) -> None:
        assert self.core is not None
        if isinstance(report, StepReported):
            for id_ in report.ids:
                reads = self.core.request_state(id_) in READS
                if reads and self.core.worker_of(id_) == worker:
                    self.served[id_].emitted += tokens[id_]
        if isinstance(report, Prefilled):
            self.stopped.add(report.move)
        if isinstance(report, KvPulled):
            if self.core.request_state(report.request_id) is RequestState.HANDING_OFF:
                self._count("pulled")
            self.moves_open.pop(report.move, None)
        self._count(type(report).__name__)
        self.say(report)

    def _down(self, worker: WorkerId) -> None:
        self._up[worker] = False
        self.commands[worker].clear()
        for move, pull in list(self.moves_open.items()):
            if worker == pull.worker or (worker == pull.source and move not in self.stopped):
                del self.moves_open[move]
        self.say(WorkerDown(worker=worker, epoch=self.epochs[worker], cause="killed"))

    # --- to the end -------------------------------------------------------------------------------

    def round(self) -> bool:
        happened = self.wake_node()
        for id_ in list(self.ids):
            if self.can_start(id_):
                self.start(id_)
                happened = True
            while self.deliver_command(id_) or self.deliver_frame(id_):
                happened = True
            for peer in self.ids:
                while peer != id_ and self.deliver_bell(id_, peer):
                    happened = True
            shell = self.workers[id_]
            if shell is not None:
                happened |= bool(shell.wake())
                happened |= self.step(shell)
                while shell.copies and self.workers[id_] is shell:
                    shell.advance(0, 1000)
                    happened = True
        return happened

    def finish(self, max_rounds: int = 6000) -> None:
        """Until every request has ended, every ask is answered and nothing is left anywhere."""
        assert self.core is not None
        for _ in range(max_rounds):
            if self.round():
                continue
            busy = self.core.num_live or None in self.asks.values() or self._leases()
            if not busy and None not in self.workers.values():
                break
            self.now += 0.5
        left = [served for served in self.served.values() if not served.over]
        assert not left, f"never ended: {left}"
        assert not [ask for ask, how in self.asks.items() if how is None], "never answered"
        for worker, shell in self.workers.items():
            assert shell is not None
            shell.check_at_rest()
            view = self.core.view.workers[worker]
            assert view.state in (WorkerState.READY, WorkerState.PARKED)
            assert view.role is shell.batcher.role, "the worker has another role than the node says"
            assert (view.assigned, view.incoming, view.leased) == (0, 0, 0)

    def _leases(self) -> bool:
        return any(
            shell is not None and bool(shell.batcher.ledger.leases)
            for shell in self.workers.values()
        )

    def check_replay(self) -> None:
        """Law 12: a fresh Dispatcher that hears the same says the same."""
        fresh = Dispatcher(self.config, workers=self.specs, policy=self.policy())
        for now, message, outputs in self.inputs:
            assert fresh.handle(message, now) == outputs
