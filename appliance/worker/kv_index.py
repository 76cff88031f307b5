"""The index of a KV pool: what each block holds, for readers who ask nobody.

It lies behind the blocks in the same shared memory (`appliance.core.kv_layout`), so it outlives its
worker as the blocks do. One process writes it, any may read it, without locks:

* the owner writes a block's new generation and voids its name *before* the first byte of new
  content, and its name *after* the last one;
* a reader copies first and looks at generation (and name) afterwards: if they are what it expected,
  no byte that it copied belongs to a later content.

Both rest on stores becoming visible, and loads being done, in program order: each entry is one
aligned 64-bit word and x86 keeps that order for ordinary memory. A machine with a weaker order
would need a barrier where `_in_order` stands.

A successor of the owner takes over what is complete, the named blocks, and voids all others by a
new generation: a copy that a peer makes of a block that was half written cannot pass for good.
"""

import mmap
import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from appliance.core.kv_layout import (
    INDEX_ENTRY_BYTES,
    INDEX_HEADER_BYTES,
    INDEX_MAGIC,
    index_bytes,
)
from appliance.core.peer import IndexChanges, Inherited
from appliance.core.types import BlockHash, BlockId

Words = npt.NDArray[np.uint64]

_MAGIC, _NUM_BLOCKS, _BLOCK_BYTES, _EPOCH = range(4)


class IndexMismatch(ValueError):
    """The memory is too short for its index, or holds that of another pool."""


class _Columns:
    """Views of the index in a piece of memory that begins with its header."""

    __slots__ = ("generations", "header", "names")

    def __init__(self, memory: memoryview, num_blocks: int) -> None:
        if memory.nbytes < index_bytes(num_blocks):
            raise IndexMismatch(
                f"{memory.nbytes} bytes are left for the index of {num_blocks} blocks, it needs "
                f"{index_bytes(num_blocks)}"
            )
        words: Words = np.frombuffer(memory, dtype="<u8")
        begin = INDEX_HEADER_BYTES // INDEX_ENTRY_BYTES
        self.header = words[:begin]
        self.generations = words[begin : begin + num_blocks]
        self.names = words[begin + num_blocks : begin + 2 * num_blocks]

    def fits(self, *, num_blocks: int, block_bytes: int) -> bool:
        found = self.header[[_MAGIC, _NUM_BLOCKS, _BLOCK_BYTES]].tolist()
        return bool(found == [INDEX_MAGIC, num_blocks, block_bytes])


class OwnIndex:
    """The index of one's own pool. Belongs to one thread."""

    def __init__(
        self, memory: memoryview, *, num_blocks: int, block_bytes: int, epoch: int
    ) -> None:
        """`memory` begins where the index does and is writable. Takes over what a predecessor left
        there if it was an index of the same shape. Raises `IndexMismatch`."""
        self._columns = columns = _Columns(memory, num_blocks)
        self.inherited: Inherited | None = None
        """What a predecessor left; None in a new pool."""
        if columns.fits(num_blocks=num_blocks, block_bytes=block_bytes):
            self._void_unnamed()
            self.inherited = Inherited(
                generations=tuple(columns.generations.tolist()), names=tuple(columns.names.tolist())
            )
        else:
            columns.generations[:] = 0
            columns.names[:] = 0
            columns.header[_NUM_BLOCKS] = num_blocks
            columns.header[_BLOCK_BYTES] = block_bytes
        columns.header[_EPOCH] = epoch
        _in_order()
        columns.header[_MAGIC] = INDEX_MAGIC

    def apply(self, changes: IndexChanges) -> None:
        """Write what has changed. To be called before any byte of the taken blocks is written, and
        after the last byte of the named ones."""
        names, generations = self._columns.names, self._columns.generations
        for block, generation in changes.taken:
            names[block] = 0
            generations[block] = generation
        _in_order()
        for block, name in changes.named:
            names[block] = name

    def _void_unnamed(self) -> None:
        columns = self._columns
        columns.generations[columns.names == 0] += np.uint64(1)


class PeerIndex:
    """The index of a peer's pool. For any one thread."""

    def __init__(self, memory: memoryview, *, num_blocks: int, block_bytes: int) -> None:
        """Raises `IndexMismatch`."""
        self._columns = _Columns(memory, num_blocks)
        if not self._columns.fits(num_blocks=num_blocks, block_bytes=block_bytes):
            raise IndexMismatch(
                f"the pool has no index of {num_blocks} blocks of {block_bytes} bytes: "
                f"{self._columns.header[:4].tolist()}"
            )

    def generations(self, blocks: Sequence[BlockId]) -> list[int]:
        """What they are now."""
        found: list[int] = self._columns.generations[np.asarray(blocks, np.intp)].tolist()
        return found

    def names(self, blocks: Sequence[BlockId]) -> list[BlockHash]:
        """What they are now; 0: none."""
        found: list[BlockHash] = self._columns.names[np.asarray(blocks, np.intp)].tolist()
        return found

    def find(self, hashes: Sequence[BlockHash]) -> tuple[list[BlockId], list[int]]:
        """Blocks of these contents and their generations, up to the first that is not there.

        The generations are read before the names: a block that was found by its name and whose
        generation is the same after a copy had that content all the while."""
        if not len(hashes):
            return [], []
        generations = self._columns.generations.copy()
        _in_order()
        names = self._columns.names.copy()
        wanted = np.array(hashes, np.uint64)
        order = np.argsort(names)
        ordered = names[order]
        places = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
        there = (ordered[places] == wanted) & (wanted != 0)
        num_found = len(there) if there.all() else int(there.argmin())
        blocks = order[places[:num_found]]
        return blocks.tolist(), generations[blocks].tolist()


def _in_order() -> None:
    """What is written above becomes visible before what is written below, and what is read above
    was read before. Nothing to do on x86 (see the module's text)."""


def map_own_index(fd: int, *, num_blocks: int, offset: int) -> memoryview:
    """Map the index that begins at `offset` of the file behind `fd`, which may be closed
    afterwards. Raises `IndexMismatch` when the file ends before it does."""
    size, available = index_bytes(num_blocks), os.fstat(fd).st_size
    if available < offset + size:
        raise IndexMismatch(
            f"the KV memory has {available} bytes, {offset + size} are needed with its index"
        )
    both = mmap.PROT_READ | mmap.PROT_WRITE
    return memoryview(mmap.mmap(fd, size, mmap.MAP_SHARED, both, offset=offset))
