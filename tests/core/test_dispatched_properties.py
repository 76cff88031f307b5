"""The Dispatcher moves, flips, parks and adds over real Batchers while workers die and everything
is late: every answer is that of an undisturbed run, all laws hold, nothing is left behind."""

import random
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.core.lifecycle import WorkerState
from appliance.core.slots import DispatchSlots, Policy
from appliance.core.types import BatcherConfig, ErrorKind, Role, WorkerId
from appliance.policy import make_policy
from tests.core.dispatched_node import DispatchedNode
from tests.core.moving_node import MovingNode
from tests.core.moving_worker import MovingWorker
from tests.core.test_batcher_properties import contrary
from tests.core.test_moves_properties import MODEL_LEN, _task
from tests.core.toy_worker import FCFS, Task, paged

ROLES = list(Role)
LIKELY = [Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE, Role.MIXED]
HASTY = {"interval": 0.01, "window": 0.1, "high": 0.01, "gain": 0.0, "confirm": 1}
"""A controller that flips as often as it can."""
HASTY |= {"dwell": 0.05, "cooldown": 0.02, "hold": 0.05, "horizon": 1000.0}


def policy(*, controlled: bool, balanced: bool) -> DispatchSlots:
    settings = {"rebalance_gap": 2} if balanced else {}
    return make_policy("fcfs", settings, roles=HASTY if controlled else None).dispatch


def build(
    rng: random.Random, *, num_workers: int, make: Callable[[], Policy] | None = None
) -> DispatchedNode:
    """A node of that size. `make`: the policy of all of it, else a drawn one."""
    size = rng.choice([2, 4])
    alone = -(-(MODEL_LEN - 1) // size)
    group = paged(alone * rng.choice([1, 2, 6]) + rng.randrange(alone), size)
    limits = {"max_num_seqs": rng.choice([1, 2, 3, 8]), "max_batch_tokens": rng.randint(1, 40)}
    config = BatcherConfig(
        max_model_len=MODEL_LEN,
        depth=rng.randrange(3),
        enable_prefix_cache=rng.random() < 0.8,
        **limits,
    )
    drops, checks = rng.random() < 0.5, rng.random() < 0.8
    policies = [FCFS if rng.random() < 0.6 else contrary(rng) for _ in range(3)]
    if make is not None:
        policies = [make().batch for _ in range(3)]

    def start(node: MovingNode, worker: WorkerId) -> MovingWorker:
        return MovingWorker(
            worker,
            config,
            group=group,
            wires=node,
            policy=policies[worker % 3],
            role=roles[worker] if worker < num_workers else Role.MIXED,
            drops=drops,
            checks=checks,
        )

    controlled, balanced = rng.random() < 0.25, rng.random() < 0.25

    def slots() -> DispatchSlots:
        if make is not None:
            return make().dispatch
        return policy(controlled=controlled, balanced=balanced)

    roles = [rng.choice(LIKELY) for _ in range(num_workers)]
    return DispatchedNode(
        roles,
        group,
        start=start,
        model_len=MODEL_LEN,
        policy=slots,
        limits=limits,
        lease_seconds=rng.choice([0.05, 0.5, 10.0]),
        drain_seconds=rng.choice([0.02, 0.5, 2.0]),
        flip_seconds=rng.choice([0.05, 2.0]),
        park_seconds=rng.choice([0.1, 5.0]),
        move_pause=rng.choice([0.001, 0.2]),
    )


class Storm:
    """Everything at once, drawn by `rng`."""

    def __init__(
        self,
        node: DispatchedNode,
        rng: random.Random,
        *,
        deaths: float,
        dress: Callable[[Task], Task],
    ) -> None:
        self.node = node
        self.rng = rng
        self.deaths = deaths
        self.dress = dress
        self.num_tasks = 0

    def act(self) -> None:
        node, rng = self.node, self.rng
        worker = rng.choice(node.ids)
        shell = node.workers[worker]
        draw = rng.random()
        if draw < 0.2:
            while node.deliver_command(worker) and rng.random() < 0.7:
                pass
        elif draw < 0.42:
            while node.deliver_frame(worker) and rng.random() < 0.7:
                pass
        elif draw < 0.58:
            others = [id_ for id_ in node.ids if id_ != worker]
            if others:
                node.deliver_bell(worker, rng.choice(others))
        elif draw < 0.7 and shell is not None and shell.copies:
            fails = "the copier failed" if rng.random() < 0.05 else ""
            shell.advance(rng.randrange(99), rng.choice([1, 3, 1000]), fails)
        elif draw < 0.8 and shell is not None:
            node.step(shell)
        elif draw < 0.805:
            node.now += rng.choice([0.001, 0.05, 1.0])
        elif draw < 0.81 and shell is not None:
            shell.wake()
        elif draw < 0.83:
            node.wake_node()
        else:
            self._decide(worker)

    def _decide(self, worker: WorkerId) -> None:
        node, rng = self.node, self.rng
        draw = rng.random()
        if draw < self.deaths:
            node.kill(worker)
        elif node.can_start(worker):
            node.start(worker)
        elif draw < 0.2 and self.num_tasks < 60:
            node.arrive(self.dress(_task(rng, self.num_tasks, node.now)))
            self.num_tasks += 1
        elif draw < 0.22:
            self._ask(worker)
        elif draw < 0.24 and self.num_tasks:
            node.cancel(rng.randrange(self.num_tasks))

    def _ask(self, worker: WorkerId) -> None:
        node, rng = self.node, self.rng
        draw = rng.random()
        if draw < 0.5:
            some = rng.sample(node.ids, rng.randint(1, len(node.ids)))
            node.ask_roles([(each, rng.choice(ROLES)) for each in some])
        elif draw < 0.7:
            node.ask_park(worker)
        elif draw < 0.9:
            node.ask_wake(worker)
        elif len(node.ids) < 4:
            node.ask_worker(rng.choice(ROLES))


def storm(
    rng: random.Random,
    *,
    acts: int,
    deaths: float,
    poison: bool = False,
    make: Callable[[], Policy] | None = None,
    dress: Callable[[Task], Task] = lambda task: task,
) -> tuple[DispatchedNode, Counter[str]]:
    """A storm over a node with the policy of `make`; `dress` gives a task its budgets."""
    node = build(rng, num_workers=rng.choice([1, 2, 3, 3]), make=make)
    weather = Storm(node, rng, deaths=deaths, dress=dress)
    if poison:
        node.poison = rng.randrange(12)
    for _ in range(acts):
        weather.act()
    parked = [w for w, view in view_of(node).items() if view is WorkerState.PARKED]
    for worker in parked[: rng.randrange(2)]:
        node.ask_wake(worker)
    node.finish()
    node.check_replay()
    most = node.config.poison_deaths + node.config.max_trials + node.config.spared_deaths
    assert node.poisoned_deaths <= most, "it may go on killing"
    guilty = {id_ for id_, end in node.ended.items() if end.error is ErrorKind.POISON}
    if not deaths:
        assert guilty <= {node.poison}, "an innocent was convicted"
    return node, Counter(node.counts)


def view_of(node: DispatchedNode) -> dict[WorkerId, WorkerState]:
    assert node.core is not None
    return {worker: view.state for worker, view in node.core.view.workers.items()}


storms = given(
    rng=st.randoms(use_true_random=False),
    acts=st.integers(1, 600),
    deaths=st.sampled_from([0.0, 0.0, 0.02, 0.1]),
    poison=st.booleans(),
)
quietly = [HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=40, deadline=None, suppress_health_check=quietly)
@storms
def test_R1_R5_R9_R12_R28_whatever_is_decided_no_answer_changes(
    rng: random.Random, acts: int, deaths: float, poison: bool
) -> None:
    storm(rng, acts=acts, deaths=deaths, poison=poison)


def test_R12_storms_really_move_flip_park_and_kill() -> None:
    total: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for seed in range(30):
        rng = random.Random(seed)
        node, counts = storm(rng, acts=900, deaths=0.02 if seed % 2 else 0.0)
        total += counts
        kinds += Counter(decided.kind for decided in node.decisions.values())
    assert total["pulled"] > 30, total
    for what in ("killed", "resumed", "cancelled", "answered done", "answered rolled_back"):
        assert total[what] > 3, (what, total)
    for kind in ("flip", "none", "rebalance", "park", "wake", "fallback", "add"):
        assert kinds[kind] > 2, (kind, kinds)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_R1_R5_R9_R12_R28_storms_at_length() -> None:
    for seed in range(3_000):
        rng = random.Random(2_000_000 + seed)
        storm(
            rng,
            acts=rng.choice([100, 600, 2000]),
            deaths=rng.choice([0.0, 0.0, 0.02, 0.1]),
            poison=rng.random() < 0.3,
        )
