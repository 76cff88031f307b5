"""What an answer's stream tells: tokens, times, ends, errors."""

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.bench.http import Head
from appliance.bench.stream import Answer

STREAM = Head(status=200, keep_alive=True, chunked=True, length=None, retry_after="")


def chunk(text: str = "", finish: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": finish}
    return b"data: " + json.dumps({"choices": [choice], **more}).encode() + b"\n\n"


USAGE = b'data: {"choices": [], "usage": {"completion_tokens": %d, "prompt_tokens": 7}}\n\n'
DONE = b"data: [DONE]\n\n"


def read(pieces: Sequence[bytes], *, stop_after: int = 0) -> Answer:
    """An answer that got these pieces, one a second, to its end."""
    ends: list[Answer] = []
    answer = Answer(ends.append, stop_after=stop_after)
    answer.head(STREAM, 0.0)
    for second, piece in enumerate(pieces, 1):
        answer.body(piece, float(second))
    answer.over_at(len(pieces) + 1.0)
    assert ends == [answer]
    return answer


def test_events_with_text_are_tokens_and_those_around_them_are_not() -> None:
    answer = read(
        [chunk(""), chunk("a"), b": alive\n\n", chunk("b"), chunk("c"), chunk("", "length"),
         USAGE % 3, DONE]
    )  # fmt: skip
    assert list(answer.times) == [2.0, 4.0, 5.0]
    assert (answer.num_tokens, answer.prompt_tokens) == (3, 7)
    assert answer.finished
    assert answer.finish_reason == "length"


def test_a_last_event_with_text_and_a_reason_is_a_token() -> None:
    answer = read([chunk("a"), chunk("b", "stop"), DONE])
    assert list(answer.times) == [1.0, 2.0]
    assert answer.num_tokens == 2


def test_a_step_without_a_whole_character_is_a_step_all_the_same() -> None:
    answer = read([chunk("a"), chunk(""), chunk("b"), chunk("", "length"), DONE])
    assert list(answer.times) == [1.0, 2.0, 3.0]


@given(st.integers(1, 30), st.lists(st.integers(0, 4000), max_size=40))
def test_the_count_does_not_depend_on_how_the_stream_is_cut(number: int, places: list[int]) -> None:
    wire = b"".join(chunk("x") for _ in range(number)) + chunk("", "length", slo={"met": True})
    wire += USAGE % number + DONE
    marks = sorted({min(place, len(wire)) for place in places} | {0, len(wire)})
    answer = read([wire[a:b] for a, b in pairwise(marks)])
    assert len(answer.times) == answer.num_tokens == number
    assert answer.server == {"met": True}


def test_the_verdict_is_found_in_the_chunk_or_in_its_choice() -> None:
    verdict = {"met": False, "workers": [1, 2]}
    assert read([chunk("a"), chunk("", "length", slo=verdict), DONE]).server == verdict
    inside = {"choices": [{"text": "", "finish_reason": "length", "slo": verdict}]}
    last = b"data: " + json.dumps(inside).encode() + b"\n\n"
    assert read([chunk("a"), last, DONE]).server == verdict


def test_tokens_without_any_text_have_a_time() -> None:
    answer = read([chunk("", "length"), USAGE % 1, DONE])
    assert answer.finished
    assert list(answer.times) == [1.0]


@pytest.mark.parametrize("before", [[], [chunk("a"), chunk("b")]])
def test_an_error_event_ends_an_answer_badly_wherever_it_comes(before: list[bytes]) -> None:
    error = b'data: {"error": {"code": "worker_lost", "message": "gone"}}\n\n'
    answer = read([*before, error])
    assert not answer.finished
    assert (answer.error, answer.message) == ("worker_lost", "gone")
    assert len(answer.times) == len(before)


def test_text_that_speaks_of_errors_is_text() -> None:
    answer = read([chunk("a"), chunk('"error"'), chunk("error"), chunk("", "stop"), DONE])
    assert answer.finished
    assert len(answer.times) == 3


def test_a_stream_that_breaks_off_is_not_finished() -> None:
    answer = read([chunk("a"), chunk("b")])
    assert not answer.finished
    assert answer.error == "truncated"
    assert answer.num_tokens == 2


def test_what_is_not_json_is_named() -> None:
    assert read([b"data: <html>\n\n"]).error == "garbled"
    assert read([chunk("a"), b"data: <html>\n\n"]).error == "garbled"


def test_a_refusal_keeps_its_status_and_its_words() -> None:
    answer = Answer(lambda _: None)
    head = Head(status=429, keep_alive=True, chunked=False, length=9, retry_after="3")
    answer.head(head, 0.0)
    answer.body(b'{"error": {"code": "overloaded", "message": "later"}}', 0.1)
    answer.over_at(0.2)
    assert (answer.error, answer.message, answer.finished) == ("http_429", "later", False)


def test_reasoning_and_messages_are_tokens_too() -> None:
    def delta(**fields: Any) -> bytes:
        choice = {"index": 0, "delta": fields, "finish_reason": None}
        return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"

    answer = read(
        [delta(role="assistant", content=""), delta(reasoning_content="hm"), delta(content="a"),
         b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\n', DONE]
    )  # fmt: skip
    assert list(answer.times) == [2.0, 3.0]


def test_a_client_that_has_read_enough_stops_and_is_content() -> None:
    ends: list[Answer] = []
    answer = Answer(ends.append, stop_after=2)
    answer.head(STREAM, 0.0)
    for second in (1.0, 2.0, 3.0):
        answer.body(chunk("a"), second)
    assert ends == [answer]
    assert answer.stopped
    assert answer.finished
    assert answer.num_tokens == 2


def test_giving_up_keeps_what_came_and_happens_once() -> None:
    ends: list[Answer] = []
    answer = Answer(ends.append)
    answer.head(STREAM, 0.0)
    answer.body(chunk("a"), 1.0)
    answer.give_up("timeout", "too long")
    answer.give_up("aborted", "by the client")
    answer.over_at(2.0)
    assert len(ends) == 1
    assert (answer.error, answer.num_tokens) == ("timeout", 1)
