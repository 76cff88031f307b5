"""A modelled world around a Dispatcher: workers that follow the rules of reports, and die at any
time.

The world keeps its own account of what the client saw and of who was present at which death,
without looking into the Dispatcher's books, and compares after every message."""

from collections import Counter
from collections.abc import Sequence, Set

from appliance.core.asks import Decided
from appliance.core.dispatcher import Dispatcher, DispatcherConfig
from appliance.core.lifecycle import RequestState, WorkerState
from appliance.core.messages import (
    Abort,
    Aborted,
    Arrived,
    Assign,
    CacheChanged,
    Command,
    Ended,
    Heartbeat,
    Input,
    Output,
    Preempted,
    Quarantine,
    Refused,
    Reject,
    Report,
    SeqFinished,
    StartWorker,
    StepReported,
    Woke,
    WorkerDown,
    WorkerUp,
)
from appliance.core.slots import DispatchSlots
from appliance.core.types import (
    CacheGroupSpec,
    ErrorKind,
    FinishReason,
    Request,
    RequestId,
    WorkerId,
    WorkerSpec,
)
from tests.core.node_kit import FCFS, load

GROUP = CacheGroupSpec(num_blocks=32, block_tokens=4)
MAX_NUM_SEQS = 3
HIDDEN_LENGTH = (1, 2, 5, 9)


class Process:
    """One incarnation of a worker."""

    def __init__(self, worker: WorkerId, epoch: int) -> None:
        self.worker = worker
        self.epoch = epoch
        self.alive = True
        self.up = False
        self.inbox: list[Command] = []
        self.emitted: dict[RequestId, int] = {}
        self.steps = 0


class World:
    """A node, its workers, its clients. Every method is something that may happen."""

    def __init__(
        self,
        num_workers: int,
        *,
        policy: DispatchSlots = FCFS.dispatch,
        max_queue: int = 30,
    ) -> None:
        specs = [WorkerSpec(id=WorkerId(w), devices=("cpu",)) for w in range(num_workers)]
        self.config = DispatcherConfig(
            max_model_len=100, max_queue=max_queue, queue_ahead=1, max_refusals=4
        )
        self.core = Dispatcher(self.config, workers=specs, policy=policy, validate=True)
        self.now = 10.0
        self.processes: dict[WorkerId, Process] = {}
        self.wire: dict[WorkerId, list[Report]] = {spec.id: [] for spec in specs}
        """Reports on their way to the node, per worker."""
        self.poison: set[RequestId] = set()
        self.length: dict[RequestId, int] = {}
        self.sent: Counter[RequestId] = Counter()
        self.where: dict[RequestId, WorkerId] = {}
        self.deaths: Counter[RequestId] = Counter()
        self.spared: Counter[RequestId] = Counter()
        self.answered: set[RequestId] = set()
        """Those whose worker has told its load since it was given them."""
        self.accepted: set[RequestId] = set()
        self.ended: dict[RequestId, Ended] = {}
        self.refusals: Counter[RequestId] = Counter()
        self.quarantined: set[WorkerId] = set()
        self.cancelled: set[RequestId] = set()
        self.drain_expired = False
        self.inputs: list[tuple[float, Input, list[Output]]] = []
        self.hear(Woke())

    # --- the node's shell -------------------------------------------------------------------------

    def hear(self, message: Input, *, after: float = 0.001) -> list[Output]:
        self.now += after
        here = self._present(message)
        if isinstance(message, Refused | StepReported) and self._in_service(message):
            self._account(message)
        told = isinstance(message, StepReported) or (
            isinstance(message, Heartbeat) and message.load is not None
        )
        if told and self._in_service(message):
            self.answered |= {id_ for id_, at in self.where.items() if at == message.worker}
        silent = set(here) - self.answered
        outputs = self.core.handle(message, self.now)
        self.inputs.append((self.now, message, outputs))
        if isinstance(message, Arrived) and not any(isinstance(o, Reject) for o in outputs):
            self.accepted.add(message.request.id)
        for request_id in here:
            del self.where[request_id]
        for output in outputs:
            self._carry_out(output)
        if here:
            self._check_deaths(here, silent)
        assert set(self.ended) <= self.accepted
        assert self.core.num_live == len(self.accepted) - len(self.ended)
        wakeup = self.core.next_wakeup()
        assert wakeup is None or wakeup > self.now, "asks to be woken in the past"
        return outputs

    def _present(self, message: Input) -> list[RequestId]:
        """Requests at a worker whose death is being told."""
        if not isinstance(message, WorkerDown) or message.epoch != self.core.epoch(message.worker):
            return []
        state = self.core.view.workers[message.worker].state
        if state in (WorkerState.DEAD, WorkerState.QUARANTINED):
            return []
        return [id_ for id_, worker in self.where.items() if worker == message.worker]

    def _check_deaths(self, here: Sequence[RequestId], silent: Set[RequestId]) -> None:
        """R27: two deaths in company are forgiven, and no more than five in all; who is convicted
        died alone. A worker that had not answered is forgiven twice more."""
        most = self.config.poison_deaths + self.config.max_trials
        for request_id in here:
            end = self.ended.get(request_id)
            if request_id in self.cancelled:
                assert end is not None, "a cancelled request outlived its worker"
                continue
            if request_id in silent and self.spared[request_id] < self.config.spared_deaths:
                self.spared[request_id] += 1
                assert end is None or end.error is ErrorKind.NO_WORKER
                continue
            self.deaths[request_id] += 1
            if end is not None and end.error is ErrorKind.POISON:
                assert here == [request_id], "convicted in company"
                assert self.deaths[request_id] > self.config.poison_deaths
            else:
                assert end is None or end.error is ErrorKind.NO_WORKER
                assert self.deaths[request_id] < most, "it may go on killing"

    def _in_service(self, report: Refused | StepReported | Heartbeat) -> bool:
        return self.core.view.workers[report.worker].state is WorkerState.READY

    def _account(self, report: Refused | StepReported) -> None:
        """What a shell would hand to the clients, and who goes back to the queue."""
        if isinstance(report, Refused):
            if report.request_id is not None and self.where.get(report.request_id) == report.worker:
                del self.where[report.request_id]
            return
        counts = report.counts or (1,) * len(report.ids)
        for request_id, count in zip(report.ids, counts, strict=True):
            state = self.core.request_state(request_id)
            reads = state in (RequestState.ASSIGNED, RequestState.DECODING)
            if reads and self.where.get(request_id) == report.worker:
                self.sent[request_id] += count

    def _carry_out(self, output: Output) -> None:
        match output:
            case StartWorker(worker=worker, epoch=epoch):
                old = self.processes.get(worker)
                assert old is None or not old.alive, "started beside a living one"
                self.processes[worker] = Process(worker, epoch)
                self.wire[worker].clear()  # the old connection is closed
            case Assign(worker=worker, request=request, emitted_tokens=emitted):
                assert emitted == self.sent[request.id], "goes on after another token"
                self.where[request.id] = worker
                self.answered.discard(request.id)
                self._post(worker, output)
            case Abort(worker=worker):
                self._post(worker, output)
            case Ended(request_id=request_id):
                assert request_id in self.accepted, "a stranger ended"
                assert request_id not in self.ended, "ended twice"
                self._check_end(output)
                self.ended[request_id] = output
                self.where.pop(request_id, None)
            case Quarantine(worker=worker):
                self.quarantined.add(worker)
            case Reject() | Decided():
                pass
            case _:
                raise AssertionError(f"said {output}")

    def _check_end(self, end: Ended) -> None:
        if end.error is None:
            assert end.reason is FinishReason.STOP
            assert self.sent[end.request_id] == self.length[end.request_id], "a token too few"
        elif end.error is ErrorKind.CANCELLED:
            assert end.request_id in self.cancelled
        elif end.error is ErrorKind.DRAIN_TIMEOUT:
            assert self.core.is_draining
        elif end.error is ErrorKind.NO_WORKER:
            assert len(self.quarantined) + 1 >= len(self.wire)
        elif end.error is ErrorKind.INTERNAL:
            assert self.refusals[end.request_id] > self.config.max_refusals
        else:
            assert end.error is ErrorKind.POISON

    def _post(self, worker: WorkerId, command: Command) -> None:
        process = self.processes[worker]
        if process.alive:  # a write to a dead one is lost; its death is on its way
            process.inbox.append(command)

    # --- clients ----------------------------------------------------------------------------------

    def arrive(
        self, *, prompt: int, length: int, poison: bool = False, group: RequestId | None = None
    ) -> RequestId:
        number = RequestId(len(self.length) + 1)
        self.length[number] = length
        if poison:
            self.poison.add(number)
        first = 1000 * (prompt % 3)
        hashes = tuple(range(first, first + prompt // GROUP.block_tokens))
        request = Request(
            id=number,
            arrived=self.now,
            prompt_tokens=prompt,
            max_tokens=20,
            prefix_hashes=hashes,
            group=group,
        )
        self.hear(Arrived(request=request))
        return number

    def live(self) -> list[RequestId]:
        return sorted(self.accepted - self.ended.keys())

    # --- workers ----------------------------------------------------------------------------------

    def come_up(self, worker: WorkerId) -> None:
        process = self.processes.get(worker)
        if process is not None and process.alive and not process.up:
            process.up = True
            up = WorkerUp(
                worker=worker,
                epoch=process.epoch,
                groups=(GROUP,),
                max_num_seqs=MAX_NUM_SEQS,
                max_batch_tokens=64,
            )
            self.wire[worker].append(up)

    def obey(self, worker: WorkerId, *, refuse: bool = False) -> None:
        """Take the commands out of the inbox; with `refuse`, turn assignments away."""
        process = self.processes.get(worker)
        if process is None or not process.alive or not process.up:
            return
        while process.inbox:
            command = process.inbox.pop(0)
            if isinstance(command, Abort):
                process.emitted.pop(command.request_id, None)
                self.wire[worker].append(Aborted(worker=worker, request_id=command.request_id))
            elif isinstance(command, Assign) and refuse:
                self.refusals[command.request.id] += 1
                self.wire[worker].append(
                    Refused(
                        worker=worker,
                        command="Assign",
                        kind=ErrorKind.INTERNAL,
                        reason="not now",
                        request_id=command.request.id,
                    )
                )
            elif isinstance(command, Assign):
                assert command.request.id not in process.emitted, "assigned twice"
                process.emitted[command.request.id] = command.emitted_tokens
                self._report_load(process)

    def step(self, worker: WorkerId, *, burst: int = 1) -> None:
        """One forward of the first sequences; a poisonous one kills the process."""
        process = self.processes.get(worker)
        if process is None or not process.alive or not process.up:
            return
        batch = list(process.emitted)[:MAX_NUM_SEQS]
        if self.poison.intersection(batch):
            self.die(worker)
            return
        process.steps += 1
        counts, ends = [], []
        for request_id in batch:
            left = self.length[request_id] - process.emitted[request_id]
            counts.append(min(burst, left))
            process.emitted[request_id] += counts[-1]
            if counts[-1] == left:
                ends.append(
                    SeqFinished(
                        id=request_id,
                        reason=FinishReason.STOP,
                        emitted_tokens=process.emitted.pop(request_id),
                        cached_tokens=0,
                    )
                )
        report = StepReported(
            worker=worker,
            step=process.steps,
            elapsed=0.01,
            prefill_tokens=0,
            decode_tokens=len(batch),
            ids=tuple(batch),
            counts=() if all(count == 1 for count in counts) else tuple(counts),
            load=load(running=len(process.emitted)),
            finished=tuple(ends),
        )
        added = tuple(end.id * 7 for end in ends)
        self.wire[worker] += [report, CacheChanged(worker=worker, added=added)]

    def preempt(self, worker: WorkerId) -> None:
        process = self.processes.get(worker)
        if process is not None and process.alive and process.emitted:
            last = list(process.emitted)[-1]
            self.wire[worker].append(Preempted(worker=worker, request_id=last, lost_tokens=5))

    def beat(self, worker: WorkerId) -> None:
        process = self.processes.get(worker)
        if process is not None and process.alive:
            self.wire[worker].append(Heartbeat(worker=worker, step=process.steps))

    def die(self, worker: WorkerId, *, lost: int = 0, early: bool = False) -> None:
        """The process ends. The last `lost` reports never arrive; with `early` its death is told
        before the others, which then come late."""
        process = self.processes.get(worker)
        if process is None or not process.alive:
            return
        process.alive = False
        wire = self.wire[worker]
        del wire[len(wire) - min(lost, len(wire)) :]
        down = WorkerDown(worker=worker, epoch=process.epoch, cause="died")
        wire.insert(0 if early else len(wire), down)

    def deliver(self, worker: WorkerId, *, count: int = 1) -> None:
        for _ in range(count):
            if self.wire[worker]:
                self.hear(self.wire[worker].pop(0))

    def _report_load(self, process: Process) -> None:
        told = load(queued=len(process.emitted))
        beat = Heartbeat(worker=process.worker, step=process.steps, load=told)
        self.wire[process.worker].append(beat)

    # --- the end ----------------------------------------------------------------------------------

    def settle(self) -> None:
        """Nothing more goes wrong (but poison stays poison): everything must come to an end."""
        for _ in range(400):
            if not self.core.num_live:
                break
            for worker in self.wire:
                self.come_up(worker)
                self.obey(worker)
                self.step(worker, burst=3)
                while self.wire[worker]:
                    self.deliver(worker)
            wakeup = self.core.next_wakeup()
            if wakeup is not None:
                self.hear(Woke(), after=wakeup - self.now)
        left = [(id_, self.core.request_state(id_)) for id_ in self.live()]
        assert not left, f"never ended: {left}"
        assert set(self.ended) == self.accepted
