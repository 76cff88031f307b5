"""The Dispatcher in a world where anything happens at any time: the laws hold after every message,
and once the world calms down every accepted request has ended exactly once."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from appliance.core.dispatcher import Dispatcher
from appliance.core.messages import Cancelled, DrainExpired, DrainStarted, Woke
from appliance.core.types import WorkerId, WorkerSpec
from tests.core.node_kit import FCFS
from tests.core.node_world import HIDDEN_LENGTH, World

workers = st.integers(0, 3)
prompts = st.integers(1, 60)
lengths = st.sampled_from(HIDDEN_LENGTH)


class NodeMachine(RuleBasedStateMachine):
    """Rules are what may happen; `World` checks."""

    world: World

    @initialize(num_workers=st.integers(1, 4), bring_up=st.booleans())
    def build(self, num_workers: int, bring_up: bool) -> None:
        self.num_workers = num_workers
        self.world = World(num_workers)
        if bring_up:
            for worker in range(num_workers):
                self.come_up(worker)
                self.deliver(worker, 1)

    def worker(self, number: int) -> WorkerId:
        return WorkerId(number % self.num_workers)

    @rule(prompt=prompts, length=lengths, count=st.integers(1, 5))
    def arrive(self, prompt: int, length: int, count: int) -> None:
        for _ in range(count):
            self.world.arrive(prompt=prompt, length=length)

    @rule(prompt=prompts, length=lengths, count=st.integers(2, 4))
    def arrive_as_group(self, prompt: int, length: int, count: int) -> None:
        leader = self.world.arrive(prompt=prompt, length=length)
        for _ in range(count - 1):
            self.world.arrive(prompt=prompt, length=length, group=leader)

    @rule(prompt=prompts)
    def arrive_with_poison(self, prompt: int) -> None:
        if len(self.world.poison) < 3:
            self.world.arrive(prompt=prompt, length=5, poison=True)

    @rule(pick=st.integers(0, 1000))
    def cancel(self, pick: int) -> None:
        live = self.world.live()
        if live:
            chosen = live[pick % len(live)]
            self.world.cancelled.add(chosen)
            self.world.hear(Cancelled(request_id=chosen))

    @rule(number=workers)
    def come_up(self, number: int) -> None:
        self.world.come_up(self.worker(number))

    @rule(number=workers, refuse=st.booleans())
    def obey(self, number: int, refuse: bool) -> None:
        self.world.obey(self.worker(number), refuse=refuse)

    @rule(number=workers, burst=st.integers(1, 3), preempts=st.booleans(), told=st.booleans())
    def step(self, number: int, burst: int, preempts: bool, told: bool) -> None:
        worker = self.worker(number)
        self.world.obey(worker)
        self.world.step(worker, burst=burst)
        if preempts:
            self.world.preempt(worker)
        if told:
            self.world.deliver(worker, count=9)

    @rule(number=workers, count=st.integers(1, 9))
    def deliver(self, number: int, count: int) -> None:
        self.world.deliver(self.worker(number), count=count)

    @rule(number=workers)
    def beat(self, number: int) -> None:
        self.world.beat(self.worker(number))

    @rule(number=workers, lost=st.integers(0, 3), early=st.booleans())
    def die(self, number: int, lost: int, early: bool) -> None:
        self.world.die(self.worker(number), lost=lost, early=early)

    @rule(seconds=st.sampled_from([0.01, 0.3, 5.0, 30.0]))
    def wait(self, seconds: float) -> None:
        self.world.hear(Woke(), after=seconds)

    @rule()
    def wake(self) -> None:
        wakeup = self.world.core.next_wakeup()
        if wakeup is not None:
            self.world.hear(Woke(), after=wakeup - self.world.now)

    @precondition(lambda self: len(self.world.length) > 8)
    @rule(chance=st.integers(0, 9), expire=st.booleans())
    def drain(self, chance: int, expire: bool) -> None:
        if chance:
            return
        self.world.hear(DrainStarted())
        if expire:
            self.world.hear(DrainExpired())

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        self.world.settle()
        self.replay()

    def replay(self) -> None:
        """Law 6: a fresh core that hears the same says the same."""
        specs = [WorkerSpec(id=worker, devices=("cpu",)) for worker in self.world.wire]
        fresh = Dispatcher(self.world.config, workers=specs, policy=FCFS.dispatch)
        for now, message, outputs in self.world.inputs:
            assert fresh.handle(message, now) == outputs


def run(examples: int, steps: int) -> None:
    run_state_machine_as_test(
        NodeMachine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_laws_hold_whatever_happens() -> None:
    run(examples=60, steps=40)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_laws_hold_whatever_happens_often_and_long() -> None:
    run(examples=3000, steps=80)
