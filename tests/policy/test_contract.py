"""Every registered policy keeps the laws: a new entry of the table inherits these tests.

The worlds check after each message; random choices come from a seed, so a failure can be repeated.
"""

import random
from collections.abc import Callable

import pytest

from appliance.core.dispatcher import Dispatcher
from appliance.core.messages import Cancelled, Woke
from appliance.core.types import BatcherConfig, RequestId, WorkerId, WorkerSpec
from appliance.policy import POLICIES, make_policy
from tests.core.node_world import HIDDEN_LENGTH, World
from tests.core.toy_worker import Task, ToyWorker, answer, paged

SEEDS = range(8)
NUM_WORKERS = 3

every_policy = pytest.mark.parametrize("name", sorted(POLICIES))


def happenings(world: World, rng: random.Random) -> list[Callable[[], object]]:
    """What may happen next, on a worker of our choice."""
    worker = WorkerId(rng.randrange(NUM_WORKERS))
    live = world.live()

    def cancel() -> None:
        if live:
            chosen = RequestId(rng.choice(live))
            world.cancelled.add(chosen)
            world.hear(Cancelled(request_id=chosen))

    def work() -> None:
        world.obey(worker, refuse=rng.random() < 0.1)
        world.step(worker, burst=rng.randint(1, 2))
        world.deliver(worker, count=9)

    return [
        lambda: world.arrive(prompt=rng.randint(1, 60), length=rng.choice(HIDDEN_LENGTH)),
        lambda: world.arrive(prompt=rng.randint(1, 60), length=rng.choice(HIDDEN_LENGTH)),
        cancel,
        lambda: world.come_up(worker),
        work,
        work,
        lambda: world.deliver(worker, count=3),
        lambda: world.preempt(worker),
        lambda: world.die(worker, lost=rng.randint(0, 2)) if rng.random() < 0.3 else None,
        lambda: world.hear(Woke(), after=rng.choice([0.01, 1.0, 20.0])),
    ]


@every_policy
@pytest.mark.parametrize("seed", SEEDS)
def test_the_node_keeps_its_laws_and_replays_the_same(name: str, seed: int) -> None:
    policy = make_policy(name, {})
    world = World(NUM_WORKERS, policy=policy.dispatch)
    rng = random.Random(seed)
    for _ in range(150):
        rng.choice(happenings(world, rng))()
    world.settle()
    specs = [WorkerSpec(id=worker, devices=("cpu",)) for worker in world.wire]
    fresh_policy = make_policy(name, {}).dispatch
    fresh = Dispatcher(world.config, workers=specs, policy=fresh_policy)
    for now, message, outputs in world.inputs:
        assert fresh.handle(message, now) == outputs


@every_policy
@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_worker_keeps_its_laws_and_gives_the_answers_of_a_request_alone(
    name: str, depth: int, seed: int
) -> None:
    rng = random.Random(seed)
    config = BatcherConfig(max_model_len=40, max_num_seqs=4, max_batch_tokens=9, depth=depth)
    policy = make_policy(name, {})
    worker = ToyWorker(config, groups=[paged(num_blocks=14)], policy=policy.batch)
    tasks = {}
    for number in range(1, 25):
        prompt = tuple(rng.randint(0, 2) for _ in range(rng.randint(1, 20)))
        tasks[number] = Task(number, prompt, max_tokens=rng.randint(1, 15), seed=number % 3)
        worker.assign(tasks[number])
        for _ in range(rng.randint(0, 3)):
            worker.step()
    worker.run()
    assert worker.open == frozenset()
    for number, task in tasks.items():
        assert worker.emitted[number] == answer(task, config.max_model_len)[0]


@every_policy
def test_its_name_is_its_key(name: str) -> None:
    assert make_policy(name, {}).name == name
