"""One incarnation of a worker: the real Batcher, and around it the order of things of the step
loop.

Between two steps it obeys what has come (while a step is under way too, if the machine `listens`),
plans, and computes; the step ends when the world says so. After every call of the Batcher its
reports go to the node, then copies begin, then peers are told.
"""

from collections import deque
from collections.abc import Sequence
from math import exp
from typing import Any, Protocol

from msgspec.structs import replace

from appliance.core.batcher import Batcher
from appliance.core.blocks import BlockLedger
from appliance.core.host_tier import HostTier
from appliance.core.invariants import BatchWatch, EndsOnce, law_8_work_conserving
from appliance.core.messages import (
    Aborted,
    Assign,
    Command,
    KvPulled,
    Pull,
    Refused,
    Released,
    Report,
    StepReported,
)
from appliance.core.peer import CopyDone, Inherited, Offered, PeerMessage
from appliance.core.slots import BatchSlots
from appliance.core.types import (
    BatcherConfig,
    BlockHash,
    CacheGroupSpec,
    RequestId,
    Role,
    SeqResult,
    StepPlan,
    StepResult,
    WorkerId,
)
from appliance.sim.copies import Copier, Traffic
from appliance.sim.events import Events
from appliance.sim.machine import Machine
from appliance.sim.truth import Served, Truth
from appliance.workload.draws import Draws


class Wires(Protocol):
    """What a worker is connected to."""

    @property
    def machine(self) -> Machine: ...

    @property
    def events(self) -> Events: ...

    @property
    def traffic(self) -> Traffic: ...

    @property
    def pools(self) -> dict[WorkerId, BlockLedger]:
        """Of all workers, also of those that died."""

    def truth(self, request_id: RequestId) -> Truth:
        """What the world knows of a request."""

    def send(self, worker: "VirtualWorker", reports: Sequence[Report]) -> None:
        """A frame leaves for the node."""

    def ring(self, worker: "VirtualWorker", peer: WorkerId, message: PeerMessage) -> None:
        """A message leaves for a peer."""


class Laws:
    """Checks of one Batcher after each of its calls."""

    def __init__(self, batcher: Batcher) -> None:
        self._watch = BatchWatch(batcher)
        self._ends = EndsOnce()
        self._batcher = batcher

    def hear(self, command: Command) -> None:
        """Before a command is obeyed."""
        self._ends.hear(command)

    def see(self, reports: Sequence[Report]) -> None:
        """After any call."""
        self._ends.see(reports)
        self._watch.check()

    def planned(self, plan: StepPlan | None) -> None:
        """After `next_step`."""
        law_8_work_conserving(self._batcher, plan)
        self._watch.check()


class VirtualWorker:
    """See the module's text. Methods that are events take one argument."""

    def __init__(
        self,
        worker: WorkerId,
        epoch: int,
        *,
        wires: Wires,
        config: BatcherConfig,
        policy: BatchSlots,
        role: Role,
        inherited: Inherited | None,
        draws: Draws,
        validate: bool,
    ) -> None:
        machine = wires.machine
        self.id = worker
        self.epoch = epoch
        self.alive = True
        self.steps = 0
        self.busy_seconds = 0.0
        self.tokens = 0
        self.group = CacheGroupSpec(
            num_blocks=machine.num_blocks, block_tokens=machine.block_tokens
        )
        tier = HostTier(machine.host_blocks) if machine.host_blocks else None
        self.batcher = Batcher(
            worker,
            config,
            groups=[self.group],
            policy=policy,
            role=role,
            inherited=inherited,
            tier=tier,
        )
        self._wires = wires
        self._events = wires.events
        self._machine = machine
        self._step_seconds = machine.profile.step_seconds
        self._draws = draws
        self._names = machine.block_tokens if config.enable_prefix_cache else 0
        self._depth = config.depth
        self._plans: deque[StepPlan] = deque()
        self._computing = False
        self._inbox: deque[tuple[str, Any]] = deque()
        """What came while a step was under way, on a machine that does not listen then."""
        self._served: dict[RequestId, Served] = {}
        self._wake_at: float | None = None
        self._laws = Laws(self.batcher) if validate else None
        self._copier = Copier(
            machine,
            wires.events,
            own=self.batcher.ledger,
            pools=wires.pools,
            traffic=wires.traffic,
            tell=lambda done: self.hear(("copied", done)),
        )

    def inheritance(self) -> Inherited:
        """What a successor finds in the pool: blocks that nobody can find are void."""
        pool = self.batcher.ledger.pools[0]
        names = tuple([content or 0 for content in pool.hash_of])
        generations = tuple(
            [
                generation if name else generation + 1
                for generation, name in zip(pool.generation, names, strict=True)
            ]
        )
        return Inherited(generations=generations, names=names)

    # --- what comes -----------------------------------------------------------------------------

    def hear(self, what: tuple[str, Any]) -> None:
        """Something comes: a "command" of the node, a ("peer", (worker, message)), news that one is
        "lost", a copy that is "copied"."""
        if not self.alive:
            return
        if self._computing and not self._machine.listens:
            self._inbox.append(what)
            return
        self._obey(what)
        self._go_on()

    def _obey(self, what: tuple[str, Any]) -> None:
        kind, about = what
        now = self._events.now
        match kind:
            case "command":
                self._command(about, now)
            case "peer":
                peer, message = about
                self._peer(peer, message, now)
            case "lost":
                self._tell(self.batcher.peer_lost(about, now))
            case _ if isinstance(about, CopyDone):
                self._tell(self.batcher.copied(about, now))
            case _:
                self._tell(self.batcher.fetched(about, now))

    def _command(self, command: Command, now: float) -> None:
        if self._laws is not None:
            self._laws.hear(command)
        if isinstance(command, Assign | Pull) and command.emitted_tokens and self._names:
            request = command.request
            known = (request.prompt_tokens + command.emitted_tokens) // self._names
            names = self._wires.truth(request.id).known_names(known)
            command = replace(command, request=replace(request, prefix_hashes=names))
        reports = self.batcher.handle(command, now)
        if isinstance(command, Assign) and self.batcher.is_live(command.request.id):
            self._serve(command.request.id, command.emitted_tokens)
        self._tell(reports)

    def _peer(self, peer: WorkerId, message: PeerMessage, now: float) -> None:
        hashes: tuple[BlockHash, ...] = ()
        if self._names and isinstance(message, Offered) and message.final:
            request_id = self.batcher.request_of(message.move)
            if request_id is not None:
                truth = self._wires.truth(request_id)
                known = (truth.prompt_tokens + message.num_emitted) // self._names
                hashes = truth.known_names(known)
        self._tell(self.batcher.hear_peer(peer, message, now, hashes=hashes))

    def wake(self, due: float) -> None:
        """The time has come that the Batcher named."""
        if due != self._wake_at or not self.alive:
            return
        self._wake_at = None
        self._tell(self.batcher.wake(self._events.now))
        self._go_on()

    # --- what goes ------------------------------------------------------------------------------

    def _tell(self, reports: list[Report]) -> None:
        """Send reports, then do what the Batcher wants done."""
        batcher = self.batcher
        if self._laws is not None:
            self._laws.see(reports)
        if reports:
            for report in reports:
                self._note(report)
            self._wires.send(self, reports)
        batcher.drain_spills()
        for copy in batcher.drain_copies():
            self._copier.put(copy)
        for fetch in batcher.drain_fetches():
            self._copier.put(fetch)
        for peer, message in batcher.drain_peer():
            self._wires.ring(self, peer, message)
        due = batcher.next_wakeup()
        if due != self._wake_at:
            self._wake_at = due
            if due is not None:
                self._events.at(due, self.wake, due)

    def _note(self, report: Report) -> None:
        match report:
            case StepReported(finished=finished):
                for end in finished:
                    self._served.pop(end.id, None)
            case KvPulled():
                self._serve(report.request_id, report.emitted_tokens)
            case Aborted() | Released():
                self._served.pop(report.request_id, None)
            case Refused(command="Assign", request_id=request_id):
                if request_id is not None:
                    self._served.pop(request_id, None)
            case _:
                pass

    def _serve(self, request_id: RequestId, emitted: int) -> None:
        truth = self._wires.truth(request_id)
        self._served[request_id] = Served(
            request_id, truth, emitted=emitted, block_tokens=self._names
        )

    # --- steps ----------------------------------------------------------------------------------

    def _go_on(self) -> None:
        """Plan; begin the oldest plan if none is being computed."""
        plans, batcher = self._plans, self.batcher
        while len(plans) <= self._depth:
            plan = batcher.next_step(self._events.now)
            if self._laws is not None:
                self._laws.planned(plan)
            if plan is None:
                break
            plans.append(plan)
        if plans and not self._computing:
            self._begin(plans[0])

    def _begin(self, plan: StepPlan) -> None:
        """Compute: what it takes and what comes of it are known now and told at its end."""
        tokens = pairs = cached = 0
        results: list[SeqResult] = []
        served = self._served
        for work in plan.work:
            start, count = work.start, work.num_tokens
            end = start + count
            tokens += count
            cached += end
            pairs += end if count == 1 else count * start + count * (count + 1) // 2
            if work.samples and (answer := served.get(work.id)) is not None:
                results.append(answer.push())
        seconds = self._step_seconds(
            num_tokens=tokens, num_samples=len(results), num_pairs=pairs, num_kv_tokens=cached
        )
        noise = self._machine.noise
        if noise:
            seconds *= exp(noise * self._draws.normal() - 0.5 * noise * noise)
        seconds += self._machine.host_seconds
        self._computing = True
        result = StepResult(step=plan.step, results=tuple(results), elapsed=seconds)
        self._events.later(seconds, self._end, result)

    def _end(self, result: StepResult) -> None:
        """The step is done."""
        if not self.alive:
            return
        self._computing = False
        self._plans.popleft()
        self.steps += 1
        self.busy_seconds += result.elapsed
        self.tokens += len(result.results)
        self._tell(self.batcher.finish_step(result, self._events.now))
        while self._inbox:
            self._obey(self._inbox.popleft())
        self._go_on()
