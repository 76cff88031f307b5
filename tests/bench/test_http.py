"""Responses as bytes, cut anywhere."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.bench.http import BadResponse, ChunkedBody, PlainBody, parse_head


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """The data in pieces."""
    marks = sorted({min(place, len(data)) for place in places} | {0, len(data)})
    return [data[start:end] for start, end in pairwise(marks)]


def framed(chunks: list[bytes], *, extension: bytes = b"", trailers: bytes = b"") -> bytes:
    frames = [b"%x%b\r\n%b\r\n" % (len(chunk), extension, chunk) for chunk in chunks if chunk]
    return b"".join(frames) + b"0\r\n" + trailers + b"\r\n"


chunk_lists = st.lists(st.binary(max_size=40), max_size=8)
places = st.lists(st.integers(0, 400), max_size=20)


@given(chunk_lists, places, st.sampled_from([b"", b";name=value"]), st.binary(max_size=9))
def test_a_chunked_body_is_the_same_however_it_is_cut(
    chunks: list[bytes], places: list[int], extension: bytes, behind: bytes
) -> None:
    wire = framed(chunks, extension=extension, trailers=b"x-sum: 1\r\n") + behind
    body, found = ChunkedBody(), b""
    for piece in cut(wire, places):
        if body.over:
            body.rest += piece
        else:
            found += body.feed(piece)
    assert found == b"".join(chunks)
    assert body.over
    assert body.rest == behind


@given(chunk_lists, places)
def test_a_chunked_body_is_not_over_before_its_last_byte(
    chunks: list[bytes], places: list[int]
) -> None:
    body = ChunkedBody()
    for piece in cut(framed(chunks)[:-1], places):
        body.feed(piece)
    assert not body.over


@pytest.mark.parametrize("wire", [b"zz\r\nab\r\n", b"\r\n", b"-2\r\nab\r\n", b"2\r\nabcd\r\n"])
def test_frames_that_make_no_sense_are_named(wire: bytes) -> None:
    with pytest.raises(BadResponse, match="chunk"):
        ChunkedBody().feed(wire)


def test_a_size_line_that_never_ends_is_an_error() -> None:
    body = ChunkedBody()
    body.feed(b"1" * 60_000)
    with pytest.raises(BadResponse, match="never ends"):
        body.feed(b"1" * 60_000)


def test_a_plain_body_ends_at_its_length() -> None:
    body = PlainBody(5)
    assert body.feed(b"abc") == b"abc"
    assert not body.over
    assert body.feed(b"deXY") == b"de"
    assert body.over
    assert body.rest == b"XY"


def test_a_head_says_what_follows_it() -> None:
    head = parse_head(b"HTTP/1.1 429 Too Many\r\nRetry-After: 3\r\ncontent-length: 12\r\nA:b")
    assert (head.status, head.length, head.keep_alive, head.chunked) == (429, 12, True, False)
    assert head.retry_after == "3"
    assert parse_head(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked").chunked
    assert not parse_head(b"HTTP/1.0 200 OK").keep_alive
    assert not parse_head(b"HTTP/1.1 200 OK\r\nConnection: close").keep_alive
    assert parse_head(b"HTTP/1.1 204 No Content").length == 0


@pytest.mark.parametrize(
    "raw",
    [b"SSH-2.0-x", b"HTTP/2 200", b"HTTP/1.1 abc", b"HTTP/1.1 200 OK\r\nno colon",
     b"HTTP/1.1 200 OK\r\ncontent-length: many"],
)  # fmt: skip
def test_what_is_no_response_is_named(raw: bytes) -> None:
    with pytest.raises(BadResponse):
        parse_head(raw)
