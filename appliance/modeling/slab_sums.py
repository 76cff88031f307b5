"""Checksums of a weight slab: one CRC-32 for every chunk of its tensors, stored behind them.

They are computed while the chunk is still in the processor's cache, by whoever reads the
checkpoint, and travel with every copy; the manifest names a digest of them all. So a receiver can
check its own bytes against what was read from disk, not merely against the source it copied from.

A copy is checked in a sample of `SAMPLE_CHUNKS` chunks, drawn without repetition by a seed that
differs from receiver to receiver. With `n` chunks, one bad chunk is found with probability
`SAMPLE_CHUNKS / n` (certain up to 16 MiB); if a share `f` of all chunks is bad, as after a copy
from a wrong place or one that ended early, it goes unnoticed with probability `(1 - f)` to the
power of `SAMPLE_CHUNKS`: 4 % for a twentieth, one in 10^19 for a half.
"""

import random
import zlib
from collections.abc import Sequence
from hashlib import blake2b

from appliance.core.model_shape import SlabLayout

SAMPLE_CHUNKS = 64


def store_sums(view: memoryview, layout: SlabLayout, chunks: Sequence[int]) -> None:
    """Compute the checksums of these chunks of the slab `view` and write them into it."""
    table = _table(view, layout)
    for index in chunks:
        table[index] = zlib.crc32(view[layout.chunk(index)])


def digest_of_sums(view: memoryview, layout: SlabLayout) -> str:
    """A name for all checksums: 32 hex digits."""
    return blake2b(_table(view, layout), digest_size=16).hexdigest()


def bad_chunk(view: memoryview, layout: SlabLayout, chunk: int) -> bool:
    """Whether the chunk's bytes are not those whose checksum is stored."""
    return zlib.crc32(view[layout.chunk(chunk)]) != _table(view, layout)[chunk]


def sample_of(layout: SlabLayout, *, seed: int) -> list[int]:
    """The chunks that a receiver checks, in order."""
    count = min(SAMPLE_CHUNKS, layout.num_chunks)
    return sorted(random.Random(seed).sample(range(layout.num_chunks), count))


def _table(view: memoryview, layout: SlabLayout) -> memoryview:
    return view[layout.sums : layout.sums + 4 * layout.num_chunks].cast("I")
