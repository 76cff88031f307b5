"""Names of full KV blocks by content.

    h(k) = BLAKE2b-64(key; h(k-1) || token ids of block k as int32)
    h(-1) = BLAKE2b-64(key; "root|" length of adapter "|" adapter "|" salt)

The key is drawn by the node at its start, so nobody outside can construct two prompts whose blocks
share a name; the salt keeps tenants apart.
"""

from hashlib import blake2b


def root_hash(*, key: bytes, adapter: str | None = None, salt: str = "") -> int:
    """The parent of a sequence's first block, an unsigned 64-bit number."""
    name = adapter or ""
    seed = (
        f"root|{len(name)}|{name}|{salt}".encode()
    )  # the length keeps "a|", "b" and "a", "|b" apart
    return int.from_bytes(blake2b(seed, key=key, digest_size=8).digest(), "little")


def chain(ids: bytes | memoryview, block_tokens: int, *, key: bytes, parent: int) -> list[int]:
    """Hashes of all full blocks of `ids` (little-endian int32), which follow the block named
    `parent`.

    Raises `ValueError` when `ids` is not a whole number of int32."""
    if len(ids) % 4:
        raise ValueError(f"token ids are int32: {len(ids)} bytes is not a multiple of 4")
    step = 4 * block_tokens
    hashes = []
    for begin in range(0, len(ids) - step + 1, step):
        digest = blake2b(parent.to_bytes(8, "little"), key=key, digest_size=8)
        digest.update(ids[begin : begin + step])
        parent = int.from_bytes(digest.digest(), "little")
        hashes.append(parent)
    return hashes
