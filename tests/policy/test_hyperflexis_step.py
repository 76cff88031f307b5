"""HyperFlexis inside a step, in the real Batcher with the laws on."""

import random
from collections.abc import Sequence

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.core.batcher import Batcher
from appliance.core.messages import Assign
from appliance.core.step_model import StepCoefficients, StepModel
from appliance.core.types import (
    BatcherConfig,
    CacheGroupSpec,
    Request,
    RequestId,
    SeqResult,
    Slo,
    StepPlan,
    StepResult,
)
from appliance.policy import make_policy
from appliance.policy.hyperflexis_budget import LEAST_CHUNK
from tests.core.toy_worker import WORKER, Task, ToyWorker, answer, paged

BASE, PER_TOKEN, PER_DECODE = 0.004, 1e-4, 1e-5
ROW = (BASE, PER_TOKEN, 0.0, PER_DECODE, 0.0)
STEPS = StepCoefficients(planes=(ROW, ROW))
SLOS = (
    Slo(),
    Slo(class_name="tight", ttft=0.05, tpot=0.012),
    Slo(class_name="loose", ttft=5.0, tpot=0.2),
    Slo(class_name="batch", e2e=10.0),
    Slo(class_name="hopeless", ttft=1e-6, tpot=1e-6),
)


class Rig:
    """A Batcher whose step model is exact, and a clock."""

    def __init__(self, *, depth: int = 0, num_blocks: int = 4096, **settings: object) -> None:
        config = BatcherConfig(
            max_model_len=9000, max_num_seqs=64, max_batch_tokens=2048, depth=depth
        )
        self.batcher = Batcher(
            WORKER,
            config,
            groups=[CacheGroupSpec(num_blocks=num_blocks, block_tokens=16)],
            policy=make_policy("hyperflexis", settings).batch,
            steps=StepModel(STEPS),
        )
        self.now = 100.0

    def assign(self, number: int, *, prompt: int, slo: Slo, arrived: float | None = None) -> None:
        wanted = Request(
            id=RequestId(number),
            arrived=self.now if arrived is None else arrived,
            prompt_tokens=prompt,
            max_tokens=500,
            slo=slo,
        )
        self.batcher.handle(Assign(worker=WORKER, request=wanted), self.now)

    def plan(self) -> StepPlan:
        plan = self.batcher.next_step(self.now)
        assert plan is not None
        return plan

    def finish(self, plan: StepPlan, *, seconds: float | None = None) -> None:
        took = self.seconds(plan) if seconds is None else seconds
        self.now += took
        results = tuple(SeqResult(id=item.id, num_tokens=1) for item in plan.work if item.samples)
        result = StepResult(step=plan.step, results=results, elapsed=took)
        self.batcher.finish_step(result, self.now)

    def step(self) -> StepPlan:
        plan = self.plan()
        self.finish(plan)
        return plan

    @staticmethod
    def seconds(plan: StepPlan) -> float:
        prefill = sum(item.num_tokens for item in plan.work if item.phase.value == "prefill")
        decodes = sum(item.phase.value == "decode" for item in plan.work)
        return BASE + PER_TOKEN * prefill + PER_DECODE * decodes


def tokens(plan: StepPlan) -> dict[int, int]:
    """Tokens by request."""
    return {item.id: item.num_tokens for item in plan.work}


@settings(max_examples=60, deadline=None)
@given(
    tpot=st.floats(0.006, 0.2),
    first=st.integers(1, 200),
    prompts=st.lists(st.integers(1, 8000), min_size=1, max_size=4),
)
def test_answers_are_within_their_budget_whatever_prompts_come(
    tpot: float, first: int, prompts: list[int]
) -> None:
    """Averaged over each prefix of the answer: a step takes no more than has been saved, or the
    smallest chunk there is."""
    rig = Rig()
    rig.assign(1, prompt=first, slo=Slo(ttft=10.0, tpot=tpot))
    while rig.batcher.queues.by_id[RequestId(1)].first_token_at is None:
        rig.step()
    began = rig.batcher.queues.by_id[RequestId(1)].first_token_at
    assert began is not None
    for number, size in enumerate(prompts):
        rig.assign(2 + number, prompt=size, slo=Slo(class_name="loose", ttft=60.0))
    slowest = BASE + PER_TOKEN * LEAST_CHUNK + PER_DECODE * 6
    for count in range(1, 60):
        plan = rig.step()
        assert 1 in tokens(plan), "a decode is in every step"
        assert rig.now - began <= count * max(tpot, slowest) + 1e-9


def test_without_budgets_a_prompt_gets_the_whole_step() -> None:
    shares = {}
    for budget in (True, False):
        rig = Rig(budget=budget)
        rig.assign(1, prompt=10, slo=Slo(ttft=1.0, tpot=0.02))
        rig.step()
        rig.assign(2, prompt=8000, slo=Slo(ttft=60.0))
        shares[budget] = tokens(rig.plan())[2]
    assert shares[False] == 2047
    assert 60 < shares[True] < 200


def test_saved_time_may_be_spent() -> None:
    rig = Rig()
    rig.assign(1, prompt=10, slo=Slo(ttft=1.0, tpot=0.02))
    for _ in range(11):
        rig.step()
    rig.assign(2, prompt=8000, slo=Slo(ttft=60.0))
    plan = rig.plan()
    assert rig.seconds(plan) > 0.1, "ten tokens were 16 ms early each"
    each = Rig(tpot="each")
    each.assign(1, prompt=10, slo=Slo(ttft=1.0, tpot=0.02))
    for _ in range(11):
        each.step()
    each.assign(2, prompt=8000, slo=Slo(ttft=60.0))
    assert each.seconds(each.plan()) <= 0.02


def test_one_that_is_late_for_good_binds_nobody() -> None:
    rig = Rig()
    rig.assign(1, prompt=10, slo=Slo(ttft=1e-6, tpot=0.005))
    rig.step()
    rig.assign(2, prompt=8000, slo=Slo(ttft=60.0))
    assert tokens(rig.plan())[2] == 2047


def test_the_most_urgent_prompt_goes_first_and_late_ones_last_with_a_share() -> None:
    rig = Rig()
    rig.assign(1, prompt=3000, slo=Slo(ttft=0.001))
    rig.assign(2, prompt=3000, slo=Slo(ttft=5.0))
    rig.assign(3, prompt=900, slo=Slo(ttft=1.0))
    got = tokens(rig.plan())
    assert got[3] == 900
    assert got[1] == int(2048 * 0.02)
    assert got[2] == 2048 - got[1] - 900


def test_first_come_first_served_without_priorities() -> None:
    rig = Rig(priority=False)
    rig.assign(1, prompt=3000, slo=Slo(ttft=0.001))
    rig.assign(2, prompt=3000, slo=Slo(ttft=0.5))
    assert tokens(rig.plan()) == {1: 2048}


def test_a_late_prompt_is_served_though_urgent_ones_keep_coming() -> None:
    rig = Rig()
    rig.assign(1, prompt=600, slo=Slo(ttft=0.001))
    for number in range(2, 400):
        rig.assign(number, prompt=2100, slo=Slo(ttft=0.8))
        rig.step()
        seq = rig.batcher.queues.by_id.get(RequestId(1))
        if seq is None or seq.num_emitted:
            return
    raise AssertionError("it starves")


def test_loose_decodes_sit_out_a_step_that_is_too_long_for_a_tight_one() -> None:
    steps = StepCoefficients(planes=((0.001, 0.0, 0.0, 0.001, 0.0),) * 2)
    config = BatcherConfig(max_model_len=900, max_num_seqs=64, max_batch_tokens=2048)
    batcher = Batcher(
        WORKER,
        config,
        groups=[CacheGroupSpec(num_blocks=900, block_tokens=16)],
        policy=make_policy("hyperflexis", {}).batch,
        steps=StepModel(steps),
    )
    for number in range(40):
        slo = Slo(ttft=9.0, tpot=0.02 if number == 0 else 2.0)
        wanted = Request(id=RequestId(number), arrived=0.0, prompt_tokens=4, max_tokens=99, slo=slo)
        batcher.handle(Assign(worker=WORKER, request=wanted), 0.0)
    plan = batcher.next_step(0.0)
    assert plan is not None
    results = tuple(SeqResult(id=item.id, num_tokens=1) for item in plan.work)
    batcher.finish_step(StepResult(step=plan.step, results=results, elapsed=0.0401), 0.05)
    plan = batcher.next_step(0.05)
    assert plan is not None
    assert 0 in tokens(plan)
    assert len(plan.work) < 25


def test_the_victim_is_the_one_without_targets_then_the_late_then_the_loosest() -> None:
    rig = Rig()
    kinds = {
        1: Slo(ttft=9.0, tpot=0.02),
        2: Slo(ttft=9.0, tpot=0.5),
        3: Slo(ttft=1e-6, tpot=0.01),
        4: Slo(),
    }
    for number, slo in kinds.items():
        rig.assign(number, prompt=10, slo=slo)
    rig.step()
    queues = rig.batcher.queues
    victim = make_policy("hyperflexis", {}).batch.victim
    left = [queues.by_id[RequestId(number)] for number in kinds]
    order = []
    while left:
        chosen = victim(queues, left, rig.now)
        order.append(chosen)
        left = [seq for seq in left if seq.id != chosen]
    assert order == [4, 3, 2, 1]


def test_a_sequence_that_moved_here_has_saved_nothing_elsewhere() -> None:
    rig = Rig()
    wanted = Request(
        id=RequestId(1),
        arrived=0.0,
        prompt_tokens=10,
        max_tokens=500,
        slo=Slo(ttft=500.0, tpot=0.02),
    )
    rig.batcher.handle(Assign(worker=WORKER, request=wanted, emitted_tokens=100), rig.now)
    rig.step()
    rig.assign(2, prompt=8000, slo=Slo(ttft=60.0))
    assert rig.seconds(rig.plan()) <= 0.02


tasks = st.lists(
    st.builds(
        Task,
        id=st.just(0),
        prompt=st.lists(st.integers(0, 3), min_size=1, max_size=16).map(tuple),
        max_tokens=st.integers(1, 20),
        seed=st.integers(0, 2),
        stop_every=st.sampled_from([0, 0, 9]),
        arrived=st.sampled_from([0.0, 0.0, 0.3]),
        slo=st.sampled_from(SLOS),
    ),
    min_size=1,
    max_size=16,
)
bounds = st.builds(
    BatcherConfig,
    max_model_len=st.just(40),
    max_num_seqs=st.sampled_from([1, 2, 4, 8]),
    max_batch_tokens=st.integers(1, 40),
    depth=st.integers(0, 2),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    tasks=tasks,
    config=bounds,
    spare=st.integers(0, 8),
    rng=st.randoms(use_true_random=False),
    settings_=st.sampled_from(
        [{}, {"budget": False}, {"priority": False}, {"tpot": "each"}, {"anchor": "target"}]
    ),
)
def test_R12_every_answer_is_right_and_the_laws_hold(
    tasks: Sequence[Task],
    config: BatcherConfig,
    spare: int,
    rng: random.Random,
    settings_: dict[str, object],
) -> None:
    policy = make_policy("hyperflexis", settings_).batch
    worker = ToyWorker(config, groups=[paged(10 + spare)], policy=policy)
    waiting = [
        Task(
            number,
            task.prompt,
            task.max_tokens,
            task.seed,
            task.stop_every,
            arrived=task.arrived,
            slo=task.slo,
        )
        for number, task in enumerate(tasks)
    ]
    for task in waiting:
        worker.assign(task)
        for _ in range(rng.randrange(3)):
            worker.step()
    worker.run()
    assert set(worker.finished) == set(range(len(tasks)))
    for number, task in enumerate(waiting):
        assert worker.emitted[number] == answer(task, config.max_model_len)[0]


def test_what_an_urgent_newcomer_leaves_goes_to_the_prompt_that_runs() -> None:
    rig = Rig()
    rig.assign(1, prompt=8000, slo=Slo(ttft=60.0))
    rig.step()
    rig.assign(2, prompt=100, slo=Slo(ttft=1.0))
    assert tokens(rig.plan()) == {1: 1948, 2: 100}


def test_a_request_without_targets_is_never_more_urgent_for_waiting_long() -> None:
    rig = Rig()
    rig.assign(1, prompt=8000, slo=Slo(), arrived=rig.now - 1000.0)
    rig.assign(2, prompt=8000, slo=Slo(ttft=60.0))
    got = tokens(rig.plan())
    assert got[2] > 1900
    assert got[1] >= 1, "it is not forgotten either"
