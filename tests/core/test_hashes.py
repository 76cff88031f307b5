"""Names of blocks: by content, by everything before, by tenant and adapter, and unforgeable."""

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.hashes import chain, root_hash

KEY = b"k" * 16
ids = st.lists(st.integers(0, 2**31 - 1), max_size=70)


def int32(values: list[int]) -> bytes:
    return array("i", values).tobytes()


def names(values: list[int], *, block: int = 8, key: bytes = KEY, salt: str = "") -> list[int]:
    return chain(int32(values), block, key=key, parent=root_hash(key=key, salt=salt))


@given(ids)
def test_only_full_blocks_have_names(values: list[int]) -> None:
    found = names(values)
    assert len(found) == len(values) // 8
    assert all(0 <= name < 2**64 for name in found)


@given(ids, ids)
def test_names_are_equal_exactly_as_far_as_the_tokens_are(a: list[int], b: list[int]) -> None:
    for k, (first, second) in enumerate(zip(names(a), names(b), strict=False), start=1):
        assert (first == second) == (a[: 8 * k] == b[: 8 * k])


@given(ids, st.integers(0, 8))
def test_a_chain_can_be_continued_from_any_of_its_blocks(values: list[int], cut: int) -> None:
    whole = names(values)
    cut = min(cut, len(whole))
    parent = whole[cut - 1] if cut else root_hash(key=KEY)
    assert whole[cut:] == chain(int32(values)[cut * 32 :], 8, key=KEY, parent=parent)


def test_the_same_block_after_another_one_has_another_name() -> None:
    same = [7] * 8
    first, second = names(same + same)
    assert first != second


def test_R13_tenants_adapters_and_keys_share_no_name() -> None:
    values = list(range(16))
    assert not set(names(values)) & set(names(values, salt="tenant"))
    assert not set(names(values)) & set(names(values, key=b"other key"))
    roots = {
        root_hash(key=KEY),
        root_hash(key=KEY, adapter="a"),
        root_hash(key=KEY, salt="a"),
        root_hash(key=KEY, adapter="a|b"),
        root_hash(key=KEY, adapter="a", salt="b"),
        root_hash(key=KEY, adapter="a|b", salt="c"),
        root_hash(key=KEY, adapter="a", salt="b|c"),
    }
    assert len(roots) == 7


def test_names_do_not_change_between_versions() -> None:
    """Blocks outlive a worker, so its successor must find the same names."""
    assert names(list(range(8)), key=b"fixed") == [chain_by_hand()]


def chain_by_hand() -> int:
    from hashlib import blake2b

    root = blake2b(b"root|0||", key=b"fixed", digest_size=8).digest()
    block = b"".join(n.to_bytes(4, "little") for n in range(8))
    return int.from_bytes(blake2b(root + block, key=b"fixed", digest_size=8).digest(), "little")


def test_half_a_token_is_an_error() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        chain(b"abcde", 1, key=KEY, parent=0)
