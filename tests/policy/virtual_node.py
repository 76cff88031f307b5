"""A node on a virtual clock whose steps take as long as their work: the real Dispatcher, workers
modelled as batches of token counts. For questions of time: what attainment a policy reaches."""

import heapq
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from appliance.core.asks import Decided
from appliance.core.dispatcher import Dispatcher, DispatcherConfig
from appliance.core.lifecycle import WorkerState
from appliance.core.messages import (
    Abort,
    Aborted,
    Arrived,
    Assign,
    Command,
    Ended,
    Input,
    KvPulled,
    LinkUp,
    Migrate,
    Output,
    Park,
    Prefilled,
    Pull,
    Reject,
    Release,
    Released,
    Report,
    Resume,
    RoleChanged,
    SeqFinished,
    SetRole,
    StartWorker,
    StepReported,
    Wake,
    Woke,
    WorkerUp,
)
from appliance.core.slots import DispatchSlots
from appliance.core.types import (
    CacheGroupSpec,
    FinishReason,
    Request,
    RequestId,
    Role,
    Slo,
    WorkerId,
    WorkerLoad,
    WorkerSpec,
)
from appliance.policy import make_policy

LATENCY, COPY, START = 0.001, 0.005, 3.0
BASE, PER_PROMPT_TOKEN, PER_DECODE = 0.02, 0.0002, 0.0002
MAX_NUM_SEQS, MAX_BATCH_TOKENS = 32, 512
GROUP = CacheGroupSpec(num_blocks=100_000, block_tokens=16)


@dataclass
class Seq:
    """One answer under way."""

    id: RequestId
    prompt_left: int
    emitted: int
    length: int
    move: Migrate | None = None
    computed: int = 0


@dataclass
class VirtualWorker:
    """A batch, and how long its steps take."""

    node: "VirtualNode"
    id: WorkerId
    role: Role
    here: dict[RequestId, Seq] = field(default_factory=dict)
    held: dict[RequestId, Seq] = field(default_factory=dict)
    coming: set[RequestId] = field(default_factory=set)
    stepping: bool = False
    steps: int = 0

    def obey(self, command: Command) -> None:
        node = self.node
        match command:
            case Assign(request=request, emitted_tokens=emitted):
                length = node.lengths[request.id]
                prompt = request.prompt_tokens + emitted
                self.here[request.id] = Seq(request.id, prompt, emitted, length)
            case Pull(request=request):
                self.coming.add(request.id)
            case Migrate(request_id=id_):
                if id_ in self.here:
                    self.here[id_].move = command
            case Resume(request_id=id_):
                if id_ in self.held:
                    self.here[id_] = self.held.pop(id_)
                if id_ in self.here:
                    self.here[id_].move = None
            case Release(move=move, request_id=id_):
                self.held.pop(id_, None)
                node.report(Released(worker=self.id, move=move, request_id=id_))
            case Abort(request_id=id_):
                self.coming.discard(id_)
                self.here.pop(id_, None)
                self.held.pop(id_, None)
                node.report(Aborted(worker=self.id, request_id=id_))
            case SetRole(role=role, epoch=epoch):
                self.role = role
                node.report(RoleChanged(worker=self.id, role=role, epoch=epoch))
            case Park() | Wake():
                assert not {**self.here, **self.held}, "told to stand by, or to wake, at work"
            case _:
                raise AssertionError(command)
        self.go_on()

    def go_on(self) -> None:
        if self.stepping or not self.here:
            return
        decodes = [seq for seq in self.here.values() if not seq.prompt_left][:MAX_NUM_SEQS]
        budget = MAX_BATCH_TOKENS - len(decodes)
        if self.role is Role.DECODE and decodes:
            budget = MAX_BATCH_TOKENS // 4
        chunks, places = [], MAX_NUM_SEQS - len(decodes)
        for seq in self.here.values():
            if seq.prompt_left and budget > 0 and places > 0:
                chunk = min(budget, seq.prompt_left)
                chunks.append((seq, chunk))
                budget -= chunk
                places -= 1
        tokens = sum(chunk for _, chunk in chunks)
        elapsed = BASE + PER_PROMPT_TOKEN * tokens + PER_DECODE * len(decodes)
        self.stepping = True
        self.node.later(elapsed, lambda: self.finish(decodes, chunks, elapsed))

    def finish(self, decodes: list[Seq], chunks: list[tuple[Seq, int]], elapsed: float) -> None:
        self.stepping = False
        self.steps += 1
        told, ends = [], []
        pairs = sum(chunk * seq.computed + chunk * (chunk + 1) // 2 for seq, chunk in chunks)
        context = sum(seq.computed for seq in decodes)
        for seq, chunk in chunks:
            seq.prompt_left -= chunk
            seq.computed += chunk
        for seq in decodes:
            seq.computed += 1
        for seq in [*decodes, *(seq for seq, _ in chunks if not seq.prompt_left)]:
            if self.here.get(seq.id) is not seq:
                continue
            seq.emitted += 1
            told.append(seq.id)
            if seq.emitted >= seq.length:
                del self.here[seq.id]
                ends.append(
                    SeqFinished(
                        id=seq.id,
                        reason=FinishReason.STOP,
                        emitted_tokens=seq.emitted,
                        cached_tokens=0,
                    )
                )
        self.node.report(
            StepReported(
                worker=self.id,
                step=self.steps,
                elapsed=elapsed,
                prefill_tokens=sum(chunk for _, chunk in chunks),
                decode_tokens=len(decodes),
                prefill_pairs=pairs,
                context_tokens=context,
                ids=tuple(told),
                load=self.load(),
                finished=tuple(ends),
            )
        )
        for seq in [seq for seq in self.here.values() if seq.move and not seq.prompt_left]:
            self._stop(seq)
        self.go_on()

    def _stop(self, seq: Seq) -> None:
        move = seq.move
        target = None if move is None else self.node.workers[move.target]
        if move is None or target is None or seq.id not in target.coming:
            return
        self.held[seq.id] = self.here.pop(seq.id)
        seq.move = None
        self.node.report(
            Prefilled(worker=self.id, move=move.move, request_id=seq.id, emitted_tokens=seq.emitted)
        )
        self.node.later(COPY, lambda: target.land(move, seq))

    def land(self, move: Migrate, seq: Seq) -> None:
        if seq.id not in self.coming:
            return
        self.coming.discard(seq.id)
        self.here[seq.id] = Seq(seq.id, 0, seq.emitted, seq.length, computed=seq.computed)
        self.node.report(
            KvPulled(
                worker=self.id,
                move=move.move,
                request_id=seq.id,
                source=move.worker,
                emitted_tokens=seq.emitted,
                num_tokens=1,
                num_bytes=1,
                seconds=COPY,
                path="modelled",
            )
        )
        self.go_on()

    def load(self) -> WorkerLoad:
        queued = sum(seq.prompt_left > 0 for seq in self.here.values())
        return WorkerLoad(
            blocks_total=GROUP.num_blocks,
            blocks_free=GROUP.num_blocks,
            blocks_cached=0,
            blocks_held=0,
            blocks_leased=0,
            queued=queued,
            running=len(self.here) - queued,
            backlog_tokens=sum(seq.prompt_left for seq in self.here.values()),
        )


@dataclass(frozen=True)
class Mix:
    """What arrives: requests per second, tokens of a prompt and of an answer."""

    rate: float
    prompt: int
    answer: int


class VirtualNode:
    """The event loop and the node's shell."""

    def __init__(
        self,
        roles: Sequence[Role],
        *,
        controller: Mapping[str, object] | None,
        slo: Slo,
        standby: int = 0,
        spares: int = 0,
        validate: bool = False,
    ) -> None:
        """`standby` further workers begin parked, `spares` could be started beside them."""
        self.policy: DispatchSlots = make_policy("fcfs", {}, roles=controller).dispatch
        all_roles = [*roles, *[Role.MIXED] * (standby + spares)]
        specs = [
            WorkerSpec(
                id=WorkerId(w),
                devices=("none",),
                role=role,
                parked=len(roles) <= w < len(roles) + standby,
            )
            for w, role in enumerate(all_roles)
        ]
        first = len(roles) + standby
        self.core = Dispatcher(
            DispatcherConfig(max_model_len=100_000, spares=tuple(specs[first:])),
            workers=specs[:first],
            policy=self.policy,
            validate=validate,
        )
        self.slo = slo
        self.now = self.began = 1000.0
        self.lengths: dict[RequestId, int] = {}
        self.ended: list[Ended] = []
        self.flips: list[tuple[float, WorkerId, Role]] = []
        self.said: list[Output] = []
        self.workers = {
            WorkerId(w): VirtualWorker(self, WorkerId(w), role) for w, role in enumerate(all_roles)
        }
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._timer: float | None = None
        self.hear(Woke())

    def link(self, worker: WorkerId) -> None:
        """Everybody that is up and this worker can copy from each other."""
        up = [w for w, view in self.core.view.workers.items() if view.max_num_seqs]
        for peer in up:
            for one, other in ((worker, peer), (peer, worker)) if worker != peer else ():
                self.hear(
                    LinkUp(
                        worker=one,
                        peer=other,
                        peer_epoch=1,
                        path="modelled",
                        bytes_per_second=1e9,
                    )
                )

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (self.now + seconds, self._count, action))

    def report(self, report: Report) -> None:
        self.later(LATENCY, lambda: self.hear(report))

    def hear(self, message: Input) -> None:
        for output in self.core.handle(message, self.now):
            self._carry_out(output)
        wakeup = self.core.next_wakeup()
        if wakeup is not None and wakeup != self._timer:
            self.later(wakeup - self.now, lambda: self.hear(Woke()))
        self._timer = wakeup

    def _carry_out(self, output: Output) -> None:
        match output:
            case StartWorker(worker=worker, epoch=epoch):
                up = WorkerUp(
                    worker=worker,
                    epoch=epoch,
                    groups=(GROUP,),
                    max_num_seqs=MAX_NUM_SEQS,
                    max_batch_tokens=MAX_BATCH_TOKENS,
                    role=self.workers[worker].role,
                )
                if self.core.view.traffic.arrived:
                    self.later(START, lambda: self.bring_up(up))
                else:
                    self.bring_up(up)
            case Ended():
                assert output.error is None, output
                self.ended.append(output)
            case (
                Assign()
                | Pull()
                | Migrate()
                | Resume()
                | Release()
                | Abort()
                | SetRole()
                | Park()
                | Wake()
            ):
                if isinstance(output, SetRole):
                    self.flips.append((self.now, output.worker, output.role))
                process, command = self.workers[output.worker], output
                self.later(LATENCY, lambda: process.obey(command))
            case _:
                self.said.append(output)

    def bring_up(self, up: WorkerUp) -> None:
        self.hear(up)
        self.link(up.worker)

    def rest(self, seconds: float) -> None:
        """Nothing arrives for so long."""
        end = self.now + seconds
        while self._events and self._events[0][0] <= end:
            self.now, _, action = heapq.heappop(self._events)
            action()
        self.now = end

    def decided(self, kind: str) -> list[Decided]:
        """The decisions of that kind, as they ended."""
        said = {out.decision: out for out in self.said if isinstance(out, Decided)}
        return [each for each in said.values() if each.kind == kind]

    def in_service(self) -> list[WorkerId]:
        """Workers that are ready."""
        views = self.core.view.workers.values()
        return [view.id for view in views if view.state is WorkerState.READY]

    def serve(self, mix: Callable[[float], Mix], *, seconds: float, seed: int = 0) -> None:
        """Poisson arrivals for so long; then until all have ended."""
        rng = random.Random(seed)

        def arrive() -> None:
            if self.now > self.began + seconds:
                return
            kind = mix(self.now - self.began)
            number = RequestId(len(self.lengths) + 1)
            self.lengths[number] = max(1, round(kind.answer * rng.uniform(0.8, 1.2)))
            request = Request(
                id=number,
                arrived=self.now,
                prompt_tokens=max(1, round(kind.prompt * rng.uniform(0.8, 1.2))),
                max_tokens=1000,
                slo=self.slo,
            )
            self.hear(Arrived(request=request))
            self.later(rng.expovariate(kind.rate), arrive)

        self.later(0.0, arrive)
        while self._events and (self.core.num_live or self.now <= self.began + seconds):
            self.now, _, action = heapq.heappop(self._events)
            action()

    @property
    def attainment(self) -> float:
        """Share of what arrived that was answered within its targets."""
        return self.core.view.traffic.met / max(1, len(self.lengths))

    @property
    def num_turned_away(self) -> int:
        return sum(isinstance(output, Reject) for output in self.said)
