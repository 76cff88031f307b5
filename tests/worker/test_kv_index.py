"""The index of a pool: readers and successors believe only what is complete (R13)."""

import mmap
import os
import random

import pytest

from appliance.core.kv_layout import index_bytes, index_offset, pool_bytes
from appliance.core.peer import IndexChanges, Inherited
from appliance.worker.kv_index import IndexMismatch, OwnIndex, PeerIndex, map_own_index

NUM_BLOCKS, SIZE = 16, 64


@pytest.fixture
def memory() -> memoryview:
    return memoryview(mmap.mmap(-1, index_bytes(NUM_BLOCKS)))


def own(memory: memoryview, epoch: int = 1) -> OwnIndex:
    return OwnIndex(memory, num_blocks=NUM_BLOCKS, block_bytes=SIZE, epoch=epoch)


def peer(memory: memoryview) -> PeerIndex:
    return PeerIndex(memory, num_blocks=NUM_BLOCKS, block_bytes=SIZE)


def changes(taken: dict[int, int], named: dict[int, int]) -> IndexChanges:
    return IndexChanges(taken=tuple(taken.items()), named=tuple(named.items()))


def test_peer_reads_what_the_owner_wrote(memory: memoryview) -> None:
    owner = own(memory)
    assert owner.inherited is None
    owner.apply(changes({3: 1, 4: 1, 5: 1}, {3: 2**64 - 1, 4: 77}))
    reader = peer(memory)
    assert reader.generations([3, 4, 5, 6]) == [1, 1, 1, 0]
    assert reader.names([3, 4, 5, 6]) == [2**64 - 1, 77, 0, 0]
    owner.apply(changes({4: 2}, {}))
    assert (reader.generations([4]), reader.names([4])) == ([2], [0])


def test_found_are_the_leading_contents_only(memory: memoryview) -> None:
    own(memory).apply(changes(dict.fromkeys((2, 7, 5), 9), {7: 100, 2: 101, 5: 103}))
    reader = peer(memory)
    assert reader.find([100, 101, 102, 103]) == ([7, 2], [9, 9])
    assert reader.find([999, 100]) == ([], [])
    assert reader.find([2**64 - 1]) == ([], [])
    assert reader.find([0]) == ([], [])
    assert reader.find([]) == ([], [])


def test_found_in_a_large_pool_are_those_that_were_named() -> None:
    rng = random.Random(4)
    num_blocks = 10_000
    memory = memoryview(mmap.mmap(-1, index_bytes(num_blocks)))
    owner = OwnIndex(memory, num_blocks=num_blocks, block_bytes=SIZE, epoch=1)
    contents = [rng.getrandbits(64) for _ in range(num_blocks // 2)]
    blocks = rng.sample(range(num_blocks), num_blocks // 2)
    owner.apply(changes(dict.fromkeys(blocks, 3), dict(zip(blocks, contents, strict=True))))
    reader = PeerIndex(memory, num_blocks=num_blocks, block_bytes=SIZE)
    found, generations = reader.find([*contents[:700], 5, contents[700]])
    assert found == blocks[:700]
    assert generations == [3] * 700


def test_r5_successor_inherits_names_and_voids_what_was_not_complete(memory: memoryview) -> None:
    own(memory).apply(changes({1: 4, 2: 6, 3: 1}, {1: 50}))
    reader = peer(memory)
    successor = own(memory, epoch=2)
    generations = [1] * NUM_BLOCKS
    generations[1], generations[2], generations[3] = 4, 7, 2
    names = [0] * NUM_BLOCKS
    names[1] = 50
    assert successor.inherited == Inherited(generations=tuple(generations), names=tuple(names))
    assert reader.generations([1, 2, 3]) == [4, 7, 2]


def test_index_of_another_shape_is_not_inherited(memory: memoryview) -> None:
    own(memory).apply(changes({1: 4}, {1: 50}))
    other = OwnIndex(memory, num_blocks=NUM_BLOCKS, block_bytes=2 * SIZE, epoch=2)
    assert other.inherited is None
    with pytest.raises(IndexMismatch, match="no index of 16 blocks of 64 bytes"):
        peer(memory)


def test_memory_that_is_too_short_is_refused(memory: memoryview) -> None:
    with pytest.raises(IndexMismatch, match=r"8192 bytes are left .* it needs 12288"):
        OwnIndex(memory, num_blocks=500, block_bytes=SIZE, epoch=1)
    fd = os.memfd_create("kv")
    try:
        offset = index_offset(num_blocks=NUM_BLOCKS, block_bytes=SIZE)
        os.ftruncate(fd, offset)
        with pytest.raises(IndexMismatch, match=f"has {offset} bytes"):
            map_own_index(fd, num_blocks=NUM_BLOCKS, offset=offset)
        os.ftruncate(fd, pool_bytes(num_blocks=NUM_BLOCKS, block_bytes=SIZE))
        assert map_own_index(fd, num_blocks=NUM_BLOCKS, offset=offset).nbytes == 8192
    finally:
        os.close(fd)
