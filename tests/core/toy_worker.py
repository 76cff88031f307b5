"""A worker that can be computed by hand: a strict engine without a model, and the shell around it.

The KV of a token is modelled as a number made of all tokens up to it. The engine writes these
numbers into slots of blocks as a plan says, reads back through the block table what attention
would read, and checks each slot: the right position of the right content. A wrong table, a block
that was reused too early or a block shared by mistake is thus seen at once, as the slot that is
wrong. The next token is a function of what was read, so it can be compared with `answer`, which
needs no blocks at all.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from appliance.core.batcher import Batcher
from appliance.core.blocks import NO_BLOCK
from appliance.core.invariants import BatchWatch, EndsOnce, law_8_work_conserving
from appliance.core.messages import (
    Abort,
    Aborted,
    Assign,
    Command,
    Heartbeat,
    Preempted,
    Refused,
    Report,
    SeqFinished,
    StepReported,
)
from appliance.core.sequence import SeqState
from appliance.core.slots import BatchSlots
from appliance.core.types import (
    BatcherConfig,
    BlockHash,
    CacheGroupSpec,
    FinishReason,
    Request,
    RequestId,
    SeqResult,
    SeqWork,
    Slo,
    StepPlan,
    StepResult,
    WorkerId,
)
from appliance.policy.parts import fill_fcfs, victim_latest
from tests.core.in_flight import InFlight

WORKER = WorkerId(0)
FCFS = BatchSlots(victim=victim_latest, fill=fill_fcfs)
PLAIN = Slo()
VOCABULARY = 50
_MASK = (1 << 64) - 1


def mix(state: int, value: int) -> int:
    """A 64-bit number that depends on both."""
    state = (state ^ (value + 0x9E3779B97F4A7C15)) * 0xBF58476D1CE4E5B9 & _MASK
    state = (state ^ (state >> 29)) * 0x94D049BB133111EB & _MASK
    return state ^ (state >> 31)


@dataclass(frozen=True)
class Task:
    """A request with its ids. `seed` draws the answer; each token is a stop with chance
    1 / `stop_every` (0: never)."""

    id: int
    prompt: tuple[int, ...]
    max_tokens: int = 8
    seed: int = 0
    stop_every: int = 0
    group: int | None = None
    arrived: float = 0.0
    slo: Slo = PLAIN
    priority: int = 0

    def draw(self, content: int) -> tuple[int, bool]:
        """The next token after known tokens of this content, and whether it stops the answer."""
        drawn = mix(content, self.seed)
        stops = self.stop_every > 0 and (drawn >> 32) % self.stop_every == 0
        return drawn % VOCABULARY, stops


def contents_of(ids: Sequence[int]) -> list[int]:
    """KV content of each position."""
    contents, state = [], 0
    for token in ids:
        state = mix(state, token)
        contents.append(state)
    return contents


def block_hashes(contents: Sequence[int], block_tokens: int) -> list[BlockHash]:
    """Names of the full blocks of these tokens."""
    return list(contents[block_tokens - 1 :: block_tokens])


def answer(task: Task, max_model_len: int = 1 << 30) -> tuple[list[int], FinishReason]:
    """What the answer must be: computed without blocks, steps or neighbours."""
    ids = list(task.prompt)
    state = contents_of(ids)[-1]
    while True:
        token, stops = task.draw(state)
        ids.append(token)
        state = mix(state, token)
        emitted = len(ids) - len(task.prompt)
        if stops:
            return ids[len(task.prompt) :], FinishReason.STOP
        if emitted == task.max_tokens or len(ids) == max_model_len:
            return ids[len(task.prompt) :], FinishReason.LENGTH


@dataclass
class _Row:
    task: Task
    ids: list[int]
    contents: list[int]
    tables: list[list[int]] = field(default_factory=list)


class ToyEngine:
    """Executes plans on modelled KV and asserts that every slot holds what it should."""

    def __init__(self, groups: Sequence[CacheGroupSpec]) -> None:
        self.groups = groups
        self.slots: list[list[tuple[int, int] | None]] = [
            [None] * (spec.num_blocks * spec.block_tokens) for spec in groups
        ]
        self.rows: dict[int, _Row] = {}
        self.num_computed = 0

    def add(self, task: Task, emitted: Sequence[int]) -> None:
        ids = [*task.prompt, *emitted]
        self.rows[task.id] = _Row(task, ids, contents_of(ids))

    def drop(self, request_id: int) -> None:
        self.rows.pop(request_id, None)

    def execute(self, plan: StepPlan) -> list[tuple[RequestId, int]]:
        """Writes of all work first, then all reads, as one layer of a real forward does."""
        work = [item for item in plan.work if item.id in self.rows]
        assert len({item.id for item in plan.work}) == len(plan.work), "twice in a step"
        for item in work:
            self._extend_tables(item)
        written: set[tuple[int, int]] = set()
        for item in work:
            self._write(item, written)
        tokens = [(item, self._read(item)) for item in work]
        return [(item.id, token) for item, token in tokens if token is not None]

    def _extend_tables(self, item: SeqWork) -> None:
        row = self.rows[item.id]
        assert len(item.new_blocks) == len(self.groups)
        if item.fresh:
            row.tables = [[] for _ in self.groups]
        assert row.tables, "the first work item is not fresh"
        for table, blocks in zip(row.tables, item.new_blocks, strict=True):
            table.extend(blocks)

    def _slot(self, row: _Row, group: int, position: int) -> int:
        size = self.groups[group].block_tokens
        block = row.tables[group][position // size]
        assert block != NO_BLOCK, f"no block for position {position} of {row.task.id}"
        return block * size + position % size

    def _write(self, item: SeqWork, written: set[tuple[int, int]]) -> None:
        row = self.rows[item.id]
        end = item.start + item.num_tokens
        assert item.num_tokens > 0
        assert end <= len(row.ids), "computes a token that nobody knows"
        assert item.samples == (end == len(row.ids))
        for group in range(len(self.groups)):
            for position in range(item.start, end):
                slot = self._slot(row, group, position)
                assert (group, slot) not in written, "two sequences write one slot"
                written.add((group, slot))
                self.slots[group][slot] = (position, row.contents[position])
        self.num_computed += item.num_tokens

    def _read(self, item: SeqWork) -> int | None:
        row = self.rows[item.id]
        end = item.start + item.num_tokens
        for group, spec in enumerate(self.groups):
            seen = item.start + 1 if spec.kind == "paged" else spec.window
            assert seen is not None
            for position in range(max(0, item.start + 1 - seen), end):
                found = self.slots[group][self._slot(row, group, position)]
                assert found == (position, row.contents[position]), (
                    f"request {item.id} reads {found} at position {position} of group {spec.name}"
                )
        if not item.samples:
            return None
        token, _ = row.task.draw(row.contents[end - 1])
        row.ids.append(token)
        row.contents.append(mix(row.contents[-1], token))
        return token


def request_of_task(task: Task, emitted: Sequence[int], block_tokens: int) -> Request:
    """The task as a Batcher sees it."""
    return Request(
        id=RequestId(task.id),
        arrived=task.arrived,
        prompt_tokens=len(task.prompt),
        max_tokens=task.max_tokens,
        prefix_hashes=tuple(block_hashes(contents_of([*task.prompt, *emitted]), block_tokens)),
        group=None if task.group is None else RequestId(task.group),
        slo=task.slo,
        priority=task.priority,
    )


class ToyWorker:
    """Batcher + engine + shell, with the laws checked after every call.

    `drops`: the engine forgets a sequence as soon as it is over (its remaining work is skipped);
    otherwise it computes on, and would overwrite blocks that were given away too early."""

    def __init__(
        self,
        config: BatcherConfig,
        *,
        groups: Sequence[CacheGroupSpec],
        policy: BatchSlots = FCFS,
        drops: bool = False,
        batcher: Batcher | None = None,
    ) -> None:
        self.batcher = batcher or Batcher(WORKER, config, groups=groups, policy=policy)
        self.worker = self.batcher.worker
        self.engine = ToyEngine(groups)
        self.config = config
        self.drops = drops
        self.block_tokens = groups[0].block_tokens
        self.tasks: dict[int, Task] = {}
        self.emitted: dict[int, list[int]] = {}
        self.finished: dict[int, SeqFinished] = {}
        self.preempted: list[int] = []
        self.planned: deque[StepPlan] = deque()
        self.executed: deque[tuple[StepPlan, list[tuple[RequestId, int]]]] = deque()
        self.now = 0.0
        self._in_flight = InFlight(groups)
        self._watch = BatchWatch(self.batcher)
        self._ends = EndsOnce()

    @property
    def open(self) -> frozenset[RequestId]:
        """What still waits for its end."""
        return self._ends.open

    # --- commands -------------------------------------------------------------------------------

    def assign(
        self,
        task: Task,
        *,
        emitted: Sequence[int] = (),
        pull_from: WorkerId | None = None,
        pull_blocks: int = 0,
    ) -> list[Report]:
        command = Assign(
            worker=self.worker,
            request=request_of_task(task, emitted, self.block_tokens),
            emitted_tokens=len(emitted),
            pull_from=pull_from,
            pull_blocks=pull_blocks,
        )
        reports = self.handle(command)
        if not any(isinstance(report, Refused) for report in reports):
            self.serve(task, emitted)
        return reports

    def serve(self, task: Task, emitted: Sequence[int]) -> None:
        """From now on the engine may be asked to compute this."""
        self.tasks[task.id] = task
        self.emitted[task.id] = list(emitted)
        self.finished.pop(task.id, None)
        self.engine.add(task, emitted)

    def abort(self, request_id: int) -> list[Report]:
        return self.handle(Abort(worker=self.worker, request_id=RequestId(request_id)))

    def handle(self, command: Command) -> list[Report]:
        self._ends.hear(command)
        return self.call(lambda: self.batcher.handle(command, self.now))

    def call(self, ask: Callable[[], list[Report]]) -> list[Report]:
        """Ask the Batcher for something that finishes no step."""
        self.now += 0.001
        before = self.batcher.load()
        reports = ask()
        assert not any(isinstance(report, StepReported) for report in reports)
        loads = [report.load for report in reports if isinstance(report, Heartbeat)]
        assert loads == [self.batcher.load()] or (not loads and before == self.batcher.load()), (
            "a change of load is reported once, and as it is"
        )
        self._heard(reports)
        return reports

    # --- steps ----------------------------------------------------------------------------------

    def plan(self) -> StepPlan | None:
        self.now += 0.001
        oldest = self.batcher.queues.oldest()
        plan = self.batcher.next_step(self.now)
        if oldest is not None:
            assert oldest.state in (SeqState.RUNNING, SeqState.LAST), "the oldest was preempted"
        law_8_work_conserving(self.batcher, plan)
        self._watch.check()
        if plan is None:
            return None
        assert plan.work
        assert sum(item.num_tokens for item in plan.work) <= self.config.max_batch_tokens
        assert len(plan.work) <= self.config.max_num_seqs
        self._in_flight.planned(plan)
        self.planned.append(plan)
        return plan

    def execute(self) -> None:
        plan = self.planned.popleft()
        self.executed.append((plan, self.engine.execute(plan)))

    def finish(self) -> list[Report]:
        """Finish the oldest plan (execute it first if need be)."""
        if not self.executed:
            self.execute()
        plan, sampled = self.executed.popleft()
        self.now += 0.001
        results, told = [], []
        for request_id, token in sampled:
            if self.batcher.is_live(request_id):
                results.append(self._result(request_id, token))
                told.append(request_id)
            elif not self.drops:
                results.append(SeqResult(id=request_id, num_tokens=1))
        result = StepResult(step=plan.step, results=tuple(results), elapsed=0.001)
        reports = self.batcher.finish_step(result, self.now)
        self._in_flight.finished()
        self._step_reported(plan, reports[0], told)
        self._heard(reports)
        return reports

    def step(self) -> list[Report]:
        """Plan as far ahead as allowed, then finish the oldest plan."""
        while self.plan() is not None:
            pass
        return self.finish() if self.planned or self.executed else []

    def run(self, max_steps: int = 10_000) -> None:
        """Step until nothing is left; then everything must have ended and all blocks be free."""
        for _ in range(max_steps):
            if not self.batcher.has_work() and not self.planned and not self.executed:
                break
            self.step()
        assert not self.open, f"never ended: {sorted(self.open)}"
        load = self.batcher.load()
        assert load.blocks_free == load.blocks_total, "a block leaked"
        assert (load.queued, load.running, load.backlog_tokens) == (0, 0, 0)

    # --- inside ---------------------------------------------------------------------------------

    def _result(self, request_id: RequestId, token: int) -> SeqResult:
        task, emitted = self.tasks[request_id], self.emitted[request_id]
        emitted.append(token)
        known = len(task.prompt) + len(emitted)
        contents = self.engine.rows[request_id].contents
        _, stops = task.draw(contents[known - 2])
        full = known % self.block_tokens == 0
        return SeqResult(
            id=request_id,
            num_tokens=1,
            stopped=FinishReason.STOP if stops else None,
            hashes=(contents[known - 1],) if full else (),
        )

    def _step_reported(self, plan: StepPlan, report: Report, told: list[RequestId]) -> None:
        assert isinstance(report, StepReported), "the step's report comes first"
        assert report.step == plan.step
        assert list(report.ids) == told
        assert report.counts == ()
        computed = sum(item.num_tokens for item in plan.work)
        assert report.prefill_tokens + report.decode_tokens == computed
        for end in report.finished:
            task = self.tasks[end.id]
            tokens, reason = answer(task, self.config.max_model_len)
            assert self.emitted[end.id] == tokens, "another answer than without scheduling"
            assert (end.reason, end.emitted_tokens) == (reason, len(tokens))
            assert 0 <= end.cached_tokens < len(task.prompt) + len(tokens)
            self.finished[end.id] = end

    def _heard(self, reports: Sequence[Report]) -> None:
        self._ends.see(reports)
        self._watch.check()
        for report in reports:
            match report:
                case StepReported(load=load):
                    assert load == self.batcher.load()
                case Preempted(request_id=request_id):
                    self.preempted.append(request_id)
                case _:
                    pass
        if self.drops:
            for number in list(self.engine.rows):
                if not self.batcher.is_live(RequestId(number)):
                    self.engine.drop(number)
        for report in reports:
            if isinstance(report, Aborted) and report.request_id in self.emitted:
                emitted = self.emitted[report.request_id]
                tokens, _ = answer(self.tasks[report.request_id], self.config.max_model_len)
                assert emitted == tokens[: len(emitted)]


def paged(num_blocks: int, block_tokens: int = 4) -> CacheGroupSpec:
    """One paged group."""
    return CacheGroupSpec(num_blocks=num_blocks, block_tokens=block_tokens)


def window(num_blocks: int, *, tokens: int, block_tokens: int = 4) -> CacheGroupSpec:
    """One window group."""
    return CacheGroupSpec(
        name="window",
        kind="window",
        num_blocks=num_blocks,
        block_tokens=block_tokens,
        window=tokens,
    )


CONFIG = BatcherConfig(max_model_len=64, max_num_seqs=8, max_batch_tokens=16)


def worker_with(
    num_blocks: int = 64, *, policy: BatchSlots = FCFS, **bounds: int | bool
) -> ToyWorker:
    """A worker with one paged group (4 tokens a block) and other bounds than `CONFIG`'s."""
    facts = {
        "max_model_len": CONFIG.max_model_len,
        "max_num_seqs": CONFIG.max_num_seqs,
        "max_batch_tokens": CONFIG.max_batch_tokens,
    } | bounds
    config = BatcherConfig(**facts)  # type: ignore[arg-type]
    return ToyWorker(config, groups=[paged(num_blocks)], policy=policy)


def shape(plan: StepPlan | None) -> list[tuple[int, int, int, str]]:
    """(id, start, num_tokens, phase) of each work item."""
    assert plan is not None
    return [(item.id, item.start, item.num_tokens, item.phase.value) for item in plan.work]


def only(reports: Sequence[Report], kind: type[Report]) -> list[Report]:
    return [report for report in reports if isinstance(report, kind)]


def prompt(length: int, first: int = 1) -> tuple[int, ...]:
    return tuple(range(first, first + length))


def plain_batcher(depth: int = 0, max_tokens: int = 9) -> Batcher:
    """A Batcher without a shell around it, to which request 1 (5 tokens) was assigned."""
    config = BatcherConfig(max_model_len=64, depth=depth)
    batcher = Batcher(WORKER, config, groups=[paged(64)], policy=FCFS)
    request = Request(id=RequestId(1), arrived=0.0, prompt_tokens=5, max_tokens=max_tokens)
    batcher.handle(Assign(worker=WORKER, request=request), 0.0)
    return batcher


def result_of(plan: StepPlan | None, num_tokens: int) -> StepResult:
    """A result with `num_tokens` tokens for each work item."""
    assert plan is not None
    seqs = tuple(SeqResult(id=item.id, num_tokens=num_tokens) for item in plan.work)
    return StepResult(step=plan.step, results=seqs, elapsed=0.0)
