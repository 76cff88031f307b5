"""Sequences that pass from worker to worker give the tokens and the text of those that stay.

Paced workers: real sockets, pools, doorbells and copies; every block is read back by its next owner
(`validate`), so a block that arrived wrong ends the worker."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from appliance.core.messages import KvPulled, Released
from appliance.core.payload import Sampling
from tests.worker.moves_rig import GREEDY, MovesNode, Slabs, paced_start

NodeMaker = Callable[..., MovesNode]
LONG = list(range(100, 300))
SEEDED = Sampling(temperature=1.0, seed=7, eos_token_ids=(2,))


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeMaker]:
    """Makes nodes of paced workers in threads; at the end nobody holds a block."""
    made: list[MovesNode] = []

    def make(num_workers: int = 2, **changes: object) -> MovesNode:
        start = paced_start(**changes)
        made.append(MovesNode(Slabs(start, block_bytes=8 * start.block_tokens), tmp_path))
        for worker in range(num_workers):
            made[-1].add(worker)
        return made[-1].ready()

    yield make
    for each in made:
        each.close()
        assert [end.error for end in each.ends.values()] == [None] * len(each.ends)


def alone(node: NodeMaker, *, sampling: Sampling, max_tokens: int = 40) -> tuple[list[int], str]:
    """The answer to `LONG` of a worker that keeps it."""
    one = node(1)
    one.assign(1, 0, LONG, sampling=sampling, max_tokens=max_tokens)
    answer = one.finish(1).answers[1]
    return answer.tokens, answer.text


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_r12_handed_off_answer_is_that_of_one_worker(node: NodeMaker, sampling: Sampling) -> None:
    tokens, text = alone(node, sampling=sampling)
    two = node()
    two.assign(1, 0, LONG, sampling=sampling)
    two.move(1, target=1)
    two.finish(1).settle()
    answer = two.answers[1]
    assert (answer.tokens, answer.text) == (tokens, text)
    assert answer.served_by == [0, 1]
    (pulled,) = two.of(KvPulled)
    assert isinstance(pulled, KvPulled)
    assert pulled.num_tokens == len(LONG) + pulled.emitted_tokens - 1
    assert pulled.path == "shared memory"
    assert len(two.of(Released)) == 1
