"""Batcher and ledger under everything at once: random commands in random states, all laws after
each.

Two instruments. The state machine interleaves commands, planning, execution and finishing at
random. The differential test runs a whole scenario under random bounds and compares every answer
with `answer`, which knows no blocks: equal at each depth, budget and pool size means equal to
each other.
"""

import random
from collections import deque
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from appliance.core.messages import Park, Refused, SetBudget, SetRole, Wake
from appliance.core.slots import BatchSlots, Grant
from appliance.core.types import (
    BatcherConfig,
    CacheGroupSpec,
    RequestId,
    Role,
)
from appliance.core.view import LocalView, SeqView
from appliance.policy.parts import fill_fcfs
from tests.core.toy_worker import FCFS, WORKER, Task, ToyWorker, answer, paged, window

MODEL_LEN = 40
PREFIXES = [tuple(range(1, 17)), (7,) * 16, (7, 7, 7, 7, 7, 7, 3, 3, 3, 3, 3, 3)]
"""Prompts begin alike, so that blocks are shared and evicted and found again."""

prompts = st.builds(
    lambda prefix, cut, rest: (*prefix[:cut], *rest) or (1,),
    st.sampled_from(PREFIXES),
    st.sampled_from([0, 3, 6, 9, 16]),
    st.lists(st.integers(0, 3), max_size=6),
)


answers = st.one_of(st.integers(1, 6), st.integers(18, 32))
"""Answer lengths: short ones, and such as outgrow what was free when they were admitted."""


@st.composite
def _groups(draw: st.DrawFn) -> list[CacheGroupSpec]:
    """Pools that hold one longest sequence and little more: memory is always short."""
    size = draw(st.sampled_from([2, 4]))
    alone = -(-(MODEL_LEN - 1) // size)
    groups = [paged(alone + draw(st.integers(0, alone // 2)), size)]
    if draw(st.booleans()):
        tokens = draw(st.integers(1, 9))
        least = (tokens + size - 2) // size + 1
        groups.append(window(least + draw(st.integers(0, 12)), tokens=tokens, block_tokens=size))
    return groups


configs = st.builds(
    BatcherConfig,
    max_model_len=st.just(MODEL_LEN),
    max_num_seqs=st.sampled_from([1, 2, 4, 6, 8]),
    max_batch_tokens=st.integers(1, 40),
    depth=st.integers(0, 2),
    enable_prefix_cache=st.sampled_from([True, True, True, False]),
)


def contrary(rng: random.Random) -> BatchSlots:
    """A policy without sense: any victim, any order, any chunk. The laws are the mechanism's."""

    def fill(view: LocalView, budget_tokens: int, now: float) -> list[Grant]:
        grants = fill_fcfs(view, budget_tokens, now)
        rng.shuffle(grants)
        return [Grant(id=g.id, num_tokens=rng.randint(1, g.num_tokens)) for g in grants]

    def victim(view: LocalView, candidates: Sequence[SeqView], now: float) -> RequestId:
        return rng.choice(candidates).id

    return BatchSlots(victim=victim, fill=fill)


policies = st.one_of(st.just(FCFS), st.randoms(use_true_random=False).map(contrary))


class BatcherMachine(RuleBasedStateMachine):
    """Commands in, plans and reports out; the laws are checked by `ToyWorker` after every call."""

    @initialize(config=configs, groups=_groups(), drops=st.booleans(), policy=policies)
    def begin(
        self,
        config: BatcherConfig,
        groups: list[CacheGroupSpec],
        drops: bool,
        policy: BatchSlots,
    ) -> None:
        self.worker = ToyWorker(config, groups=groups, drops=drops, policy=policy)
        self.parked = False
        self.next_id = 0

    def _assign(self, task: Task, emitted: Sequence[int] = ()) -> None:
        reports = self.worker.assign(task, emitted=emitted)
        assert isinstance(reports[0], Refused) == self.parked, reports

    @rule(
        prompt=prompts,
        max_tokens=answers,
        seed=st.integers(0, 3),
        stop_every=st.sampled_from([0, 0, 4, 20]),
        late=st.floats(0, 0.02),
        times=st.integers(1, 3),
    )
    def assign(
        self,
        prompt: tuple[int, ...],
        max_tokens: int,
        seed: int,
        stop_every: int,
        late: float,
        times: int,
    ) -> None:
        for number in range(times):
            self.next_id += 1
            arrived = self.worker.now - late
            task = Task(
                self.next_id, prompt, max_tokens, seed + number, stop_every, arrived=arrived
            )
            self._assign(task)

    @rule(
        prompt=prompts,
        size=st.integers(2, 3),
        max_tokens=st.integers(1, 12),
        without_leader=st.booleans(),
    )
    def assign_group(
        self, prompt: tuple[int, ...], size: int, max_tokens: int, without_leader: bool
    ) -> None:
        leader = self.next_id + 1
        self.next_id += size
        for choice in range(int(without_leader), size):
            task = Task(leader + choice, prompt, max_tokens, choice, 5, leader, self.worker.now)
            self._assign(task)

    @rule(prompt=prompts, seed=st.integers(0, 3), max_tokens=st.integers(2, 16), data=st.data())
    def assign_replaced(
        self, prompt: tuple[int, ...], seed: int, max_tokens: int, data: st.DataObject
    ) -> None:
        self.next_id += 1
        task = Task(self.next_id, prompt, max_tokens, seed, 6, arrived=self.worker.now)
        tokens, _ = answer(task, MODEL_LEN)
        self._assign(task, tokens[: data.draw(st.integers(0, len(tokens) - 1))])

    @rule(picks=st.lists(st.integers(0, 63), min_size=1, max_size=3))
    def abort(self, picks: list[int]) -> None:
        """What lives, in any state; with nothing alive, what has ended or never was."""
        for pick in picks:
            live = sorted(self.worker.open) or [self.next_id, 0]
            self.worker.abort(live[pick % len(live)])

    @rule(
        tokens=st.integers(0, 30),
        decodes=st.integers(0, 6),
        parked=st.booleans(),
        role=st.none() | st.sampled_from(Role),
    )
    def other_commands(self, tokens: int, decodes: int, parked: bool, role: Role | None) -> None:
        self.parked = parked
        self.worker.handle(Park(worker=WORKER) if parked else Wake(worker=WORKER))
        self.worker.handle(SetBudget(worker=WORKER, prefill_tokens=tokens, max_decodes=decodes))
        if role is not None:
            self.worker.handle(SetRole(worker=WORKER, role=role, epoch=1))

    @rule(moves=st.lists(st.sampled_from("ppxfs"), min_size=1, max_size=10))
    def move(self, moves: list[str]) -> None:
        """Plan, execute, finish, or a whole step."""
        for move in moves:
            if move == "p":
                self.worker.plan()
            elif move == "x" and self.worker.planned:
                self.worker.execute()
            elif move == "f" and (self.worker.planned or self.worker.executed):
                self.worker.finish()
            elif move == "s":
                self.worker.step()

    @rule(picks=st.lists(st.integers(0, 63), min_size=1, max_size=2), times=st.integers(0, 6))
    def abort_in_flight(self, picks: list[int], times: int) -> None:
        """Aborts between planning and finishing."""
        for _ in range(times):
            self.worker.step()
        self.worker.plan()
        self.abort(picks)

    def teardown(self) -> None:
        if hasattr(self, "worker"):
            self.worker.run()


BatcherMachine.TestCase.settings = settings(
    max_examples=100,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestBatcherLaws = BatcherMachine.TestCase


class ManyMoreExamples(BatcherMachine):
    """The same, longer."""


ManyMoreExamples.TestCase.settings = settings(
    BatcherMachine.TestCase.settings, max_examples=2000, stateful_step_count=80
)
TestBatcherLawsAtLength = pytest.mark.slow(pytest.mark.timeout(3600)(ManyMoreExamples.TestCase))


# --- equal answers --------------------------------------------------------------------------------

tasks = st.lists(
    st.builds(
        Task,
        id=st.just(0),
        prompt=prompts,
        max_tokens=answers,
        seed=st.integers(0, 2),
        stop_every=st.sampled_from([0, 0, 20]),
        arrived=st.sampled_from([0.0, 0.0, 1.0]),
    ),
    min_size=1,
    max_size=20,
)


def _serve(worker: ToyWorker, tasks: Sequence[Task], rng: random.Random) -> set[int]:
    """Serve all tasks, commands, aborts and the three parts of a step interleaved by `rng`. Returns
    the ids of those that were aborted."""
    waiting = deque(
        Task(
            number,
            task.prompt,
            task.max_tokens,
            task.seed,
            task.stop_every,
            number - number % 3 if task.seed == 1 else None,
            task.arrived,
        )
        for number, task in enumerate(tasks)
    )
    aborted: set[int] = set()
    aborts = rng.choice([0, 0, 4, 20])
    while waiting or (aborts and worker.open):
        move = rng.randrange(100)
        if move < 25 and waiting:
            worker.assign(waiting.popleft())
        elif move < 45:
            worker.plan()
        elif move < 55 and worker.planned:
            worker.execute()
        elif move < 75 and (worker.planned or worker.executed):
            worker.finish()
        elif move < 75 + aborts and worker.open:
            chosen = rng.choice(sorted(worker.open))
            aborted.add(chosen)
            worker.abort(chosen)
        else:
            worker.step()
    worker.run()
    return aborted


def _check_equal_answers(
    tasks: Sequence[Task],
    config: BatcherConfig,
    groups: list[CacheGroupSpec],
    rng: random.Random,
) -> None:
    policy = FCFS if rng.random() < 0.5 else contrary(rng)
    worker = ToyWorker(config, groups=groups, drops=rng.random() < 0.5, policy=policy)
    aborted = _serve(worker, tasks, rng)
    unanswered = set(range(len(tasks))) - set(worker.finished)
    assert unanswered <= aborted, "answered or aborted"


differential = given(
    tasks=tasks, config=configs, groups=_groups(), rng=st.randoms(use_true_random=False)
)
quietly = [HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=250, deadline=None, suppress_health_check=quietly)
@differential
def test_R12_answers_do_not_depend_on_depth_budget_pool_or_cache(
    tasks: list[Task],
    config: BatcherConfig,
    groups: list[CacheGroupSpec],
    rng: random.Random,
) -> None:
    _check_equal_answers(tasks, config, groups, rng)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=8000, deadline=None, suppress_health_check=quietly)
@differential
def test_R12_answers_do_not_depend_on_anything_at_length(
    tasks: list[Task],
    config: BatcherConfig,
    groups: list[CacheGroupSpec],
    rng: random.Random,
) -> None:
    _check_equal_answers(tasks, config, groups, rng)


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("windowed", [False, True])
def test_R12_tight_pool_really_preempts_and_shares(depth: int, windowed: bool) -> None:
    """The scenario in which all mechanisms meet, so that the property above cannot pass idly."""
    groups = [paged(16), window(14, tokens=6)] if windowed else [paged(16)]
    config = BatcherConfig(max_model_len=40, max_num_seqs=6, max_batch_tokens=12, depth=depth)
    worker = ToyWorker(config, groups=groups)
    for number in range(24):
        prompt = (*range(1, 10), number % 5)
        worker.assign(Task(number, prompt, 16, seed=number, stop_every=12 * (number % 2)))
    worker.run()
    assert len(worker.finished) == 24
    assert worker.preempted, "memory was short"
    assert any(end.cached_tokens for end in worker.finished.values()), "prompts were shared"
