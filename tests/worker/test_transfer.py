"""Blocks that come from a mapped pool arrive whole, wherever they stand."""

import os
import random
from collections.abc import Iterator
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.core.kv_layout import index_offset, pool_bytes
from appliance.core.peer import IndexChanges
from appliance.core.peer_links import PeerUp
from appliance.core.types import WorkerId
from appliance.worker.kv_index import IndexMismatch, OwnIndex, map_own_index
from appliance.worker.transfer import SLICE_BYTES, SharedMemoryTransfer, SharedPool

SIZE, BLOCKS = 96, 40


class Pool:
    """The pool of a peer: block `b` is full of `b + 1`."""

    def __init__(self, *, num_blocks: int = BLOCKS, size: int = SIZE) -> None:
        self.up = PeerUp(
            peer=WorkerId(2),
            epoch=1,
            num_blocks=num_blocks,
            block_bytes=size,
            index_offset=index_offset(num_blocks=num_blocks, block_bytes=size),
        )
        self.fd = os.memfd_create("peer")
        os.ftruncate(self.fd, pool_bytes(num_blocks=num_blocks, block_bytes=size))
        for block in range(num_blocks):
            os.pwrite(self.fd, bytes([(block + 1) % 256]) * size, block * size)
        index = map_own_index(self.fd, num_blocks=num_blocks, offset=self.up.index_offset)
        self.index = OwnIndex(index, num_blocks=num_blocks, block_bytes=size, epoch=1)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    made = Pool()
    yield made
    os.close(made.fd)


def target(num_blocks: int = BLOCKS, size: int = SIZE) -> tuple[SharedMemoryTransfer, bytearray]:
    memory = bytearray(num_blocks * size)
    transfer = SharedMemoryTransfer(memoryview(memory), num_blocks=num_blocks, block_bytes=size)
    return transfer, memory


def copy(opened: SharedPool, sources: list[int], targets: list[int]) -> None:
    for _ in opened.copy(sources, targets):
        pass


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_every_block_lands_where_it_should_and_no_other_changes(
    pool: Pool, data: st.DataObject
) -> None:
    """Lists are drawn as pieces of two orders, so that runs on both, one or no side occur."""
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    pieces = data.draw(st.lists(st.integers(1, 6), max_size=8))
    sources: list[int] = []
    targets: list[int] = []
    free = list(range(BLOCKS))
    for piece in pieces:
        first = rng.randrange(BLOCKS - piece + 1)
        run = [b for b in range(rng.randrange(BLOCKS), BLOCKS) if b in free][:piece]
        sources += range(first, first + len(run))
        targets += run
        free = [b for b in free if b not in run]
    transfer, memory = target()
    copy(transfer.open(pool.up, pool.fd), sources, targets)
    expected = np.zeros((BLOCKS, SIZE), np.uint8)
    for source, into in zip(sources, targets, strict=True):
        expected[into] = source + 1
    assert bytes(memory) == expected.tobytes()


def test_large_copies_come_in_slices() -> None:
    size, num_blocks = 1 << 20, 20
    big = Pool(num_blocks=num_blocks, size=size)
    try:
        transfer, memory = target(num_blocks, size)
        opened = transfer.open(big.up, big.fd)
        steps = opened.copy(list(range(num_blocks)), list(range(num_blocks)))
        next(steps)
        copied = [memory[block * size] != 0 for block in range(num_blocks)]
        assert copied == [block < SLICE_BYTES // size for block in range(num_blocks)]
        assert len(list(steps)) == 1
        assert [memory[block * size] for block in range(num_blocks)] == list(range(1, 21))
    finally:
        os.close(big.fd)


def test_nothing_is_copied_for_nothing(pool: Pool) -> None:
    transfer, memory = target()
    copy(transfer.open(pool.up, pool.fd), [], [])
    assert not any(memory)


@pytest.mark.parametrize(
    ("sources", "targets", "error", "words"),
    [
        ([BLOCKS], [0], IndexError, "blocks 40 to 40 of a pool of 40"),
        ([-1], [0], IndexError, "blocks -1"),
        ([0], [BLOCKS], IndexError, "of a pool of 40"),
        ([0, 1], [0], ValueError, "2 source blocks for 1 target blocks"),
    ],
)
def test_r13_blocks_that_do_not_exist_are_refused_before_a_byte_moves(
    pool: Pool, sources: list[int], targets: list[int], error: type[Exception], words: str
) -> None:
    transfer, memory = target()
    with pytest.raises(error, match=words):
        copy(transfer.open(pool.up, pool.fd), sources, targets)
    assert not any(memory)


def test_pool_outlives_its_descriptor_and_tells_its_index(pool: Pool) -> None:
    transfer, memory = target()
    fd = os.dup(pool.fd)
    opened = transfer.open(pool.up, fd)
    os.close(fd)
    pool.index.apply(IndexChanges(taken=((3, 8),), named=((3, 123),)))
    assert (opened.generations([3]), opened.names([3])) == ([8], [123])
    assert opened.find([123]) == ([3], [8])
    copy(opened, [3], [1])
    assert transfer.checksum(1) == crc32(bytes([4]) * SIZE) == crc32(memory[SIZE : 2 * SIZE])
    assert opened.probe() > 0


def test_pools_that_do_not_fit_are_refused_by_name(pool: Pool) -> None:
    other, _ = target(BLOCKS, 2 * SIZE)
    with pytest.raises(ValueError, match="blocks of worker 2 have 96 bytes, ours have 192"):
        other.open(pool.up, pool.fd)
    transfer, _ = target()
    short = os.memfd_create("short")
    try:
        os.ftruncate(short, 4096)
        with pytest.raises(IndexMismatch, match="pool of worker 2 has 4096 bytes"):
            transfer.open(pool.up, short)
    finally:
        os.close(short)
