"""Events, cut anywhere, with any line ends."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.bench.sse import EventSplitter, data_of


def events_of(pieces: list[bytes]) -> list[bytes]:
    """The data of all events."""
    splitter = EventSplitter()
    blocks = [block for piece in pieces for block in splitter.feed(piece)]
    blocks += splitter.end()
    return [data for block in blocks if (data := data_of(block)) is not None]


payloads = st.lists(
    st.text(st.characters(blacklist_characters="\r\n", blacklist_categories=["Cs"]), max_size=30)
    .map(str.strip)
    .map(str.encode),
    max_size=8,
)
line_ends = st.sampled_from([b"\n", b"\r\n", b"\r"])
places = st.lists(st.integers(0, 400), max_size=30)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    marks = sorted({min(place, len(data)) for place in places} | {0, len(data)})
    return [data[start:end] for start, end in pairwise(marks)]


@given(payloads, line_ends, places, st.booleans(), st.sampled_from([b"data: ", b"data:"]))
def test_events_are_the_same_however_they_are_cut(
    payloads: list[bytes], end: bytes, places: list[int], comments: bool, name: bytes
) -> None:
    wire = b""
    for payload in payloads:
        wire += (b": alive" + end + end if comments else b"") + name + payload + end + end
    assert events_of(cut(wire, places)) == payloads


@given(payloads, line_ends, places)
def test_an_event_is_told_as_soon_as_its_empty_line_is_there(
    payloads: list[bytes], end: bytes, places: list[int]
) -> None:
    splitter = EventSplitter()
    for payload in payloads:
        blocks = [
            block
            for piece in cut(b"data: " + payload + end + end, places)
            for block in splitter.feed(piece)
        ]
        if end != b"\r":  # with CR alone the next byte says whether LF follows
            assert [data_of(block) for block in blocks] == [payload]


def test_data_on_several_lines_is_one_event() -> None:
    assert events_of([b"event: x\ndata: a\nid: 3\ndata: b\n\n"]) == [b"a\nb"]


def test_comments_and_empty_lines_are_no_events() -> None:
    assert events_of([b"\n\n\n", b": ping\n\n", b"data: a\n\n\n\n", b"\n\nretry: 5\n\n"]) == [b"a"]


@pytest.mark.parametrize("rest", [b"data: a", b"data: a\n", b"data: a\r\n", b"data: a\r"])
def test_an_event_without_its_empty_line_comes_at_the_end(rest: bytes) -> None:
    assert events_of([rest]) == [b"a"]
