"""Tasks with budgets, classes and priorities; a whole node that keeps a log of its decisions."""

import random
from collections.abc import Sequence
from dataclasses import replace

from appliance.core.messages import Assign, Ended, Input, Output, StepReported
from appliance.core.types import RequestId, Slo
from tests.core.toy_worker import Task, answer
from tests.core.whole_node import Setting, WholeNode

SLOS = (
    Slo(class_name="completion", ttft=0.05, tpot=0.02, weight=2.0),
    Slo(class_name="chat", ttft=0.3, tpot=0.015),
    Slo(class_name="summary", e2e=1.0, weight=0.5),
    Slo(class_name="batch", weight=0.1),
    Slo(class_name="hopeless", ttft=1e-4, tpot=1e-4, e2e=1e-3),
)
"""Tight, loose, end-to-end, none, and what nobody can keep."""


def dress(task: Task) -> Task:
    """The task with budgets and a priority that follow from its number."""
    return replace(task, slo=SLOS[task.id % len(SLOS)], priority=task.id * 7 % 3 - 1)


def traffic(seed: int, *, num_tasks: int, rate: float) -> list[Task]:
    """Poisson arrivals of all classes; prompts of 4 to 16 tokens, many with a common beginning;
    answers that stop by themselves after some 8 tokens."""
    rng = random.Random(seed)
    at, found = 0.1, []
    while len(found) < num_tasks:
        at += rng.expovariate(rate)
        shared = tuple(range(1, 1 + rng.choice([0, 0, 4, 8])))
        own = tuple(rng.randrange(30) for _ in range(rng.randint(4, 8)))
        task = Task(
            id=len(found) + 1,
            prompt=(*shared, *own),
            max_tokens=40,
            seed=rng.randrange(1 << 30),
            stop_every=8,
            arrived=at,
        )
        if 2 <= len(answer(task)[0]) <= 24:
            found.append(dress(task))
    return found


class LoggedNode(WholeNode):
    """Notes when each request ended, and every decision that can be seen from outside: who was
    placed where, and who was in which step with how many prompt tokens."""

    def __init__(self, setting: Setting) -> None:
        self.done: dict[RequestId, float] = {}
        self.log: list[tuple[object, ...]] = []
        super().__init__(setting)

    def hear(self, message: Input) -> None:
        if isinstance(message, StepReported):
            step = (message.worker, message.step, message.ids)
            self.log.append((self.now, *step, message.prefill_tokens, message.decode_tokens))
        super().hear(message)

    def _carry_out(self, output: Output) -> None:
        if isinstance(output, Assign):
            self.log.append((self.now, output.worker, output.request.id))
        if isinstance(output, Ended):
            self.done[output.request_id] = self.now
        super()._carry_out(output)


def serve(setting: Setting, work: Sequence[Task]) -> LoggedNode:
    """All of it, undisturbed."""
    node = LoggedNode(setting)
    for task in work:
        node.submit(task)
    node.run()
    return node
