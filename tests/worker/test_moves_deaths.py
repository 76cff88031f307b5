"""Workers that die in a move, at every step of it: every answer is whole and served once (R4, R5).

Real processes. The rig does with their requests what the Dispatcher would."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from appliance.core.messages import CacheChanged, PrefixPulled, StepReported
from appliance.core.payload import Sampling
from tests.worker.moves_ends import Slabs, fault, paced_start
from tests.worker.moves_rig import GREEDY, MovesNode, names

pytestmark = pytest.mark.procs

LONG = list(range(100, 300))
SEEDED = Sampling(temperature=1.0, seed=5, eos_token_ids=(2,), ignore_eos=True)
NodeMaker = Callable[..., MovesNode]
SOURCE, TARGET = 0, 1
POINTS = [
    ("move.pull", TARGET, 1),
    ("move.asked", TARGET, 1),
    ("move.before_copy", TARGET, 1),
    ("move.after_copy", TARGET, 1),
    ("move.before_pulled", TARGET, 1),
    ("move.after_pulled", TARGET, 1),
    ("move.migrate", SOURCE, 1),
    ("move.offered", SOURCE, 1),
    ("move.before_prefilled", SOURCE, 1),
    ("move.before_final", SOURCE, 1),
    ("move.after_final", SOURCE, 1),
    ("move.release", SOURCE, 1),
]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeMaker]:
    made: list[MovesNode] = []

    def make(num_workers: int = 2, **changes: object) -> MovesNode:
        start = paced_start(profile="fixed-2ms", **changes)
        slabs = Slabs(start, block_bytes=8 * start.block_tokens)
        made.append(MovesNode(slabs, tmp_path, processes=True))
        for worker in range(num_workers):
            made[-1].add(worker)
        made[-1].recover = True
        return made[-1].ready()

    yield make
    for each in made:
        each.close()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, list[int]]]:
    """What one undisturbed worker answers, in a thread."""
    start = paced_start()
    one = MovesNode(Slabs(start, block_bytes=128), tmp_path_factory.mktemp("one"))
    one.add(0)
    one.ready()
    ask(one, worker=0)
    one.finish()
    yield {number: answer.tokens for number, answer in one.answers.items()}
    one.close()


def ask(node: MovesNode, *, worker: int) -> None:
    for number in (1, 2, 3, 4):
        sampling = GREEDY if number % 2 else SEEDED
        prompt = LONG[: 60 * number]
        node.assign(number, worker, prompt, sampling=sampling, max_tokens=60 + number)


def check(node: MovesNode, expected: dict[int, Sequence[int]], dead: int) -> None:
    """All answers are whole, the worker died, and the others hold nothing."""
    node.finish()
    node.until(lambda: node.ends[dead].gone).settle()
    for number, answer in node.answers.items():
        assert answer.tokens == expected[number], f"request {number}: {node.story()}"


@pytest.mark.parametrize(("point", "worker", "nth"), POINTS, ids=[p for p, _, _ in POINTS])
def test_r4_worker_killed_in_a_move_costs_no_answer_a_token(
    node: NodeMaker, expected: dict[int, Sequence[int]], point: str, worker: int, nth: int
) -> None:
    two = node(faults=(fault(point, "kill", worker, nth=nth),))
    ask(two, worker=SOURCE)
    for number in (1, 2, 3, 4):
        two.move(number, target=TARGET, live=number > 2)
    check(two, expected, dead=worker)


@pytest.mark.slow
@pytest.mark.parametrize("action", ["stop", "raise"])
@pytest.mark.parametrize(("point", "worker", "nth"), POINTS, ids=[p for p, _, _ in POINTS])
def test_r4_worker_stopped_or_broken_in_a_move_costs_no_answer_a_token(
    node: NodeMaker,
    expected: dict[int, Sequence[int]],
    point: str,
    worker: int,
    nth: int,
    action: str,
) -> None:
    two = node(faults=(fault(point, action, worker, nth=nth),))
    ask(two, worker=SOURCE)
    for number in (1, 2, 3, 4):
        two.move(number, target=TARGET, live=number > 2)
    check(two, expected, dead=worker)


def test_r5_successor_inherits_the_complete_blocks(node: NodeMaker) -> None:
    two = node()
    two.assign(1, 0, LONG)
    two.finish(1)
    two.assign(2, 0, LONG[:50], max_tokens=400)  # half-written blocks when it dies
    two.emitted(2, 5).kill(0)
    two.until(lambda: two.ends[0].gone)
    two.add(0, epoch=2)
    two.ready(0, 1)
    inherited = {
        name
        for report in two.of(CacheChanged, 0)
        if isinstance(report, CacheChanged)
        for name in report.added
    }
    assert set(names(LONG)) <= inherited
    steps = len(two.of(StepReported, 0))
    two.assign(3, 0, LONG)
    two.finish(3)
    computed = [s for s in two.of(StepReported, 0)[steps:] if isinstance(s, StepReported)]
    assert sum(step.prefill_tokens for step in computed) == len(LONG) - 12 * 16
    assert two.answers[3].tokens == two.answers[1].tokens
    two.finish(2)


@pytest.mark.parametrize("state", ["stopped", "dead"])
def test_prefix_is_fetched_from_a_peer_that_cannot_help(node: NodeMaker, state: str) -> None:
    two = node()
    two.recover = False
    two.assign(1, 0, LONG)
    two.finish(1)
    if state == "dead":
        two.kill(0)
        two.until(lambda: two.ends[0].gone)
    else:
        two.stop(0)
    two.assign(2, 1, LONG, pull_from=0)
    two.finish(2)
    (report,) = two.of(PrefixPulled)
    assert isinstance(report, PrefixPulled)
    assert (report.wanted, report.num_blocks, report.reason) == (12, 12, "")
    assert two.answers[2].tokens == two.answers[1].tokens


def test_link_is_made_anew_for_a_successor(node: NodeMaker) -> None:
    two = node()
    two.kill(1)
    two.until(lambda: two.ends[1].gone)
    two.add(1, epoch=2)
    two.ready()
    two.assign(1, 0, LONG)
    two.move(1, target=1)
    two.finish(1)
    assert two.answers[1].served_by == [0, 1]
