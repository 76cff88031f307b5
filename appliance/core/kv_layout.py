"""Where things stand in the memory of a KV pool, for those who make it and those who map it.

A pool is one piece of memory that the node owns::

    block 0 | block 1 | ... | scratch block | padding to a page | index

The index is what peers and successors read: one page of header, then two columns of unsigned 64-bit
numbers with one entry per block, the generations and the names (0: none). It starts and ends at a
page, so that it can be mapped by itself.
"""

PAGE_BYTES = 4096
INDEX_HEADER_BYTES = PAGE_BYTES
INDEX_ENTRY_BYTES = 8
INDEX_MAGIC = int.from_bytes(b"kvindex1", "little")
"""First word of an index of this layout."""


def index_offset(*, num_blocks: int, block_bytes: int) -> int:
    """First byte of the index: behind `num_blocks` usable blocks and the scratch block."""
    return to_pages((num_blocks + 1) * block_bytes)


def index_bytes(num_blocks: int) -> int:
    """Size of the index of `num_blocks` blocks, whole pages."""
    return to_pages(INDEX_HEADER_BYTES + 2 * num_blocks * INDEX_ENTRY_BYTES)


def pool_bytes(*, num_blocks: int, block_bytes: int) -> int:
    """Size of a pool with its index, whole pages."""
    return index_offset(num_blocks=num_blocks, block_bytes=block_bytes) + index_bytes(num_blocks)


def to_pages(num_bytes: int) -> int:
    """`num_bytes`, rounded up to whole pages."""
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES
