"""The whole node: whatever dies, is cancelled or runs short, every request ends once, and with the
tokens of an undisturbed run (R1, R2, R5, R12)."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.core.dispatcher import Dispatcher
from appliance.core.journal import JournalHeader, replay
from appliance.core.types import CacheGroupSpec, ErrorKind, RequestId
from appliance.policy import make_policy
from tests.core.toy_worker import Task, answer
from tests.core.whole_node import Setting, WholeNode

FCFS = make_policy("fcfs", {})
STEM = tuple(range(1, 9))


@st.composite
def tasks(draw: st.DrawFn) -> list[Task]:
    """Up to a dozen requests, many with a common beginning, some in n > 1 groups."""
    found: list[Task] = []
    for _ in range(draw(st.integers(1, 8))):
        shared = draw(st.integers(0, len(STEM)))
        own = draw(st.lists(st.integers(0, 30), min_size=1, max_size=6))
        arrived = draw(st.sampled_from([0.0, 0.0, 0.04, 0.05, 0.1, 0.2]))
        copies = draw(st.sampled_from([1, 1, 1, 3]))
        leader = len(found) + 1
        for copy in range(copies):
            found.append(
                Task(
                    id=len(found) + 1,
                    prompt=(*STEM[:shared], *own),
                    max_tokens=draw(st.integers(1, 10)),
                    seed=copy,
                    stop_every=draw(st.sampled_from([0, 6])),
                    group=leader if copies > 1 else None,
                    arrived=arrived,
                )
            )
    return found


nodes = st.builds(
    Setting,
    policy=st.just(FCFS),
    num_workers=st.integers(1, 3),
    depth=st.integers(0, 2),
    max_num_seqs=st.integers(1, 4),
    max_batch_tokens=st.integers(4, 20),
    groups=st.builds(
        lambda size, blocks: (CacheGroupSpec(num_blocks=blocks, block_tokens=size),),
        st.sampled_from([2, 4]),
        st.integers(14, 40),
    ),
)
times = st.floats(0.03, 0.5)
kills = st.lists(st.tuples(st.integers(0, 2), times), max_size=5)
cancels = st.lists(st.tuples(st.integers(1, 20), times), max_size=3)


def fresh(header: JournalHeader) -> Dispatcher:
    policy = make_policy(header.policy, header.settings, roles=header.roles)
    return Dispatcher(header.config, workers=header.workers, policy=policy.dispatch)


def check(
    setting: Setting,
    work: list[Task],
    *,
    kills: list[tuple[int, float]],
    cancels: list[tuple[int, float]],
) -> WholeNode:
    node = WholeNode(setting)
    for task in work:
        node.submit(task)
    for worker, at in kills:
        node.kill(worker, at)
    for number, at in cancels:
        node.cancel(number, at)
    node.run()
    assert not node.rejected
    cancelled = {number for number, _ in cancels}
    for task in work:
        number = RequestId(task.id)
        end = node.ended[number]
        tokens, reason = answer(task, setting.max_model_len)
        if end.error is None:
            assert node.tokens[number] == tokens, "another answer than undisturbed"
            assert end.reason is reason
        else:
            assert node.tokens[number] == tokens[: len(node.tokens[number])]
            if end.error is ErrorKind.CANCELLED:
                assert task.id in cancelled
            else:
                assert end.error is ErrorKind.POISON
                assert len(kills) > 2
    assert replay(node.journal.header, node.journal.records(), make=fresh) == len(node.journal)
    return node


def test_R5_a_killed_workers_streams_are_whole() -> None:
    setting = Setting(
        policy=FCFS,
        groups=(CacheGroupSpec(num_blocks=64, block_tokens=4),),
        max_num_seqs=8,
        max_batch_tokens=32,
    )
    work = [Task(id=n, prompt=(*STEM, n, n + 1), max_tokens=30, seed=n) for n in range(1, 17)]
    node = check(setting, work, kills=[(0, 0.15)], cancels=[])
    assert all(end.error is None for end in node.ended.values())
    resumed = [
        entry["emitted"]
        for task in work
        for entry in node.journal.story(RequestId(task.id))
        if entry["what"] == "Assign" and entry["emitted"]
    ]
    assert resumed, "nobody had to go on in the middle of an answer"


def test_R27_a_poison_request_is_found_and_the_answers_of_the_others_are_whole() -> None:
    """Every worker that computes request 5 dies of it."""
    setting = Setting(
        policy=FCFS,
        groups=(CacheGroupSpec(num_blocks=64, block_tokens=4),),
        num_workers=4,
        max_num_seqs=8,
    )
    work = [Task(id=n, prompt=(*STEM, n), max_tokens=12, seed=n) for n in range(1, 21)]
    node = WholeNode(setting)
    for task in work:
        node.submit(task)
    node.poison = RequestId(5)
    node.run()
    failed = {number: end.error for number, end in node.ended.items() if end.error is not None}
    assert failed == {5: ErrorKind.POISON}
    for task in work:
        if task.id != 5:
            assert node.tokens[RequestId(task.id)] == answer(task)[0]


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(nodes, tasks(), kills, cancels)
def test_every_request_ends_once_with_the_tokens_of_an_undisturbed_run(
    setting: Setting,
    work: list[Task],
    kills: list[tuple[int, float]],
    cancels: list[tuple[int, float]],
) -> None:
    check(setting, work, kills=kills, cancels=cancels)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=5000, deadline=None, suppress_health_check=list(HealthCheck))
@given(nodes, tasks(), kills, cancels)
def test_every_request_ends_once_with_the_tokens_of_an_undisturbed_run_often(
    setting: Setting,
    work: list[Task],
    kills: list[tuple[int, float]],
    cancels: list[tuple[int, float]],
) -> None:
    check(setting, work, kills=kills, cancels=cancels)
