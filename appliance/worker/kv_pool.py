"""One worker's KV pool: a flat buffer of equal blocks that the node owns and that outlives the
worker.

Layout, block-major: `[block][layer][k, v][kv_head][token][head_dim]`. A block is one contiguous
chunk over all layers, so a peer copies it at once. Within a layer, `[token][head_dim]` of one KV
head is one contiguous row: a gather by block ids can therefore put the tokens of a head next to
each other, which is the layout that batched matrix products want.

Blocks `0 .. num_blocks - 1` belong to the ledger; block `num_blocks` is the scratch block: never
written, always zero, and it stands wherever a table is shorter than a tile.
"""

import ctypes
import mmap
import os
from collections.abc import Sequence

import torch

from appliance.core.model_shape import (
    DTYPE_BYTES,
    PAGE_BYTES,
    DType,
    ModelShape,
    kv_slab_bytes,
)
from appliance.modeling.slab_reading import TORCH_DTYPES


class KvPool:
    """Views of the pool. `buffer` must be writable and at least `kv_slab_bytes` long."""

    def __init__(
        self,
        buffer: memoryview,
        *,
        shape: ModelShape,
        dtype: DType,
        num_blocks: int,
        block_tokens: int,
    ) -> None:
        needed = kv_slab_bytes(shape, dtype, num_blocks=num_blocks, block_tokens=block_tokens)
        if buffer.nbytes < needed:
            raise ValueError(
                f"the KV slab has {buffer.nbytes} bytes, {num_blocks} blocks need {needed}"
            )
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.scratch = num_blocks
        self.num_kv_heads = shape.num_kv_heads
        self.head_dim = shape.head_dim
        self.num_layers = shape.num_layers
        self.block_bytes = shape.kv_block_bytes(dtype, block_tokens=block_tokens)
        elements = (num_blocks + 1) * self.block_bytes // DTYPE_BYTES[dtype]
        flat = torch.frombuffer(buffer, dtype=TORCH_DTYPES[dtype], count=elements)
        self.buffer = buffer
        self.blocks = flat.view(num_blocks + 1, -1)
        """`[num_blocks + 1, elements of a block]`"""
        self.dtype = flat.dtype
        self._address = flat.data_ptr()
        # The same index numbers address each layer: layer l's view starts l layers later.
        rows = flat.view(-1, block_tokens * shape.head_dim)
        self._head_rows = [
            rows[layer * 2 * shape.num_kv_heads :] for layer in range(shape.num_layers)
        ]
        self._token_rows = [head_rows.view(-1, shape.head_dim) for head_rows in self._head_rows]

    @property
    def rows_per_block(self) -> int:
        """Rows of `head_rows` from one block to the next."""
        return self.num_layers * 2 * self.num_kv_heads

    def head_rows(self, layer: int) -> torch.Tensor:
        """`[rows, block_tokens * head_dim]`: row `block * rows_per_block + kv * kv_heads + head`
        holds one block's keys (kv 0) or values (kv 1) of one head in this layer."""
        return self._head_rows[layer]

    def token_rows(self, layer: int) -> torch.Tensor:
        """`[rows, head_dim]`: `head_rows` cut into tokens; row `head row * block_tokens +
        token`."""
        return self._token_rows[layer]

    def touch(self) -> None:
        """Make every page resident without changing it (first touch is the hidden cost of a pool),
        and clear the scratch block."""
        bytes_view = torch.frombuffer(self.buffer, dtype=torch.uint8)
        bytes_view[::PAGE_BYTES].add_(0)
        self.blocks[self.scratch].zero_()

    def clear(self, blocks: Sequence[int]) -> None:
        """Zero blocks that were given to a new owner: what a former owner left can then never reach
        another sequence, not even as a non-finite value under a mask."""
        for block in blocks:
            ctypes.memset(self._address + block * self.block_bytes, 0, self.block_bytes)


def map_kv(fd: int, num_bytes: int) -> memoryview:
    """Map the node's KV slab for reading and writing. The descriptor may be closed afterwards."""
    available = os.fstat(fd).st_size
    if available < num_bytes:
        raise ValueError(f"the KV slab has {available} bytes, its blocks need {num_bytes}")
    return memoryview(mmap.mmap(fd, num_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE))
