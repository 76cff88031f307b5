"""A worker with a host tier gets back what its pool had to give up: copied, not computed."""

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from appliance.core.host_tier import Spill
from appliance.core.messages import HOST_TIER, CacheChanged, PrefixPulled, StepReported
from appliance.core.model_shape import parse_config, slab_bytes
from appliance.core.types import BatcherConfig
from appliance.worker.host_memory import HostMemory
from tests.worker.moves_ends import MODEL, Slabs, fault, paced_start
from tests.worker.moves_rig import MovesNode, names

FIRST = list(range(100, 300))
SECOND = list(range(400, 630))
NodeMaker = Callable[..., MovesNode]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeMaker]:
    """Makes single workers whose pool holds one conversation at a time."""
    made: list[MovesNode] = []

    def make(**changes: object) -> MovesNode:
        start = paced_start(num_blocks=20, **changes)
        made.append(MovesNode(Slabs(start, block_bytes=8 * start.block_tokens), tmp_path))
        return made[-1].add(0).ready()

    yield make
    for each in made:
        each.close()
        assert [end.error for end in each.ends.values()] == [None] * len(each.ends)


def prefill_tokens(node: MovesNode) -> int:
    steps = [step for step in node.of(StepReported) if isinstance(step, StepReported)]
    return sum(step.prefill_tokens for step in steps)


def fetched(node: MovesNode) -> PrefixPulled:
    report = node.of(PrefixPulled)[-1]
    assert isinstance(report, PrefixPulled)
    return report


def converse(node: MovesNode, *, pull_from: int | None) -> tuple[int, list[int], list[int]]:
    """Two conversations that evict each other, then a second turn of the first. Tokens computed of
    that prompt; the prompt, its answer."""
    node.assign(1, 0, FIRST)
    node.finish(1)
    node.assign(2, 0, SECOND, max_tokens=90)
    node.finish(2)
    before = prefill_tokens(node)
    turn = [*FIRST, *node.answers[1].tokens, 50, 51, 52]
    node.assign(3, 0, turn, pull_from=pull_from)
    node.finish(3)
    return prefill_tokens(node) - before, turn, node.answers[3].tokens


def test_second_turn_computes_new_tokens_only(node: NodeMaker) -> None:
    computed, turn, answer = converse(node(), pull_from=None)
    assert computed == len(turn), "without a tier all of it is computed again"
    with_tier = node(host_blocks=64)
    fewer, _, same = converse(with_tier, pull_from=HOST_TIER)
    report = fetched(with_tier)
    kept = (len(turn) - 3 - 1) // 16
    assert (report.source, report.path, report.reason) == (HOST_TIER, "host memory", "")
    assert report.num_blocks == report.wanted > 10
    assert fewer == len(turn) - 16 * kept
    assert same == answer
    assert with_tier.answers[3].cached == 16 * kept


def test_tier_says_what_it_keeps(node: NodeMaker) -> None:
    one = node(host_blocks=64)
    converse(one, pull_from=HOST_TIER)
    changes = [each for each in one.of(CacheChanged) if isinstance(each, CacheChanged)]
    kept = {name for each in changes for name in each.tier_added}
    assert set(names(FIRST)) <= kept
    assert not [each for each in changes if each.tier_removed]


def test_tier_stays_within_its_bound(node: NodeMaker) -> None:
    one = node(host_blocks=8)
    computed, turn, _ = converse(one, pull_from=HOST_TIER)
    assert fetched(one).num_blocks <= 8
    assert computed >= len(turn) - 8 * 16 - 15
    kept: set[int] = set()
    for each in one.of(CacheChanged):
        assert isinstance(each, CacheChanged)
        kept = (kept - set(each.tier_removed)) | set(each.tier_added)
    assert 0 < len(kept) <= 8


def test_slots_that_are_read_slowly_are_not_reused(node: NodeMaker) -> None:
    """While the copy is held up another conversation needs all the room there is."""
    slow = fault("fetch.after_copy", "delay", 0, seconds=0.4)
    one = node(host_blocks=16, faults=(slow,))
    one.assign(1, 0, FIRST)
    one.finish(1)
    one.assign(2, 0, SECOND, max_tokens=90)
    one.finish(2)
    one.assign(3, 0, FIRST, pull_from=HOST_TIER)
    one.assign(4, 0, list(range(700, 760)), max_tokens=20)
    one.finish(3, 4)
    assert fetched(one).reason == ""
    assert one.answers[3].tokens == one.answers[1].tokens


def test_r13_what_was_replaced_while_it_was_copied_is_noticed() -> None:
    own = np.arange(4 * 64, dtype=np.uint8)
    memory = HostMemory(memoryview(own), num_blocks=4, block_bytes=64, slots=2)
    expected = own[2 * 64 : 3 * 64].copy()
    memory.keep([Spill(block=2, slot=1, content=77, generation=1)])
    blocks, generations = memory.pool.find([77, 78])
    assert blocks == [1]
    own[:] = 0
    assert list(memory.pool.copy(blocks, [3])) == []
    assert np.array_equal(own[3 * 64 :], expected)
    assert memory.pool.generations(blocks) == generations
    memory.keep([Spill(block=0, slot=1, content=79, generation=2)])
    assert memory.pool.generations(blocks) != generations
    assert memory.pool.find([77]) == ([], [])
    assert memory.pool.find([79])[0] == [1]


def test_r12_answers_from_host_memory_are_those_that_were_computed(tmp_path: Path) -> None:
    """The bundled model; what was evicted and came back gives the same tokens."""
    shape = parse_config(msgspec.json.decode((MODEL / "config.json").read_bytes()))
    config = BatcherConfig(max_model_len=320, max_batch_tokens=64)
    start = paced_start(engine="torch", has_weights_fd=True, num_blocks=20, batcher=config)
    size = shape.kv_block_bytes("float32", block_tokens=start.block_tokens)
    answers: list[list[int]] = []
    for host_blocks, source in ((0, None), (64, HOST_TIER)):
        slabs = Slabs(start, block_bytes=size, weight_bytes=slab_bytes(shape, "float32"))
        one = MovesNode(slabs, tmp_path)
        one.add(0, load_weights=True, host_blocks=host_blocks).ready()
        computed, turn, answer = converse(one, pull_from=source)
        one.close()
        assert [end.error for end in one.ends.values()] == [None]
        answers.append(answer)
        assert (computed == len(turn)) is (source is None)
    assert answers[0] == answers[1]
