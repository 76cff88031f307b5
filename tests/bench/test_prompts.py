"""Prompts: as long as asked, and with equal beginnings where a prefix is shared."""

import json

from hypothesis import given
from hypothesis import strategies as st

from appliance.bench.prompts import IdPrompts, TextPrompts, TextScale
from appliance.core.types import Slo
from appliance.workload.items import Item


def item(index: int = 0, *, tokens: int, prefix: tuple[int, ...] = (), block: int = 0) -> Item:
    return Item(
        index=index, at=0.0, class_name="a", prompt_tokens=tokens, output_tokens=1, max_tokens=1,
        slo=Slo(), prefix=prefix, prefix_block_tokens=block,
    )  # fmt: skip


@given(st.integers(1, 500), st.lists(st.integers(0, 9), max_size=6), st.integers(1, 64))
def test_a_list_of_ids_has_exactly_the_length_asked_for(
    tokens: int, prefix: list[int], block: int
) -> None:
    ids = json.loads(IdPrompts("s")(item(tokens=tokens, prefix=tuple(prefix), block=block)))
    assert len(ids) == tokens
    assert all(300 <= one < 556 for one in ids)


def test_equal_beginnings_of_a_prefix_are_equal_tokens_and_no_more() -> None:
    prompts = IdPrompts("s")
    one = json.loads(prompts(item(0, tokens=100, prefix=(1, 2, 3), block=16)))
    two = json.loads(prompts(item(1, tokens=90, prefix=(1, 2, 4), block=16)))
    assert one[:32] == two[:32]
    assert one[32:48] != two[32:48]
    assert one[48:90] != two[48:90]


def test_a_last_block_that_is_not_full_is_the_beginning_of_its_block() -> None:
    prompts = IdPrompts("s")
    short = json.loads(prompts(item(0, tokens=20, prefix=(1, 2), block=16)))
    whole = json.loads(prompts(item(1, tokens=32, prefix=(1, 2), block=16)))
    assert short == whole[:20]


def test_another_salt_gives_other_tokens() -> None:
    same = item(tokens=40, prefix=(1,), block=16)
    one, two = json.loads(IdPrompts("a")(same)), json.loads(IdPrompts("b")(same))
    assert one[:16] != two[:16]
    assert one[16:] != two[16:]


def test_words_are_counted_by_what_the_server_makes_of_them() -> None:
    prompts = TextPrompts("s", scale=TextScale(per_word=2.0, fixed=10.0))
    text = json.loads(prompts(item(tokens=210)))
    assert len(text.split()) == 100
    one = json.loads(prompts(item(0, tokens=210, prefix=(5,), block=40))).split()
    two = json.loads(prompts(item(1, tokens=210, prefix=(5,), block=40))).split()
    assert one[:20] == two[:20]
    assert one[20:] != two[20:]
