"""A node that tests talk to in its own language: messages in, outputs out, laws after each one."""

from collections.abc import Sequence

from appliance.core.dispatcher import Dispatcher, DispatcherConfig
from appliance.core.lifecycle import RequestState
from appliance.core.messages import (
    Arrived,
    Assign,
    CacheChanged,
    Cancelled,
    Ended,
    Heartbeat,
    Input,
    LinkUp,
    Output,
    Quarantine,
    Reject,
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
    Role,
    WorkerId,
    WorkerLoad,
    WorkerSpec,
)
from appliance.policy import make_policy

FCFS = make_policy("fcfs", {})


def request(number: int, *, arrived: float = 0.0, prompt: int = 10, **more: object) -> Request:
    """A request with that id."""
    fields: dict[str, object] = {"max_tokens": 8, **more}
    return Request(id=RequestId(number), arrived=arrived, prompt_tokens=prompt, **fields)  # type: ignore[arg-type]


def load(*, free: int = 64, total: int = 64, running: int = 0, queued: int = 0) -> WorkerLoad:
    """A ledger's words."""
    return WorkerLoad(
        blocks_total=total,
        blocks_free=free,
        blocks_cached=0,
        blocks_held=total - free,
        blocks_leased=0,
        queued=queued,
        running=running,
        backlog_tokens=0,
    )


class Node:
    """A Dispatcher with the laws on, its clock, and what it said so far."""

    def __init__(
        self,
        num_workers: int = 2,
        *,
        max_num_seqs: int = 4,
        num_blocks: int = 64,
        policy: DispatchSlots = FCFS.dispatch,
        boot: bool = True,
        roles: Sequence[Role] = (),
        **config: object,
    ) -> None:
        fields: dict[str, object] = {"max_model_len": 1000, "queue_ahead": 1, **config}
        self.config = DispatcherConfig(**fields)  # type: ignore[arg-type]
        all_roles = roles or (Role.MIXED,) * num_workers
        self.specs = [
            WorkerSpec(id=WorkerId(w), devices=("cpu",), role=role)
            for w, role in enumerate(all_roles)
        ]
        self.core = Dispatcher(self.config, workers=self.specs, policy=policy, validate=True)
        self.max_num_seqs = max_num_seqs
        self.num_blocks = num_blocks
        self.now = 100.0
        self.said: list[Output] = []
        self.ended: dict[int, Ended] = {}
        self.rejected: dict[int, Reject] = {}
        self.where: dict[int, int] = {}
        self.steps = 0
        if boot:
            self.hear(Woke())
            for spec in self.specs:
                self.up(spec.id)

    def hear(self, message: Input, *, after: float = 0.001) -> list[Output]:
        """Time passes, then the node hears this."""
        self.now += after
        outputs = self.core.handle(message, self.now)
        for output in outputs:
            if isinstance(output, Ended):
                assert output.request_id not in self.ended, "a second end"
                assert (output.reason is None) != (output.error is None), "reason or error"
                self.ended[output.request_id] = output
                self.where.pop(output.request_id, None)
            elif isinstance(output, Reject):
                self.rejected[output.request_id] = output
            elif isinstance(output, Assign):
                self.where[output.request.id] = output.worker
        for number in list(self.where):
            if self.core.request_state(RequestId(number)) is RequestState.WAITING:
                del self.where[number]
        self.said += outputs
        return outputs

    def arrive(self, number: int, **more: object) -> list[Output]:
        return self.hear(Arrived(request=request(number, arrived=self.now, **more)))  # type: ignore[arg-type]

    def cancel(self, number: int) -> list[Output]:
        return self.hear(Cancelled(request_id=RequestId(number)))

    def up(self, worker: int, *, epoch: int | None = None, num_blocks: int = 0) -> list[Output]:
        group = CacheGroupSpec(num_blocks=num_blocks or self.num_blocks, block_tokens=16)
        return self.hear(
            WorkerUp(
                worker=WorkerId(worker),
                epoch=self.core.epoch(WorkerId(worker)) if epoch is None else epoch,
                groups=(group,),
                max_num_seqs=self.max_num_seqs,
                max_batch_tokens=512,
                role=self.core.view.workers[WorkerId(worker)].role,
            )
        )

    def link_all(self) -> None:
        """Everybody can copy from everybody."""
        workers = self.core.view.workers
        for worker in workers:
            for peer in workers:
                if worker != peer:
                    epoch = self.core.epoch(peer)
                    self.hear(
                        LinkUp(
                            worker=worker,
                            peer=peer,
                            peer_epoch=epoch,
                            path="shared memory",
                            bytes_per_second=1e9,
                        )
                    )

    def cache(self, worker: int, hashes: Sequence[int]) -> None:
        """These blocks can be found at that worker."""
        self.hear(CacheChanged(worker=WorkerId(worker), added=tuple(hashes)))

    def hear_later(self, seconds: float) -> list[Output]:
        """Time passes."""
        return self.hear(Woke(), after=seconds)

    def down(
        self,
        worker: int,
        *,
        cause: str = "killed by signal 9",
        epoch: int | None = None,
        silent: bool = False,
    ) -> list[Output]:
        """It dies, having told its load after what it was given last (`silent`: it had not)."""
        number = WorkerId(worker)
        if not silent:
            self.hear(Heartbeat(worker=number, step=self.steps, in_step=0.0, load=load()), after=0)
        epoch = self.core.epoch(number) if epoch is None else epoch
        return self.hear(WorkerDown(worker=number, epoch=epoch, cause=cause))

    def step(
        self,
        worker: int,
        ids: Sequence[int],
        *,
        finished: Sequence[int] = (),
        counts: Sequence[int] = (),
        after: float = 0.001,
    ) -> list[Output]:
        """A step in which these sequences emitted, and some of them ended with it."""
        self.steps += 1
        ends = [
            SeqFinished(
                id=RequestId(number),
                reason=FinishReason.STOP,
                emitted_tokens=self.core.emitted_tokens(RequestId(number)) + 1,
                cached_tokens=3,
            )
            for number in finished
        ]
        report = StepReported(
            worker=WorkerId(worker),
            step=self.steps,
            elapsed=0.02,
            prefill_tokens=0,
            decode_tokens=len(ids),
            ids=tuple(RequestId(number) for number in ids),
            load=load(running=len(ids)),
            counts=tuple(counts),
            finished=tuple(ends),
        )
        return self.hear(report, after=after)

    def wake(self) -> list[Output]:
        """Let the time come that the node named."""
        at = self.core.next_wakeup()
        assert at is not None, "the node named no time"
        assert at > self.now, "the node asks to be woken in the past"
        return self.hear(Woke(), after=at - self.now)

    def respawn(self, worker: int) -> None:
        """Let the node start this dead worker again, and bring it up."""
        while StartWorker not in [type(output) for output in self.wake()]:
            pass
        self.up(worker)

    def error(self, number: int) -> ErrorKind | None:
        return self.ended[number].error

    def at(self, worker: int) -> list[int]:
        """Requests last assigned to this worker and not ended."""
        return [number for number, where in self.where.items() if where == worker]


def assigns(outputs: Sequence[Output]) -> list[tuple[int, int, int]]:
    """(request, worker, emitted tokens) of what was placed."""
    return [(o.request.id, o.worker, o.emitted_tokens) for o in outputs if isinstance(o, Assign)]


def starts(outputs: Sequence[Output]) -> list[tuple[int, int]]:
    """(worker, epoch) of what was started."""
    return [(o.worker, o.epoch) for o in outputs if isinstance(o, StartWorker)]


def quarantined(outputs: Sequence[Output]) -> list[int]:
    """Workers put into quarantine."""
    return [o.worker for o in outputs if isinstance(o, Quarantine)]
