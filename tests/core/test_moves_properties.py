"""Sequences that move between workers while everything else happens to them.

Two or three workers, each with its Batcher, engine, slab and watch over the laws, and wires that
deliver when they like. Whatever is decided, refused, lost or killed: each request ends once, with
the answer that it has without any of it, no slot is read that holds anything else, and no block is
left behind.
"""

import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.core.types import BatcherConfig, Role, WorkerId
from tests.core.moving_node import LEASE, MovingNode
from tests.core.moving_worker import MovingWorker
from tests.core.test_batcher_properties import contrary
from tests.core.toy_worker import FCFS, Task, paged

MODEL_LEN = 40
PREFIXES = [tuple(range(1, 17)), (7,) * 16, (7, 7, 7, 7, 7, 7, 3, 3, 3, 3, 3, 3)]


def _node(rng: random.Random, *, num_workers: int, facts: dict[str, int | bool]) -> MovingNode:
    size = rng.choice([2, 4])
    alone = -(-(MODEL_LEN - 1) // size)
    group = paged(alone + rng.randrange(alone), size)
    config = BatcherConfig(
        max_model_len=MODEL_LEN,
        max_num_seqs=rng.choice([1, 2, 3, 8]),
        max_batch_tokens=rng.randint(1, 40),
        **facts,  # type: ignore[arg-type]
    )
    roles = [rng.choice(list(Role)) for _ in range(num_workers)]
    policies = [FCFS if rng.random() < 0.6 else contrary(rng) for _ in range(num_workers)]
    drops, checks = rng.random() < 0.5, rng.random() < 0.3

    def start(node: MovingNode, worker: WorkerId) -> MovingWorker:
        return MovingWorker(
            worker,
            config,
            group=group,
            wires=node,
            policy=policies[worker],
            role=roles[worker],
            drops=drops,
            checks=checks,
        )

    return MovingNode(num_workers, group, start=start, model_len=MODEL_LEN)


def _task(rng: random.Random, number: int, now: float) -> Task:
    prompt = rng.choice(PREFIXES)[: rng.choice([0, 3, 6, 9, 16])]
    prompt += tuple(rng.randrange(4) for _ in range(rng.randrange(7)))
    group = number - number % 3 if rng.random() < 0.2 else None
    longest = rng.choice([6, 30])
    return Task(
        number,
        prompt or (1,),
        rng.randint(1, longest),
        rng.randrange(3),
        rng.choice([0, 0, 5, 20]),
        group,
        now,
    )


class Mood:
    """How often what happens in one run, drawn once: some runs are all copies, others all ends."""

    def __init__(self, rng: random.Random) -> None:
        self.deaths = rng.choice([0.0, 0.0, 0.01, 0.05])
        self.hurry = rng.choice([0.0, 0.005, 0.03])
        self.failures = rng.choice([0.0, 0.0, 0.1])
        self.cancels = rng.choice([0.0, 0.02, 0.1])
        self.regrets = rng.choice([0.0, 0.0, 0.02, 0.1])
        self.moves = rng.choice([0.1, 0.5, 1.0])
        self.fetches = rng.choice([0.0, 0.5, 1.0])
        self.decisions = rng.choice([0.05, 0.1, 0.2])
        self.copying = rng.choice([0.01, 0.1, 0.3])


class Storm:
    """Everything at once, drawn by `rng`."""

    def __init__(self, node: MovingNode, rng: random.Random, mood: Mood) -> None:
        self.node = node
        self.rng = rng
        self.mood = mood
        self.num_tasks = 0

    def act(self) -> None:
        node, rng, mood = self.node, self.rng, self.mood
        worker = rng.choice(node.ids)
        shell = node.workers[worker]
        draw = rng.random()
        if draw < mood.decisions:
            self._decide(worker)
        elif draw < mood.decisions + mood.hurry:
            node.now += rng.choice([0.1, 2.0, 6.0])
        elif shell is not None and shell.copies and rng.random() < mood.copying:
            fails = "the copier failed" if rng.random() < mood.failures else ""
            shell.advance(rng.randrange(99), rng.choice([1, 3, 1000]), fails)
        elif shell is not None and draw > 0.7:
            shell.wake()
            self._step(shell)
        else:
            self._deliver(worker)

    def _deliver(self, worker: WorkerId) -> None:
        node, rng = self.node, self.rng
        draw = rng.randrange(3)
        if draw == 0:
            node.deliver_command(worker)
        elif draw == 1:
            node.deliver_frame(worker)
        else:
            node.deliver_bell(worker, rng.choice([id_ for id_ in node.ids if id_ != worker]))

    def _step(self, shell: MovingWorker) -> None:
        move = self.rng.randrange(4)
        if move == 0:
            shell.plan()
        elif move == 1 and shell.planned:
            shell.execute()
        elif move == 2 and (shell.planned or shell.executed):
            shell.finish()
        elif move == 3:
            shell.step()

    def _decide(self, worker: WorkerId) -> None:
        node, rng, mood = self.node, self.rng, self.mood
        open_ = [id_ for id_, served in node.served.items() if not served.over]
        if rng.random() < mood.deaths:
            node.kill(worker)
        elif node.can_start(worker):
            node.start(worker)
        elif len(open_) < 4 and self.num_tasks < 60:
            node.arrive(_task(rng, self.num_tasks, node.now))
            self.num_tasks += 1
        elif open_:
            self._decide_for(rng.choice(open_), worker)

    def _decide_for(self, request_id: int, worker: WorkerId) -> None:
        node, rng, mood = self.node, self.rng, self.mood
        if node.served[request_id].at is None:
            if rng.random() < mood.fetches:
                source = rng.choice([id_ for id_ in node.ids if id_ != worker])
                node.place(request_id, worker, pull_from=source, pull_blocks=rng.randrange(1, 12))
            else:
                node.place(request_id, worker)
            if rng.random() < mood.moves:
                node.migrate(request_id, rng.choice(node.ids), live=False)
        elif rng.random() < mood.regrets:
            node.give_up_move(request_id)
        elif rng.random() < mood.cancels:
            node.cancel(request_id)
        elif rng.random() < mood.moves:
            live, pull_first = rng.random() < 0.6, rng.random() < 0.5
            node.migrate(request_id, worker, live=live, pull_first=pull_first)


def _run(rng: random.Random, *, acts: int) -> MovingNode:
    facts: dict[str, int | bool] = {
        "depth": rng.randrange(3),
        "enable_prefix_cache": rng.random() < 0.8,
    }
    node = _node(rng, num_workers=rng.choice([2, 2, 3]), facts=facts)
    mood = Mood(rng)
    storm = Storm(node, rng, mood)
    for _ in range(acts):
        storm.act()
    waits = node.finish()
    if not (mood.deaths or mood.hurry or mood.failures or mood.regrets or mood.cancels):
        assert not waits, "something waited for a lease to end"
    return node


storms = given(rng=st.randoms(use_true_random=False), acts=st.integers(1, 600))
quietly = [HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=40, deadline=None, suppress_health_check=quietly)
@storms
def test_R12_R28_moves_change_no_answer_and_leave_nothing_behind(
    rng: random.Random, acts: int
) -> None:
    _run(rng, acts=acts)


def test_R12_storms_really_move_fail_and_kill() -> None:
    total: Counter[str] = Counter()
    for seed in range(40):
        total.update(_run(random.Random(seed), acts=1200).counts)
    for what in ("pulled", "fetched", "killed", "expired", "given up", "cancelled", "Preempted"):
        assert total[what] >= 5, (what, total)


def _plain_node(num_blocks: int, *, depth: int, prefix_cache: bool = True) -> MovingNode:
    config = BatcherConfig(
        max_model_len=MODEL_LEN,
        max_num_seqs=6,
        max_batch_tokens=16,
        depth=depth,
        enable_prefix_cache=prefix_cache,
    )
    group = paged(num_blocks)

    def start(node: MovingNode, worker: WorkerId) -> MovingWorker:
        return MovingWorker(worker, config, group=group, wires=node)

    return MovingNode(2, group, start=start, model_len=MODEL_LEN)


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_R28_full_workers_that_send_each_other_everything_never_stand_still(
    depth: int, prefix_cache: bool
) -> None:
    node = _plain_node(12, depth=depth, prefix_cache=prefix_cache)
    for number in range(24):
        prompt = tuple((number * position) % 7 for position in range(12 + number % 12))
        node.arrive(Task(number, prompt, 12, seed=number, stop_every=20))
    for number in range(24):
        node.place(number, node.ids[number % 2])
        node.migrate(number, node.ids[1 - number % 2], live=number % 3 == 0)
    assert node.finish() == 0, "something waited for a lease to end"
    assert node.counts["pulled"], node.counts
    assert node.counts["Preempted"], "memory was short"


def test_a_copy_that_is_overtaken_by_the_next_owner_of_its_blocks_is_noticed() -> None:
    """Law 11: the lease has ended, nobody has told the target, and the blocks are used anew."""
    node = _plain_node(10, depth=0)
    source, target = node.workers[WorkerId(0)], node.workers[WorkerId(1)]
    assert source is not None
    assert target is not None
    node.arrive(Task(0, tuple(range(16)), 9))
    node.place(0, source.worker)
    node.migrate(0, target.worker, live=False)
    while node.deliver_command(source.worker) or node.deliver_command(target.worker):
        pass
    node.deliver_bell(target.worker, source.worker)
    source.step()
    node.deliver_bell(source.worker, target.worker)
    target.advance(0, 6)
    node.now += LEASE
    source.wake()
    for number in (1, 2, 3):
        source.assign(Task(100 + number, tuple(range(number, number + 14)), 4))
    for _ in range(9):
        source.step()
    target.advance(0, 1000)
    while node.deliver_frame(target.worker):
        pass
    assert node.counts["reused"] == 1
    assert target.batcher.load().blocks_held == 0


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_R25_prompts_are_computed_at_one_worker_and_answers_at_the_other(depth: int) -> None:
    node = _plain_node(64, depth=depth)
    for number in range(6):
        prompt = tuple((number * position) % 7 for position in range(5 + number))
        node.arrive(Task(number, prompt, 25, seed=number))
        node.place(number, WorkerId(0))
        node.migrate(number, WorkerId(1), live=False)
    while any(node.deliver_command(worker) for worker in node.ids):
        pass
    assert node.finish() == 0
    assert node.counts["pulled"] == 6
    assert node.prefilled[WorkerId(1)] == 0
    assert node.decoded[WorkerId(0)] < node.decoded[WorkerId(1)], "some, while blocks are copied"


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_R12_R28_storms_at_length() -> None:
    for seed in range(5_000):
        rng = random.Random(1_000_000 + seed)
        _run(rng, acts=rng.choice([100, 600, 2000]))
