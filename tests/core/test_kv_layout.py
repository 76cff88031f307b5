"""Where the parts of a pool's memory stand: nobody may map into a neighbour."""

import pytest

from appliance.core.kv_layout import (
    INDEX_ENTRY_BYTES,
    INDEX_HEADER_BYTES,
    PAGE_BYTES,
    index_bytes,
    index_offset,
    pool_bytes,
)
from appliance.core.profiles import paced_kv_slab_bytes


@pytest.mark.parametrize("num_blocks", [1, 7, 255, 256, 257, 10_000])
@pytest.mark.parametrize("block_bytes", [32, 128, 4096, 49_152])
def test_index_begins_at_a_page_behind_the_scratch_block_and_holds_both_columns(
    num_blocks: int, block_bytes: int
) -> None:
    offset = index_offset(num_blocks=num_blocks, block_bytes=block_bytes)
    assert offset % PAGE_BYTES == 0
    assert (num_blocks + 1) * block_bytes <= offset < (num_blocks + 1) * block_bytes + PAGE_BYTES
    size = index_bytes(num_blocks)
    assert size % PAGE_BYTES == 0
    assert size >= INDEX_HEADER_BYTES + 2 * num_blocks * INDEX_ENTRY_BYTES
    assert pool_bytes(num_blocks=num_blocks, block_bytes=block_bytes) == offset + size


def test_blocks_of_a_paced_worker_end_where_the_index_begins() -> None:
    blocks = paced_kv_slab_bytes(num_blocks=99, block_tokens=16)
    assert index_offset(num_blocks=99, block_bytes=16 * 8) == blocks
