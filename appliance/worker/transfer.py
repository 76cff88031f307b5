"""How blocks come from a peer's pool into one's own.

The receiver copies; the peer takes no part and may be busy, stopped or dead. What arrived is only
good if the peer's index says so *after* the copy: each block must still have the generation that it
was offered with (or was found with). `Transfer` opens the pools of peers; on CPU that is shared
memory, mapped once per incarnation and read in place.

Runs of adjacent blocks are copied at once. A list is copied in *slices* of some megabytes, so that
whoever copies can look around between two.
"""

import ctypes
import mmap
import os
import time
import zlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from appliance.core.kv_layout import index_bytes
from appliance.core.peer_links import PeerUp
from appliance.core.types import BlockHash, BlockId
from appliance.worker.kv_index import IndexMismatch, PeerIndex

SLICE_BYTES = 8 << 20
PROBE_BYTES = 8 << 20
_PROBES = 3
_POPULATE_READ = 22
"""MADV_POPULATE_READ: make the page tables of a mapping now, not fault by fault."""
_POPULATE_BYTES = 4 << 30
"""More of a mapping is left to faults."""

Bytes = npt.NDArray[np.uint8]


class PeerPool(Protocol):
    """The pool of one incarnation of a peer. Its methods may be called by one thread at a time,
    any one."""

    @property
    def path(self) -> str:
        """How the bytes come, in words."""

    @property
    def block_bytes(self) -> int:
        """Size of a block."""

    def probe(self) -> float:
        """Copy something that nobody needs; bytes per second, the best of some."""

    def copy(self, sources: Sequence[BlockId], targets: Sequence[BlockId]) -> Iterator[None]:
        """Copy block `sources[i]` over our block `targets[i]`; the iterator stops between two
        slices. Raises `IndexError` for blocks that do not exist."""

    def generations(self, blocks: Sequence[BlockId]) -> list[int]:
        """What the peer's index says of them now."""

    def names(self, blocks: Sequence[BlockId]) -> list[BlockHash]:
        """What the peer's index says of them now; 0: none."""

    def find(self, hashes: Sequence[BlockHash]) -> tuple[list[BlockId], list[int]]:
        """Blocks of these contents with their generations, up to the first that is missing."""


class Transfer(Protocol):
    """Opens the pools of peers for one worker."""

    def open(self, peer: PeerUp, fd: int) -> PeerPool:
        """The pool behind `fd`, which stays the caller's. Raises `ValueError` or `OSError` when
        nothing can be copied from it."""

    def checksum(self, block: BlockId) -> int:
        """CRC-32 of one of our own blocks."""


class SharedMemoryTransfer:
    """Pools in shared memory of one machine."""

    def __init__(self, memory: memoryview, *, num_blocks: int, block_bytes: int) -> None:
        """`memory` is our own pool: at least its `num_blocks` blocks, writable."""
        whole: Bytes = np.frombuffer(memory, np.uint8)
        self._blocks = whole[: num_blocks * block_bytes].reshape(num_blocks, block_bytes)
        self._block_bytes = block_bytes

    def open(self, peer: PeerUp, fd: int) -> "SharedPool":
        """See `Transfer`."""
        if peer.block_bytes != self._block_bytes:
            raise ValueError(
                f"blocks of worker {peer.peer} have {peer.block_bytes} bytes, ours have "
                f"{self._block_bytes}: their models, dtypes or block sizes differ"
            )
        return SharedPool(self._blocks, peer, fd)

    def checksum(self, block: BlockId) -> int:
        """See `Transfer`."""
        return zlib.crc32(self._blocks[block])


class LocalPool:
    """Blocks with their index in memory of this process, of which another part is our own pool."""

    path = "host memory"

    def __init__(
        self, own: Bytes, memory: memoryview, *, num_blocks: int, block_bytes: int, index_at: int
    ) -> None:
        """`own` is our pool, whole blocks; the index begins at byte `index_at` of `memory`. Raises
        `IndexMismatch`."""
        self.block_bytes = block_bytes
        self._theirs: Bytes = np.frombuffer(memory[: num_blocks * block_bytes], np.uint8)
        self._ours = own.reshape(-1)
        self._index = PeerIndex(memory[index_at:], num_blocks=num_blocks, block_bytes=block_bytes)

    def probe(self) -> float:
        """See `PeerPool`. Makes the page tables too, which the first copies would pay for."""
        size = min(PROBE_BYTES, self._theirs.nbytes)
        scratch = np.ones(size, np.uint8)
        theirs = self._theirs
        _populate(theirs[: min(theirs.nbytes, _POPULATE_BYTES)])
        best = 0.0
        for _ in range(_PROBES):
            began = time.perf_counter()
            np.copyto(scratch, theirs[:size])
            best = max(best, size / max(time.perf_counter() - began, 1e-9))
        return best

    def copy(self, sources: Sequence[BlockId], targets: Sequence[BlockId]) -> Iterator[None]:
        """See `PeerPool`."""
        size, limit = self.block_bytes, max(1, SLICE_BYTES // self.block_bytes)
        first, into, counts = _runs(sources, targets, longest=limit)
        _check(sources, self._theirs.nbytes // size)
        _check(targets, self._ours.nbytes // size)
        theirs, ours = self._theirs.ctypes.data, self._ours.ctypes.data
        move, begin = ctypes.memmove, 0
        from_ = (theirs + first * size).tolist()
        to = (ours + into * size).tolist()
        num_bytes = (counts * size).tolist()
        for end in _slices(counts, limit=limit):
            if begin:
                yield
            for index in range(begin, end):
                move(to[index], from_[index], num_bytes[index])
            begin = end

    def generations(self, blocks: Sequence[BlockId]) -> list[int]:
        """See `PeerPool`."""
        return self._index.generations(blocks)

    def names(self, blocks: Sequence[BlockId]) -> list[BlockHash]:
        """See `PeerPool`."""
        return self._index.names(blocks)

    def find(self, hashes: Sequence[BlockHash]) -> tuple[list[BlockId], list[int]]:
        """See `PeerPool`."""
        return self._index.find(hashes)


class SharedPool(LocalPool):
    """A peer's pool, mapped for reading. The mapping lives as long as this object is used."""

    path = "shared memory"

    def __init__(self, own: Bytes, peer: PeerUp, fd: int) -> None:
        """`own` is `[num_blocks, block_bytes]`. Raises `IndexMismatch`, `OSError`."""
        num_blocks, size = peer.num_blocks, peer.block_bytes
        needed = peer.index_offset + index_bytes(num_blocks)
        available = os.fstat(fd).st_size
        if peer.index_offset < num_blocks * size or available < needed:
            raise IndexMismatch(
                f"the pool of worker {peer.peer} has {available} bytes, its {num_blocks} blocks "
                f"and index need {needed}"
            )
        mapped = mmap.mmap(fd, needed, mmap.MAP_SHARED, mmap.PROT_READ)
        super().__init__(
            own,
            memoryview(mapped),
            num_blocks=num_blocks,
            block_bytes=size,
            index_at=peer.index_offset,
        )


Indices = npt.NDArray[np.int64]


def _runs(
    sources: Sequence[BlockId], targets: Sequence[BlockId], *, longest: int
) -> tuple[Indices, Indices, Indices]:
    """First source, first target and length of each run of blocks that are adjacent on both sides;
    no run has more than `longest`."""
    first, into = np.asarray(sources, np.int64), np.asarray(targets, np.int64)
    if len(first) != len(into):
        raise ValueError(f"{len(first)} source blocks for {len(into)} target blocks")
    adjacent = (np.diff(first) == 1) & (np.diff(into) == 1)
    begins = np.concatenate([[0], np.flatnonzero(~adjacent) + 1]) if len(first) else first
    ends = np.append(begins[1:], len(first))
    if len(first) and (ends - begins).max() > longest:
        pieces = [np.arange(a, b, longest) for a, b in zip(begins, ends, strict=True)]
        begins = np.concatenate(pieces)
        ends = np.append(begins[1:], len(first))
    return first[begins], into[begins], (ends - begins)[: len(begins)]


def _slices(counts: Indices, *, limit: int) -> Iterator[int]:
    """Ends of consecutive groups of runs, each of about `limit` blocks."""
    if not len(counts):
        return
    groups = (np.cumsum(counts) - 1) // limit
    yield from (np.flatnonzero(np.diff(groups)) + 1).tolist()
    yield len(counts)


def _check(blocks: Sequence[BlockId], num_blocks: int) -> None:
    if len(blocks) and not (min(blocks) >= 0 and max(blocks) < num_blocks):
        raise IndexError(f"blocks {min(blocks)} to {max(blocks)} of a pool of {num_blocks}")


def _populate(memory: Bytes) -> None:
    """Best effort: an old kernel refuses, and pages are then mapped fault by fault."""
    libc = ctypes.CDLL(None)
    libc.madvise(
        ctypes.c_void_p(memory.ctypes.data), ctypes.c_size_t(memory.nbytes), _POPULATE_READ
    )
