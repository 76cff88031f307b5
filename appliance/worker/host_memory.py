"""The memory of a worker's host tier: blocks that its KV pool had to give up.

It is anonymous memory of the worker process, made when the worker starts and gone with it. It has
the layout of a pool, index included (`appliance.core.kv_layout`), so what is fetched from it is
copied and checked by the same means as a peer's blocks: generation and name are looked at after the
copy. The step loop writes it, the copying thread reads it.

Pages are not touched before the first block is written to them.
"""

import ctypes
import mmap
from collections.abc import Sequence

import numpy as np

from appliance.core.host_tier import Spill
from appliance.core.kv_layout import index_offset, pool_bytes
from appliance.core.peer import IndexChanges
from appliance.worker.kv_index import OwnIndex
from appliance.worker.transfer import Bytes, LocalPool


class HostMemory:
    """The slots of one worker. `keep` belongs to the step loop, `pool` to the copying thread."""

    def __init__(self, own: memoryview, *, num_blocks: int, block_bytes: int, slots: int) -> None:
        """`own` is the worker's KV pool, of which `num_blocks` blocks are usable. Raises
        `OSError` when there is no memory for `slots` blocks."""
        offset = index_offset(num_blocks=slots, block_bytes=block_bytes)
        size = pool_bytes(num_blocks=slots, block_bytes=block_bytes)
        memory = memoryview(mmap.mmap(-1, size))
        self._block_bytes = block_bytes
        self._index = OwnIndex(memory[offset:], num_blocks=slots, block_bytes=block_bytes, epoch=1)
        self._slots: Bytes = np.frombuffer(memory[: slots * block_bytes], np.uint8)
        self._blocks: Bytes = np.frombuffer(own, np.uint8)[: num_blocks * block_bytes]
        self.pool = LocalPool(
            self._blocks, memory, num_blocks=slots, block_bytes=block_bytes, index_at=offset
        )

    def keep(self, spills: Sequence[Spill]) -> None:
        """Copy blocks of the pool into their slots, now."""
        taken = tuple([(spill.slot, spill.generation) for spill in spills])
        self._index.apply(IndexChanges(taken=taken, named=()))
        size, move = self._block_bytes, ctypes.memmove
        slots, blocks = self._slots.ctypes.data, self._blocks.ctypes.data
        for spill in spills:
            move(slots + spill.slot * size, blocks + spill.block * size, size)
        named = tuple([(spill.slot, spill.content) for spill in spills])
        self._index.apply(IndexChanges(taken=(), named=named))
