"""A toy worker among others: doorbells, copies and an index beside the Batcher and its engine.

`pump` does after every call of the Batcher what a shell has to do, in the order in which it has to.
"""

from collections import deque
from collections.abc import Sequence
from typing import Protocol

from appliance.core.batcher import Batcher
from appliance.core.messages import Assign, Command, KvPulled, Pull, Report, StepReported
from appliance.core.peer import CopyDone, CopyJob, FetchJob, Offered, PeerMessage
from appliance.core.slots import BatchSlots
from appliance.core.types import BatcherConfig, CacheGroupSpec, Role, StepPlan, WorkerId
from tests.core.toy_slab import Copy, Slab
from tests.core.toy_worker import (
    FCFS,
    Task,
    ToyWorker,
    block_hashes,
    contents_of,
    request_of_task,
)

Frame = tuple[list[Report], dict[int, list[int]]]
"""Reports, and tokens by request."""


class Wires(Protocol):
    """What a worker is connected to."""

    now: float

    def slab(self, worker: WorkerId) -> Slab: ...

    def to_node(self, worker: WorkerId, frame: Frame) -> None: ...

    def to_peer(
        self, worker: WorkerId, peer: WorkerId, message: PeerMessage, payload: list[int]
    ) -> None: ...


class MovingWorker(ToyWorker):
    """One incarnation of a worker."""

    def __init__(
        self,
        worker: WorkerId,
        config: BatcherConfig,
        *,
        group: CacheGroupSpec,
        wires: Wires,
        policy: BatchSlots = FCFS,
        role: Role = Role.MIXED,
        drops: bool = False,
        checks: bool = True,
    ) -> None:
        self.wires = wires
        slab = self.slab = wires.slab(worker)
        batcher = Batcher(
            worker,
            config,
            groups=[group],
            policy=policy,
            role=role,
            inherited=slab.inherit(),
            checksum=slab.checksum if checks else None,
        )
        super().__init__(config, groups=[group], drops=drops, batcher=batcher)
        self.engine.slots = [slab.slots]
        self.copies: deque[Copy] = deque()
        self.coming: dict[int, tuple[Task, list[int]]] = {}
        """Sequences on their way to this worker: what is known of them."""
        self.linked: dict[WorkerId, int] = {}
        """Which incarnation of each peer the doorbell leads to."""
        self.pump([])
        reports = batcher.announce()
        if reports:
            self.pump(reports)

    @property
    def now(self) -> float:
        return self.wires.now

    @now.setter
    def now(self, value: float) -> None:
        self.wires.now = max(value, self.wires.now)

    # --- commands -------------------------------------------------------------------------------

    def obey(self, command: Command, task: Task, emitted: Sequence[int]) -> list[Report]:
        """A command with the payload that it would have."""
        match command:
            case Assign():
                return self.assign(
                    task,
                    emitted=emitted,
                    pull_from=command.pull_from,
                    pull_blocks=command.pull_blocks,
                )
            case Pull():
                self.coming[task.id] = (task, list(emitted))
                request = request_of_task(task, emitted, self.block_tokens)
                command = Pull(
                    worker=self.worker,
                    move=command.move,
                    request=request,
                    source=command.source,
                    emitted_tokens=len(emitted),
                )
                reports = self.handle(command)
                return reports if command.source in self.linked else self.lose(command.source)
            case _:
                return self.handle(command)

    # --- peers and copies -----------------------------------------------------------------------

    def hear(self, peer: WorkerId, message: PeerMessage, payload: list[int]) -> list[Report]:
        """What comes through a doorbell."""
        hashes: list[int] = []
        request_id = self.batcher.request_of(message.move)
        if isinstance(message, Offered) and message.final and request_id in self.coming:
            task, emitted = self.coming[request_id]
            assert len(payload) == message.num_emitted
            assert payload[: len(emitted)] == emitted
            self.coming[request_id] = (task, payload)
            hashes = block_hashes(contents_of([*task.prompt, *payload]), self.block_tokens)
        return self.call(
            lambda: self.batcher.hear_peer(peer, message, self.now, hashes=tuple(hashes))
        )

    def lose(self, peer: WorkerId) -> list[Report]:
        self.linked.pop(peer, None)
        return self.call(lambda: self.batcher.peer_lost(peer, self.now))

    def wake(self) -> list[Report]:
        wakeup = self.batcher.next_wakeup()
        if wakeup is None or wakeup > self.now:
            return []
        return self.call(lambda: self.batcher.wake(self.now))

    def advance(self, which: int, num_tokens: int, fails: str = "") -> None:
        """A copy goes on. Those of one move go in their order."""
        copy = self.copies[which % len(self.copies)]
        if isinstance(copy.job, CopyJob):
            move = copy.job.move
            copy = next(
                each
                for each in self.copies
                if isinstance(each.job, CopyJob) and each.job.move == move
            )
        guests = [*self.batcher.importer.tables(), *self.batcher.fetcher.tables()]
        for block in copy.job.targets:
            assert any(block in table.blocks[0] for table in guests), "written by a ghost"
        copy.advance(num_tokens, fails)
        done = copy.done
        if done is None:
            return
        self.copies.remove(copy)
        if isinstance(done, CopyDone):
            self.call(lambda: self.batcher.copied(done, self.now))
        else:
            self.call(lambda: self.batcher.fetched(done, self.now))

    # --- steps ----------------------------------------------------------------------------------

    def plan(self) -> StepPlan | None:
        plan = super().plan()
        self.pump([])
        return plan

    def execute(self) -> None:
        self.slab.write_index(self.batcher.drain_index())
        super().execute()

    def _heard(self, reports: Sequence[Report]) -> None:
        super()._heard(reports)
        for report in reports:
            if isinstance(report, KvPulled):
                task, emitted = self.coming.pop(report.request_id)
                assert len(emitted) == report.emitted_tokens
                self.serve(task, emitted)
        self.pump(list(reports))

    def pump(self, reports: list[Report]) -> None:
        """Reports to the node, then copies (the index before them), then peers. Without a copy the
        index waits until the next step is executed: it need not be earlier."""
        if reports:
            tokens = {}
            if isinstance(reports[0], StepReported):
                tokens = {id_: self.emitted[id_][-1:] for id_ in reports[0].ids}
            self.wires.to_node(self.worker, (reports, tokens))
        jobs: list[CopyJob | FetchJob] = [
            *self.batcher.drain_copies(),
            *self.batcher.drain_fetches(),
        ]
        if jobs:
            self.slab.write_index(self.batcher.drain_index())
        for job in jobs:
            self.copies.append(Copy(job, self.wires.slab(job.peer), self.slab))
        for peer, message in self.batcher.drain_peer():
            payload: list[int] = []
            if isinstance(message, Offered) and message.final:
                request_id = self.batcher.request_of(message.move)
                assert request_id is not None
                payload = list(self.emitted[request_id])
            self.wires.to_peer(self.worker, peer, message, payload)

    def check_at_rest(self) -> None:
        """Nothing is left of anything."""
        assert not self.open, f"never ended: {sorted(self.open)}"
        load = self.batcher.load()
        assert load.blocks_free == load.blocks_total, "a block leaked"
        assert (load.queued, load.running, load.backlog_tokens) == (0, 0, 0)
        assert not self.copies
        assert not self.batcher.importer.busy
