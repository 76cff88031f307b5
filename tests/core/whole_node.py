"""A whole node on a virtual clock: the real Dispatcher, real Batchers, an engine computed by hand.

Only the outside is modelled: processes that start and die, messages that need time, clients that
go away. Token ids travel as the shells carry them: the node keeps what it sent, and a sequence
that lost its worker goes on from there. What a client got can be compared with `answer`, which
knows nothing of steps, blocks, workers or deaths."""

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from appliance.core.asks import Decided
from appliance.core.batcher import Batcher
from appliance.core.dispatcher import Dispatcher, DispatcherConfig
from appliance.core.invariants import BatchWatch
from appliance.core.journal import Journal, JournalHeader
from appliance.core.lifecycle import RequestState
from appliance.core.messages import (
    Abort,
    Arrived,
    Assign,
    Cancelled,
    Command,
    Degrade,
    Ended,
    Input,
    Output,
    Reject,
    Report,
    StartWorker,
    StepReported,
    Woke,
    WorkerDown,
    WorkerUp,
)
from appliance.core.slots import Policy
from appliance.core.types import (
    BatcherConfig,
    CacheGroupSpec,
    FinishReason,
    RequestId,
    SeqResult,
    StepPlan,
    StepResult,
    WorkerId,
    WorkerSpec,
)
from tests.core.toy_worker import Task, ToyEngine, block_hashes, contents_of, request_of_task

LATENCY = 0.001
START_SECONDS = 0.03
STEP_SECONDS = 0.01

Tokens = dict[RequestId, list[int]]


@dataclass(frozen=True)
class Setting:
    """How the node is built."""

    policy: Policy
    groups: tuple[CacheGroupSpec, ...]
    num_workers: int = 2
    depth: int = 0
    max_num_seqs: int = 4
    max_batch_tokens: int = 16
    max_model_len: int = 64


@dataclass
class Incarnation:
    """One worker process: Batcher, engine, and the shell between them."""

    setting: Setting
    worker: WorkerId
    epoch: int
    send: Callable[[list[Report], Tokens], None]
    later: Callable[[float, Callable[[], None]], None]
    clock: Callable[[], float]
    deadly: Callable[[StepPlan], bool]
    tasks: dict[RequestId, Task] = field(default_factory=dict)
    emitted: Tokens = field(default_factory=dict)

    def __post_init__(self) -> None:
        setting = self.setting
        config = BatcherConfig(
            max_model_len=setting.max_model_len,
            max_num_seqs=setting.max_num_seqs,
            max_batch_tokens=setting.max_batch_tokens,
            depth=setting.depth,
        )
        self.batcher = Batcher(
            self.worker, config, groups=setting.groups, policy=setting.policy.batch
        )
        self.engine = ToyEngine(setting.groups)
        self.plans: deque[StepPlan] = deque()
        self.alive = True
        self.watch = BatchWatch(self.batcher)

    def hear(self, command: Command, now: float, *, task: Task | None, emitted: list[int]) -> None:
        if not self.alive:
            return
        if isinstance(command, Assign) and task is not None:
            contents = contents_of([*task.prompt, *emitted])
            hashes = block_hashes(contents, self.setting.groups[0].block_tokens)
            self.tasks[command.request.id] = task
            self.emitted[command.request.id] = list(emitted)
            self.engine.add(task, emitted)
            request = replace(command.request, prefix_hashes=tuple(hashes))
            known = replace(command, request=request)
            self.send(self.batcher.handle(known, now), {})
        else:
            self.send(self.batcher.handle(command, now), {})
        self.go_on(now)

    def go_on(self, now: float) -> None:
        """Plan as far ahead as allowed; start the engine if it was idle."""
        idle = not self.plans
        while (plan := self.batcher.next_step(now)) is not None:
            self.plans.append(plan)
        self.watch.check()
        if idle and self.plans:
            self.later(STEP_SECONDS, self.finish)

    def finish(self) -> None:
        """The engine is done with the oldest plan."""
        if not self.alive:
            return
        plan = self.plans.popleft()
        if self.deadly(plan):
            return
        results, told = [], Tokens()
        for request_id, token in self.engine.execute(plan):
            if self.batcher.is_live(request_id):
                results.append(self._result(request_id, token))
                told[request_id] = [token]
        result = StepResult(step=plan.step, results=tuple(results), elapsed=STEP_SECONDS)
        self.send(self.batcher.finish_step(result, self.clock()), told)
        if self.plans:
            self.later(STEP_SECONDS, self.finish)
        self.go_on(self.clock())

    def _result(self, request_id: RequestId, token: int) -> SeqResult:
        task, emitted = self.tasks[request_id], self.emitted[request_id]
        emitted.append(token)
        known = len(task.prompt) + len(emitted)
        contents = self.engine.rows[request_id].contents
        full = known % self.setting.groups[0].block_tokens == 0
        return SeqResult(
            id=request_id,
            num_tokens=1,
            stopped=FinishReason.STOP if task.draw(contents[known - 2])[1] else None,
            hashes=(contents[known - 1],) if full else (),
        )


class WholeNode:
    """The event loop and the node's shell."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        specs = tuple(
            WorkerSpec(id=WorkerId(w), devices=("toy",)) for w in range(setting.num_workers)
        )
        config = DispatcherConfig(
            max_model_len=setting.max_model_len,
            queue_ahead=1,
            quarantine_deaths=1000,
            respawn_backoff=0.02,
            respawn_backoff_max=0.1,
        )
        self.dispatcher = Dispatcher(
            config, workers=specs, policy=setting.policy.dispatch, validate=True
        )
        header = JournalHeader(config=config, workers=specs, policy=setting.policy.name)
        self.journal = Journal(header)
        self.now = 0.0
        self.tasks: dict[RequestId, Task] = {}
        self.tokens: Tokens = {}
        self.ended: dict[RequestId, Ended] = {}
        self.rejected: set[RequestId] = set()
        self.poison: RequestId | None = None
        """Kills each worker that computes it."""
        self.where: dict[RequestId, WorkerId] = {}
        self.processes: dict[WorkerId, Incarnation] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._timer: float | None = None
        self.later(0.0, lambda: self.hear(Woke()))

    def at(self, time: float, action: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (time, self._count, action))

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        self.at(self.now + seconds, action)

    # --- what a test asks for ---------------------------------------------------------------------

    def submit(self, task: Task) -> None:
        """A request arrives at its time."""
        self.later(task.arrived, lambda: self._submit(task))

    def kill(self, worker: int, at: float) -> None:
        self.later(at, lambda: self._kill(WorkerId(worker % self.setting.num_workers)))

    def cancel(self, number: int, at: float) -> None:
        self.later(at, lambda: self._cancel(RequestId(number)))

    def run(self, max_events: int = 100_000) -> None:
        """Until nothing is left to happen."""
        for _ in range(max_events):
            if not self._events:
                break
            self.now, _, action = heapq.heappop(self._events)
            action()
        assert not self._events, "never comes to rest"
        assert self.dispatcher.num_live == 0
        assert self.ended.keys() == self.tasks.keys() - self.rejected
        for process in self.processes.values():
            if process.alive:
                load = process.batcher.load()
                assert load.blocks_free == load.blocks_total, "a block leaked"

    # --- the shell --------------------------------------------------------------------------------

    def hear(self, message: Input) -> None:
        outputs = self.dispatcher.handle(message, self.now)
        self.journal.record(self.now, "test", message, outputs)
        for output in outputs:
            self._carry_out(output)
        wakeup = self.dispatcher.next_wakeup()
        if wakeup is not None and wakeup != self._timer:
            self.at(wakeup, lambda: self.hear(Woke()))
        self._timer = wakeup

    def _carry_out(self, output: Output) -> None:
        match output:
            case StartWorker(worker=worker, epoch=epoch):
                self._start(worker, epoch)
            case Assign(worker=worker, request=request):
                emitted = list(self.tokens[request.id])
                assert len(emitted) == output.emitted_tokens
                self.where[request.id] = worker
                self._command(worker, output, self.tasks[request.id], emitted)
            case Abort(worker=worker):
                self._command(worker, output, None, [])
            case Ended(request_id=request_id):
                assert request_id not in self.ended
                self.ended[request_id] = output
            case Reject(request_id=request_id):
                self.rejected.add(request_id)
            case Decided() | Degrade():
                pass  # on record, nothing to carry out
            case _:
                raise AssertionError(f"said {output}")

    def _command(
        self, worker: WorkerId, command: Command, task: Task | None, emitted: list[int]
    ) -> None:
        process = self.processes[worker]
        self.later(LATENCY, lambda: process.hear(command, self.now, task=task, emitted=emitted))

    def _start(self, worker: WorkerId, epoch: int) -> None:
        def send(reports: list[Report], told: Tokens) -> None:
            if reports:
                self.later(LATENCY, lambda: self._frame(process, reports, told))

        def deadly(plan: StepPlan) -> bool:
            dies = any(item.id == self.poison for item in plan.work)
            if dies:
                self._kill(worker)
            return dies

        process = Incarnation(
            self.setting, worker, epoch, send, self.later, lambda: self.now, deadly
        )
        self.processes[worker] = process
        up = WorkerUp(
            worker=worker,
            epoch=epoch,
            groups=self.setting.groups,
            max_num_seqs=self.setting.max_num_seqs,
            max_batch_tokens=self.setting.max_batch_tokens,
        )
        self.later(START_SECONDS, lambda: self._frame(process, [up], {}))

    def _frame(self, process: Incarnation, reports: Sequence[Report], told: Tokens) -> None:
        if self.processes[process.worker] is not process or not process.alive:
            return  # its connection is closed
        for report in reports:
            if isinstance(report, StepReported):
                assert list(report.ids) == list(told)
                for request_id, tokens in told.items():
                    state = self.dispatcher.request_state(request_id)
                    if state in (RequestState.ASSIGNED, RequestState.DECODING):
                        assert self.where[request_id] == process.worker
                        self.tokens[request_id] += tokens
            self.hear(report)

    def _submit(self, task: Task) -> None:
        number = RequestId(task.id)
        self.tasks[number] = task
        self.tokens[number] = []
        request = request_of_task(task, (), self.setting.groups[0].block_tokens)
        self.hear(Arrived(request=replace(request, arrived=self.now)))

    def _cancel(self, number: RequestId) -> None:
        self.hear(Cancelled(request_id=number))

    def _kill(self, worker: WorkerId) -> None:
        process = self.processes.get(worker)
        if process is not None and process.alive:
            process.alive = False
            down = WorkerDown(worker=worker, epoch=process.epoch, cause="killed")
            self.later(LATENCY, lambda: self.hear(down))
