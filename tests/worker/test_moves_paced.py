"""Sequences that pass from worker to worker give the tokens and the text of those that stay.

Paced workers in threads: real sockets, pools, doorbells and copies. Every block is read back by its
next owner (`validate`), so a block that arrived wrong ends the worker."""

import mmap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from appliance.core.kv_layout import INDEX_HEADER_BYTES, index_offset
from appliance.core.messages import (
    Aborted,
    CacheChanged,
    KvPulled,
    LinkDown,
    PrefixPulled,
    PullFailed,
    Refused,
    Released,
    StepReported,
)
from appliance.core.payload import Sampling
from appliance.core.types import BatcherConfig, FinishReason, Slo
from appliance.worker.main import OpenedEngine
from appliance.worker.paced_engine import PacedEngine
from appliance.worker.transfer import SharedPool
from tests.worker.moves_ends import MODEL, Slabs, fault, paced_start
from tests.worker.moves_rig import GREEDY, MovesNode, names

NodeMaker = Callable[..., MovesNode]
LONG = list(range(100, 300))
SEEDED = Sampling(temperature=1.0, seed=7, eos_token_ids=(2,), ignore_eos=True)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeMaker]:
    """Makes nodes of paced workers in threads; none of them may fail."""
    made: list[MovesNode] = []

    def make(num_workers: int = 2, *, wrap: object = None, **changes: object) -> MovesNode:
        start = paced_start(**changes)
        made.append(MovesNode(Slabs(start, block_bytes=8 * start.block_tokens), tmp_path))
        for worker in range(num_workers):
            made[-1].add(worker, **({} if wrap is None else {"wrap": wrap}))
        return made[-1].ready()

    yield make
    for each in made:
        each.close()
        assert [end.error for end in each.ends.values()] == [None] * len(each.ends)


def alone(node: NodeMaker, sampling: Sampling, *, max_tokens: int = 40) -> tuple[list[int], str]:
    """The answer to `LONG` of a worker that keeps it."""
    one = node(1)
    one.assign(1, 0, LONG, sampling=sampling, max_tokens=max_tokens)
    answer = one.finish(1).answers[1]
    return answer.tokens, answer.text


def pulled(node: MovesNode) -> list[KvPulled]:
    return [report for report in node.of(KvPulled) if isinstance(report, KvPulled)]


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_r12_handed_off_answer_is_that_of_one_worker(node: NodeMaker, sampling: Sampling) -> None:
    tokens, text = alone(node, sampling)
    two = node()
    two.assign(1, 0, LONG, sampling=sampling)
    two.move(1, target=1)
    two.finish(1).settle()
    answer = two.answers[1]
    assert (answer.tokens, answer.text) == (tokens, text)
    assert answer.served_by == [0, 1]
    (report,) = pulled(two)
    assert report.num_tokens == len(LONG) + report.emitted_tokens - 1
    assert report.path == "shared memory"
    assert len(two.of(Released)) == 1


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_r12_answer_that_migrates_in_the_middle_is_that_of_one_worker(
    node: NodeMaker, depth: int
) -> None:
    tokens, text = alone(node, SEEDED, max_tokens=120)
    bounds = BatcherConfig(max_model_len=1024, max_batch_tokens=128, depth=depth)
    two = node(2, batcher=bounds)
    two.assign(1, 0, LONG, sampling=SEEDED, max_tokens=120)
    two.emitted(1, 20).move(1, target=1, live=True)
    two.until(lambda: two.answers[1].owner == 1).emitted(1, 70).move(1, target=0, live=True)
    two.finish(1).settle()
    assert (two.answers[1].tokens, two.answers[1].text) == (tokens, text)
    assert two.answers[1].served_by == [0, 1, 0]


def test_r12_many_answers_wander_among_three_workers(node: NodeMaker) -> None:
    prompts = {n: [*range(50 + n, 90 + 17 * n)] for n in range(1, 13)}

    def ask(each: MovesNode) -> MovesNode:
        for n, prompt in prompts.items():
            sampling = Sampling(temperature=1.0, seed=n, eos_token_ids=(2,), ignore_eos=True)
            each.assign(n, n % len(each.ends), prompt, sampling=sampling, max_tokens=60 + n)
        return each

    one = ask(node(1)).finish()
    three = ask(node(3, profile="fixed-2ms"))
    for n in prompts:
        three.move(n, target=(n + 1) % 3, live=bool(n % 2))
    moved = [0]

    def onward(_worker: int, report: object) -> None:
        """Whoever has arrived goes on to the next worker, some times."""
        if isinstance(report, KvPulled) and report.emitted_tokens < 45:
            moved[0] += 1
            three.move(report.request_id, target=(report.worker + 1) % 3, live=True)

    three.hook = onward
    three.finish().settle()
    assert moved[0] > 12
    for n in prompts:
        assert three.answers[n].tokens == one.answers[n].tokens
        assert three.answers[n].text == one.answers[n].text


def scripted(ids: Sequence[int]) -> Callable[[OpenedEngine], OpenedEngine]:
    """Paced workers that say these tokens; their KV is what it always is."""

    def wrap(opened: OpenedEngine) -> OpenedEngine:
        assert isinstance(opened.engine, PacedEngine)
        opened.engine._next = lambda sequence: (ids[sequence.emitted], "")  # type: ignore[method-assign]
        return opened

    return wrap


@pytest.mark.parametrize(
    ("text", "stop", "expected", "reason"),
    [
        ("🎉🎉 héllo wörld 🎉", (), "🎉🎉 héllo wörld 🎉", FinishReason.LENGTH),
        ("one two END three", (" END",), "one two", FinishReason.STOP),
        ("one two three", ("one two four",), "one two three", FinishReason.LENGTH),
        ("so STOP so", ("STOP so!", "so S"), "", FinishReason.STOP),
    ],
)
def test_text_that_was_kept_back_at_the_source_comes_out_once(
    node: NodeMaker, text: str, stop: tuple[str, ...], expected: str, reason: FinishReason
) -> None:
    """The answer moves at each of its tokens, one move after the other."""
    ids = (
        Tokenizer.from_file(str(MODEL / "tokenizer.json"))
        .encode(text, add_special_tokens=False)
        .ids
    )
    two = node(2, wrap=scripted([*ids, *ids]), profile="fixed-3ms")
    sampling = Sampling(temperature=0.0, stop=stop, eos_token_ids=(2,), ignore_eos=True)

    def onward(_worker: int, report: object) -> None:
        if isinstance(report, KvPulled):
            two.move(1, target=1 - report.worker)

    two.hook = onward
    two.assign(1, 0, LONG, sampling=sampling, max_tokens=len(ids))
    two.move(1, target=1)
    two.finish(1)
    assert (two.answers[1].text, two.answers[1].reason) == (expected, reason)
    assert len(pulled(two)) >= min(3, len(two.answers[1].tokens) - 1)


def test_r12_answer_keeps_to_its_grammar_across_workers(node: NodeMaker) -> None:
    grammar = (
        'start: "{" pair ("," pair)* "}"\npair: "\\"" /[a-z]{3,9}/ "\\"" ":" /[1-9][0-9]{0,5}/\n'
    )
    sampling = Sampling(temperature=0.0, grammar=grammar, eos_token_ids=(2,))
    tokens, text = alone(node, sampling, max_tokens=200)
    two = node()
    two.assign(1, 0, LONG, sampling=sampling, max_tokens=200)
    two.move(1, target=1)
    two.until(lambda: bool(pulled(two)) or two.answers[1].reason is not None)
    two.finish(1)
    assert (two.answers[1].tokens, two.answers[1].text) == (tokens, text)
    assert text.startswith('{"')
    assert two.answers[1].served_by == [0, 1]


def test_blocks_that_the_target_has_are_not_copied(node: NodeMaker) -> None:
    two = node()
    two.assign(1, 1, LONG, max_tokens=4)
    two.finish(1)
    two.assign(2, 0, LONG, max_tokens=20)
    two.move(2, target=1)
    two.finish(2)
    (report,) = pulled(two)
    full = len(LONG) // 16 * 16
    assert report.num_tokens == len(LONG) + report.emitted_tokens - 1 - full
    assert report.num_bytes == 16 * 8


def test_target_serves_its_own_while_it_takes_over(node: NodeMaker) -> None:
    two = node(profile="fixed-2ms")
    two.assign(1, 1, LONG[:40], max_tokens=150)
    two.emitted(1, 5)
    for n in range(2, 6):
        two.assign(n, 0, LONG[: 30 * n], max_tokens=60)
        two.move(n, target=1, live=True)
    two.finish().settle()
    assert len(pulled(two)) == 4
    assert {tuple(two.answers[n].served_by) for n in range(2, 6)} == {(0, 1)}


# --- what goes wrong ------------------------------------------------------------------------------


def index_of(node: MovesNode, worker: int) -> np.ndarray:
    """Both columns of a pool's index, writable: [generations or names, block]."""
    start = node.slabs.start
    offset = index_offset(num_blocks=start.num_blocks, block_bytes=node.slabs.block_bytes)
    size = INDEX_HEADER_BYTES + 16 * start.num_blocks
    memory = mmap.mmap(node.slabs.pool(worker), size, offset=offset)
    columns = np.frombuffer(memory, np.uint64)[INDEX_HEADER_BYTES // 8 :]
    return columns.reshape(2, start.num_blocks)


def goes_on_at_the_source(two: MovesNode, move: int, reason: str) -> None:
    """The move failed for this reason, nothing of it is used, and the answer is whole."""
    two.until(lambda: bool(two.failures(move)))
    assert reason in two.failures(move)[0]
    two.resume(move)
    two.finish(1).settle()
    assert two.answers[1].served_by == [0]
    assert not pulled(two)
    assert not [c for c in two.of(CacheChanged, 1) if isinstance(c, CacheChanged) and c.added]


def test_r13_block_of_another_generation_is_not_used(node: NodeMaker) -> None:
    tokens, _ = alone(node, GREEDY)
    two = node()
    two.assign(1, 0, LONG)
    two.emitted(1, 2)
    index_of(two, 0)[0] += np.uint64(1)
    move = two.move(1, target=1, live=True)
    goes_on_at_the_source(two, move, "was given to other content before it was copied")
    assert two.answers[1].tokens == tokens


def test_r13_block_that_arrives_changed_is_not_used(
    node: NodeMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, _ = alone(node, GREEDY)
    two = node()
    real = SharedPool.copy

    def flip(pool: SharedPool, sources: Sequence[int], targets: Sequence[int]) -> Iterator[None]:
        yield from real(pool, sources, targets)
        pool._ours[targets[-1] * pool.block_bytes] ^= 1

    monkeypatch.setattr(SharedPool, "copy", flip)
    two.assign(1, 0, LONG)
    move = two.move(1, target=1)
    goes_on_at_the_source(two, move, "arrived with another checksum")
    assert two.answers[1].tokens == tokens


@pytest.mark.parametrize("point", ["move.before_copy", "move.after_copy"])
def test_copy_that_fails_leaves_the_answer_at_the_source(node: NodeMaker, point: str) -> None:
    two = node(faults=(fault(point, "refuse", 1, repeat=True),))
    two.assign(1, 0, LONG)
    move = two.move(1, target=1)
    goes_on_at_the_source(two, move, f"injected at {point}")


@pytest.mark.parametrize(
    ("point", "who", "command"), [("move.pull", 1, "Pull"), ("move.migrate", 0, "Migrate")]
)
def test_refused_order_leaves_the_answer_at_the_source(
    node: NodeMaker, point: str, who: int, command: str
) -> None:
    two = node(faults=(fault(point, "refuse", who),))
    two.assign(1, 0, LONG)
    two.move(1, target=1)
    two.finish(1)
    (refused,) = two.of(Refused)
    assert isinstance(refused, Refused)
    assert (refused.worker, refused.command, refused.request_id) == (who, command, 1)
    assert two.answers[1].served_by == [0]


def test_state_that_does_not_fit_is_refused_by_name(node: NodeMaker) -> None:
    two = node()
    two.assign(1, 0, LONG, max_tokens=60)
    two.answers[1].state = two.answers[1].state.__class__(prompt=b"\0" * 8, sampling=GREEDY)
    two.move(1, target=1)
    two.until(lambda: bool(two.of(Refused)))
    (refused,) = two.of(Refused)
    assert isinstance(refused, Refused)
    assert "prompt has 8 bytes, 200 ids" in refused.reason
    two.finish(1)


def test_pull_from_a_stranger_fails_by_name(node: NodeMaker) -> None:
    one = node(1)
    one.assign(1, 7, LONG)  # nobody is there to hear it
    move = one.move(1, target=0)
    one.until(lambda: bool(one.failures(move))).settle()
    assert one.failures(move) == ["the source is gone"]


def test_lease_ends_by_itself_when_nobody_releases_it(node: NodeMaker) -> None:
    two = node(faults=(fault("move.before_copy", "delay", 1, seconds=1.0),))
    two.release = False
    two.assign(1, 0, LONG)
    two.move(1, target=1, lease_seconds=0.2)
    two.until(lambda: bool(two.of(Released)))
    (released,) = two.of(Released)
    assert isinstance(released, Released)
    assert released.expired
    two.until(lambda: bool(two.of(PullFailed)) or two.answers[1].reason is not None)


@pytest.mark.parametrize("delay", [0.0, 0.3])
def test_cancelled_in_a_move_leaves_nothing_behind(node: NodeMaker, delay: float) -> None:
    """Also while blocks are being copied: those come back when nobody writes them any more."""
    two = node(faults=(fault("move.before_copy", "delay", 1, seconds=delay),))
    two.assign(1, 0, LONG, max_tokens=400)
    two.emitted(1, 3).move(1, target=1, live=True)
    two.pump(0.1)
    for worker in (0, 1):
        two.abort(1, worker)
    two.until(lambda: len(two.of(Aborted)) == 2).settle()
    two.assign(2, 1, LONG)
    two.finish(2)


# --- cached blocks of a peer ----------------------------------------------------------------------


def fetched(node: MovesNode) -> PrefixPulled:
    (report,) = node.of(PrefixPulled)
    assert isinstance(report, PrefixPulled)
    return report


def prefill_tokens(node: MovesNode, worker: int) -> int:
    steps = node.of(StepReported, worker)
    return sum(step.prefill_tokens for step in steps if isinstance(step, StepReported))


def test_prefix_of_a_peer_is_copied_and_not_computed(node: NodeMaker) -> None:
    two = node()
    two.assign(1, 0, LONG)
    two.finish(1)
    two.assign(2, 1, LONG, pull_from=0)
    two.finish(2).settle()
    report = fetched(two)
    assert (report.wanted, report.num_blocks, report.reason) == (12, 12, "")
    assert report.path == "shared memory"
    assert prefill_tokens(two, 1) == len(LONG) - 12 * 16
    assert two.answers[2].tokens == two.answers[1].tokens
    assert two.answers[2].cached == 12 * 16


def test_generated_blocks_are_fetched_like_those_of_a_prompt(node: NodeMaker) -> None:
    two = node()
    two.assign(1, 0, LONG, max_tokens=60)
    two.finish(1)
    turn = [*LONG, *two.answers[1].tokens, 50, 51, 52]
    two.assign(2, 1, turn, pull_from=0)
    two.finish(2)
    assert fetched(two).num_blocks == (len(LONG) + 59) // 16
    assert prefill_tokens(two, 1) <= 3 + 1 + 16


def test_r13_fetched_block_that_changed_is_computed(node: NodeMaker) -> None:
    two = node(faults=(fault("fetch.after_copy", "delay", 1, seconds=0.5),))
    two.assign(1, 0, LONG)
    two.finish(1)
    two.assign(2, 1, LONG, pull_from=0)
    time.sleep(0.2)
    index = index_of(two, 0)
    block = int(np.flatnonzero(index[1] == np.uint64(names(LONG)[5]))[0])
    index[0, block] += np.uint64(1)
    two.finish(2)
    assert fetched(two).num_blocks == 5
    assert "changed while they were copied" in fetched(two).reason
    assert two.answers[2].tokens == two.answers[1].tokens


def test_prefix_is_fetched_from_a_peer_in_a_long_step(node: NodeMaker) -> None:
    two = node(faults=(fault("worker.before_step", "delay", 0, seconds=3.0, token=777),))
    two.assign(1, 0, LONG)
    two.finish(1)
    two.assign(3, 0, [777] * 20)
    began = time.monotonic()
    two.assign(2, 1, LONG, pull_from=0)
    two.finish(2)
    assert fetched(two).num_blocks == 12
    assert time.monotonic() - began < 2.5
    two.finish(3)


@pytest.mark.parametrize("peer", [7, -1])
def test_prefix_of_a_peer_that_is_not_there_is_computed(node: NodeMaker, peer: int) -> None:
    one = node(1)
    one.assign(1, 0, LONG, pull_from=peer)
    one.finish(1)
    assert (fetched(one).num_blocks, fetched(one).path) == (0, "none")
    assert "is not here" in fetched(one).reason


# --- links ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", ["link.up", "link.probe"])
def test_link_that_cannot_be_made_is_reported_by_name(tmp_path: Path, point: str) -> None:
    start = paced_start(faults=(fault(point, "refuse", 1),))
    two = MovesNode(Slabs(start, block_bytes=128), tmp_path)
    for worker in (0, 1):
        two.add(worker)
    two.until(lambda: bool(two.of(LinkDown, 1)))
    (down,) = two.of(LinkDown, 1)
    assert isinstance(down, LinkDown)
    assert (down.peer, down.reason) == (0, f"injected at {point}")
    two.assign(1, 0, LONG)
    two.finish(1)
    two.close()


def test_slack_goes_with_a_copy(node: NodeMaker) -> None:
    two = node()
    two.assign(1, 0, LONG, slo=Slo(ttft=0.5, tpot=0.05))
    two.move(1, target=1)
    two.finish(1)
    assert two.answers[1].served_by == [0, 1]
