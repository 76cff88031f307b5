"""The KV pool: block-major layout over a buffer that the node owns."""

import mmap
import os

import pytest
import torch

from appliance.core.model_shape import ModelShape, kv_slab_bytes
from appliance.worker.kv_pool import KvPool, map_kv

SHAPE = ModelShape(
    family="llama",
    num_layers=3,
    hidden=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ff=64,
    vocab_size=100,
    max_positions=256,
    rope_theta=10000.0,
    rope_scaling=None,
    norm_eps=1e-6,
    tied=True,
    qkv_bias=False,
    output_bias=False,
    qk_norm=False,
    eos_ids=(),
)
BLOCKS, TOKENS = 5, 4


def make_pool() -> KvPool:
    size = kv_slab_bytes(SHAPE, "float32", num_blocks=BLOCKS, block_tokens=TOKENS)
    buffer = memoryview(bytearray(size))
    return KvPool(buffer, shape=SHAPE, dtype="float32", num_blocks=BLOCKS, block_tokens=TOKENS)


def test_a_block_is_one_contiguous_chunk_over_all_layers() -> None:
    pool = make_pool()
    layout = pool.blocks.view(BLOCKS + 1, 3, 2, 2, TOKENS, 8)
    layout.copy_(torch.arange(layout.numel()).view(layout.shape))
    assert pool.block_bytes == 3 * 2 * 2 * TOKENS * 8 * 4
    raw = torch.frombuffer(pool.buffer, dtype=torch.float32)
    third = raw[3 * pool.block_bytes // 4 : 4 * pool.block_bytes // 4]
    assert torch.equal(third, layout[3].flatten())


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_same_row_numbers_address_every_layer(layer: int) -> None:
    pool = make_pool()
    layout = pool.blocks.view(BLOCKS + 1, 3, 2, 2, TOKENS, 8)
    layout.copy_(torch.arange(layout.numel()).view(layout.shape))
    for block in range(BLOCKS + 1):
        for kv in range(2):
            for head in range(2):
                row = block * pool.rows_per_block + kv * 2 + head
                want = layout[block, layer, kv, head]
                assert torch.equal(pool.head_rows(layer)[row], want.flatten())
                first = row * TOKENS
                assert torch.equal(pool.token_rows(layer)[first : first + TOKENS], want)


def test_R13_cleared_blocks_keep_nothing_and_the_others_everything() -> None:
    pool = make_pool()
    pool.blocks.fill_(float("nan"))
    pool.blocks[[0, 2]] = 1.0
    pool.clear([1, 3])
    pool.clear([])
    assert pool.blocks[[1, 3]].abs().sum() == 0
    assert bool((pool.blocks[[0, 2]] == 1).all())
    assert bool(pool.blocks[4].isnan().all())


def test_R6_touching_keeps_complete_blocks_and_clears_the_scratch_block() -> None:
    pool = make_pool()
    pool.blocks.copy_(torch.randn(pool.blocks.shape))
    before = pool.blocks.clone()
    pool.touch()
    assert torch.equal(pool.blocks[:BLOCKS], before[:BLOCKS])
    assert pool.blocks[pool.scratch].abs().sum() == 0


def test_two_mappings_of_the_nodes_slab_see_the_same_blocks() -> None:
    size = kv_slab_bytes(SHAPE, "bfloat16", num_blocks=BLOCKS, block_tokens=TOKENS)
    fd = os.memfd_create("kv")
    try:
        os.ftruncate(fd, size)
        settings = {"shape": SHAPE, "num_blocks": BLOCKS, "block_tokens": TOKENS}
        mine = KvPool(map_kv(fd, size), dtype="bfloat16", **settings)  # type: ignore[arg-type]
        peer = mmap.mmap(fd, size)
    finally:
        os.close(fd)
    mine.blocks[2].fill_(1.0)
    chunk = peer[2 * mine.block_bytes : 3 * mine.block_bytes]
    assert chunk == b"\x80\x3f" * (mine.block_bytes // 2)
    peer.close()


def test_a_buffer_that_is_too_small_is_refused_with_both_sizes() -> None:
    with pytest.raises(ValueError, match=r"100 bytes, 5 blocks need"):
        KvPool(
            memoryview(bytearray(100)),
            shape=SHAPE,
            dtype="float32",
            num_blocks=BLOCKS,
            block_tokens=TOKENS,
        )
