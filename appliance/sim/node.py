"""The node's shell on a virtual clock: the real Dispatcher, clients, processes that start and die.

What the Dispatcher says is carried out at once, as in the live node; what workers say reaches it
`pipe_seconds` later, in their order, and so do commands the other way.
"""

from collections.abc import Sequence
from typing import assert_never

from appliance.core.asks import Answered, Decided
from appliance.core.blocks import BlockLedger
from appliance.core.dispatcher import Dispatcher, DispatcherConfig
from appliance.core.messages import (
    Abort,
    Arrived,
    Assign,
    Command,
    Degrade,
    Ended,
    Input,
    KvPulled,
    LinkUp,
    LoadWeights,
    Migrate,
    Output,
    Park,
    Pull,
    Quarantine,
    Reject,
    Release,
    Report,
    Resume,
    SetBudget,
    SetRole,
    StartWorker,
    StepReported,
    Wake,
    Woke,
    WorkerDown,
    WorkerUp,
)
from appliance.core.peer import PeerMessage
from appliance.core.slots import Policy
from appliance.core.types import (
    BatcherConfig,
    Record,
    Request,
    RequestId,
    Slo,
    WorkerId,
    WorkerSpec,
)
from appliance.metrics.outcome import Outcome
from appliance.sim.clients import Client
from appliance.sim.copies import Traffic
from appliance.sim.events import Events
from appliance.sim.machine import Machine
from appliance.sim.truth import Names, Truth
from appliance.sim.worker import VirtualWorker
from appliance.workload.draws import Draws
from appliance.workload.items import Item

ORIGIN = 1.0
"""When the run starts on the node's clock: workers and links are up by then."""
MIN_DELAY = 0.001
"""Of a timer of the node, as in the live one."""

REMEMBERED = 60.0
"""Seconds that the world remembers a request that has ended: commands may be on their way."""

Tape = list[tuple[float, Input, list[Output]]]
"""What the Dispatcher heard and said, with the time."""


class Kill(Record, frozen=True, kw_only=True):
    """The process of this worker dies at this time of the run."""

    at: float
    worker: WorkerId


class Setting(Record, frozen=True, kw_only=True):
    """How the node is built."""

    machine: Machine
    dispatcher: DispatcherConfig
    batcher: BatcherConfig
    workers: tuple[WorkerSpec, ...]
    seed: int = 0
    blind: bool = False
    """Requests do not say what they need (an ablation)."""
    validate: bool = False
    kills: tuple[Kill, ...] = ()
    script: tuple[tuple[float, Input], ...] = ()
    """What the Dispatcher hears beside everything else (operators, cancels), by time of the run."""


class VirtualNode:
    """One run. `run` lets it happen."""

    def __init__(
        self,
        setting: Setting,
        policy: Policy,
        *,
        items: Sequence[Item],
        tape: Tape | None = None,
    ) -> None:
        """`items` in the order of their times. With `tape` everything is recorded there."""
        self.setting = setting
        self.machine = setting.machine
        self.events = Events()
        self.traffic = Traffic()
        self.pools: dict[WorkerId, BlockLedger] = {}
        self.workers: dict[WorkerId, VirtualWorker] = {}
        self.dispatcher = Dispatcher(
            setting.dispatcher,
            workers=setting.workers,
            policy=policy.dispatch,
            validate=setting.validate,
        )
        self.outcomes: list[Outcome] = []
        """Of those that have ended."""
        self.finished_steps = 0
        self.busy_seconds = 0.0
        """Of all incarnations that are gone."""
        self.flips = 0
        self.moves = 0
        self.demotions = 0
        self._policy = policy
        self._items = items
        self._tape = tape
        self._names = Names(self.machine.block_tokens)
        self._truths: dict[RequestId, Truth] = {}
        self._clients: dict[RequestId, Client] = {}
        self._arrived = 0
        self._timer_at: float | None = None
        self._timer = 0
        self._command_at: dict[WorkerId, float] = {}
        """When the last command reaches each worker: none overtakes another."""

    # --- the run --------------------------------------------------------------------------------

    def run(self, *, until: float) -> None:
        """Serve all items, or those that end before this time of the run."""
        self._hear(Woke())
        self._next_arrival()
        for kill in self.setting.kills:
            self.events.at(ORIGIN + kill.at, self._kill, kill.worker)
        for at, message in self.setting.script:
            self.events.at(ORIGIN + at, self._hear, message)
        total = len(self._items)
        self.events.run(lambda: len(self.outcomes) < total, until=ORIGIN + until)
        for client in self._clients.values():
            self.outcomes.append(
                client.outcome(None, origin=ORIGIN, delay=self.machine.front_seconds)
            )
        self._clients.clear()

    @property
    def seconds(self) -> float:
        """Since the start of the run."""
        return self.events.now - ORIGIN

    # --- what workers ask of their surroundings -------------------------------------------------

    def truth(self, request_id: RequestId) -> Truth:
        """What the world knows of a request."""
        return self._truths[request_id]

    def send(self, worker: VirtualWorker, reports: Sequence[Report]) -> None:
        """A frame leaves for the node."""
        self.events.later(self.machine.pipe_seconds, self._frame, (worker, reports))

    def ring(self, worker: VirtualWorker, peer: WorkerId, message: PeerMessage) -> None:
        """A message leaves for a peer; lost with it if it dies meanwhile."""
        target = self.workers.get(peer)
        if target is None or not target.alive:
            self.events.later(self.machine.peer_seconds, worker.hear, ("lost", peer))
        else:
            self.events.later(
                self.machine.peer_seconds, target.hear, ("peer", (worker.id, message))
            )

    # --- clients --------------------------------------------------------------------------------

    def _next_arrival(self) -> None:
        if self._arrived < len(self._items):
            item = self._items[self._arrived]
            self.events.at(ORIGIN + item.at + self.machine.front_seconds, self._arrive, item)

    def _arrive(self, item: Item) -> None:
        self._arrived += 1
        self._next_arrival()
        request_id = RequestId(self._arrived)
        names: tuple[int, ...] = ()
        if self.setting.batcher.enable_prefix_cache:
            names = self._names.prompt(
                item.index,
                item.prompt_tokens,
                prefix=item.prefix,
                prefix_block_tokens=item.prefix_block_tokens,
            )
        self._truths[request_id] = Truth(
            item.index,
            prompt_tokens=item.prompt_tokens,
            length=item.output_tokens,
            names=names,
            tail=self._names.tail(item.index),
        )
        self._clients[request_id] = Client(item, ORIGIN + item.at)
        request = Request(
            id=request_id,
            arrived=self.events.now,
            prompt_tokens=item.prompt_tokens,
            max_tokens=item.max_tokens,
            slo=Slo() if self.setting.blind else item.slo,
            prefix_hashes=names,
        )
        self._hear(Arrived(request=request))

    def _over(self, request_id: RequestId, end: Ended | Reject) -> None:
        client = self._clients.pop(request_id)
        self.events.later(REMEMBERED, self._forget, request_id)
        self.outcomes.append(client.outcome(end, origin=ORIGIN, delay=self.machine.front_seconds))

    def _forget(self, request_id: RequestId) -> None:
        del self._truths[request_id]

    # --- the Dispatcher -------------------------------------------------------------------------

    def _frame(self, what: tuple[VirtualWorker, Sequence[Report]]) -> None:
        worker, reports = what
        if self.workers[worker.id] is not worker:
            return
        now, clients, id_ = self.events.now, self._clients, worker.id
        for report in reports:
            if isinstance(report, StepReported):
                for request_id in report.ids:
                    client = clients.get(request_id)
                    if client is not None and client.worker == id_:
                        client.times.append(now)
            self._handle(report)
        self._set_timer()

    def _hear(self, message: Input) -> None:
        self._handle(message)
        self._set_timer()

    def _handle(self, message: Input) -> None:
        now = self.events.now
        outputs = self.dispatcher.handle(message, now)
        if self._tape is not None:
            self._tape.append((now, message, list(outputs)))
        if isinstance(message, KvPulled):
            self._moved(message)
        for output in outputs:
            self._carry_out(output)

    def _moved(self, report: KvPulled) -> None:
        client = self._clients.get(report.request_id)
        if client is not None and self.dispatcher.worker_of(report.request_id) == report.worker:
            client.at(report.worker)
            self.moves += 1

    def _set_timer(self) -> None:
        wakeup = self.dispatcher.next_wakeup()
        if wakeup == self._timer_at:
            return
        self._timer_at = wakeup
        self._timer += 1
        if wakeup is not None:
            self.events.at(max(wakeup, self.events.now + MIN_DELAY), self._wake, self._timer)

    def _wake(self, timer: int) -> None:
        if timer == self._timer:
            self._timer_at = None
            self._hear(Woke())

    def _carry_out(self, output: Output) -> None:
        match output:
            case Assign(worker=worker, request=request, emitted_tokens=emitted):
                client = self._clients[request.id]
                if len(client.times) != emitted:
                    raise RuntimeError(
                        f"request {request.id}: {len(client.times)} tokens were sent, {emitted} "
                        "counted"
                    )
                client.at(worker)
                self._command(output)
            case Pull() | Migrate() | Resume() | Abort() | Release():
                self._command(output)
            case SetRole():
                self.flips += 1
                self._command(output)
            case SetBudget() | LoadWeights() | Park():
                self._command(output)
            case Wake():
                machine = self.machine
                weights = 0.0 if machine.parked_weights else machine.weights_seconds
                self._command(output, machine.wake_seconds + weights)
            case Ended(request_id=request_id) | Reject(request_id=request_id):
                self._over(request_id, output)
            case Degrade(request_id=request_id):
                self.demotions += 1
                self._clients[request_id].demoted = True
            case StartWorker(worker=worker, epoch=epoch):
                self._start(worker, epoch)
            case Quarantine() | Answered() | Decided():
                pass
            case never:
                assert_never(never)

    def _command(self, command: Command, delay: float = 0.0) -> None:
        """Send it; with `delay` the worker needs so long until it hears this one, and the next."""
        worker = self.workers[command.worker]
        at = self.events.now + self.machine.pipe_seconds + delay
        at = self._command_at[worker.id] = max(at, self._command_at.get(worker.id, 0.0))
        self.events.at(at, worker.hear, ("command", command))

    # --- processes ------------------------------------------------------------------------------

    def _start(self, worker: WorkerId, epoch: int) -> None:
        """The first incarnations are up before the run; later ones need their time."""
        machine = self.machine
        seconds = machine.start_seconds + machine.weights_seconds
        if self.events.now < ORIGIN and worker not in self.workers:
            seconds = 0.0
        self.events.later(seconds, self._up, (worker, epoch))

    def _up(self, what: tuple[WorkerId, int]) -> None:
        id_, epoch = what
        before = self.workers.get(id_)
        worker = VirtualWorker(
            id_,
            epoch,
            wires=self,
            config=self.setting.batcher,
            policy=self._policy.batch,
            role=self.dispatcher.view.workers[id_].role,
            inherited=None if before is None else before.inheritance(),
            draws=Draws(self.setting.seed, f"steps/{id_}/{epoch}"),
            validate=self.setting.validate,
        )
        self.workers[id_] = worker
        self.pools[id_] = worker.batcher.ledger
        self._command_at.pop(id_, None)
        up = WorkerUp(
            worker=id_,
            epoch=epoch,
            groups=(worker.group,),
            max_num_seqs=self.setting.batcher.max_num_seqs,
            max_batch_tokens=self.setting.batcher.max_batch_tokens,
            role=worker.batcher.role,
        )
        reports: list[Report] = [up, *worker.batcher.announce()]
        self.events.later(0.0, self._frame, (worker, reports))
        for peer in self.workers.values():
            if peer.id != id_ and peer.alive:
                self._link(worker, peer)
                self._link(peer, worker)

    def _link(self, worker: VirtualWorker, peer: VirtualWorker) -> None:
        up = LinkUp(
            worker=worker.id,
            peer=peer.id,
            peer_epoch=peer.epoch,
            path=self.machine.copy_path,
            bytes_per_second=self.machine.copy_bytes_per_second,
        )
        self.events.later(self.machine.copy_seconds, self._frame, (worker, [up]))

    def _kill(self, id_: WorkerId) -> None:
        worker = self.workers.get(id_)
        if worker is None or not worker.alive:
            return
        worker.alive = False
        self.busy_seconds += worker.busy_seconds
        self.finished_steps += worker.steps
        self.events.later(self.machine.pipe_seconds, self._down, worker)
        for peer in self.workers.values():
            if peer.alive:
                self.events.later(self.machine.peer_seconds, peer.hear, ("lost", id_))

    def _down(self, worker: VirtualWorker) -> None:
        self._hear(WorkerDown(worker=worker.id, epoch=worker.epoch, cause="killed"))
