"""What the sinks write, byte for byte, and when an exchange is over."""

import asyncio
import json
from collections.abc import Sequence

import msgspec
import pytest

from appliance.api.observe import ApiStats, Meter
from appliance.api.render import ChunkTemplate, Identity, LogprobRenderer
from appliance.api.sinks import CollectSink, EventStream, Exchange, SseSink
from appliance.core.payload import TokenLogprobs
from appliance.core.stamps import Times
from appliance.core.types import ErrorKind, FinishReason, Slo, WorkerId
from appliance.live.records import Delta, End

IDENTITY = Identity(id="x-1", object="chunk", created=7, model="m")


class Wire(asyncio.WriteTransport):
    """A peer that reads nothing: what was written, and how it ended."""

    def __init__(self) -> None:
        super().__init__()
        self.data = b""
        self.writes = 0
        self.aborted = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.writes += 1
        self.data += bytes(data)

    def is_closing(self) -> bool:
        return self.aborted

    def get_write_buffer_size(self) -> int:
        return len(self.data)

    def abort(self) -> None:
        self.aborted = True


class Words:
    """Every token is the word `t<id>`."""

    def token_text(self, token: int) -> tuple[str, bytes]:
        text = f"t{token}"
        return text, text.encode()


def meter() -> Meter:
    return Meter(ApiStats().latency(Slo()), 0.0, lambda: 1.0)


def stream(num_answers: int = 1, *, include_usage: bool = False, cap: int = 10**6, slow=None):
    return EventStream(
        num_answers,
        asyncio.get_running_loop(),
        identity=IDENTITY,
        include_usage=include_usage,
        max_buffer=cap,
        on_slow=slow or (lambda: None),
    )


def sink(
    owner: EventStream,
    index: int = 0,
    *,
    chat: bool = True,
    include_usage: bool = False,
    running_usage: bool = False,
    logprobs: bool = False,
) -> SseSink:
    return SseSink(
        owner,
        meter=meter(),
        leads=index == 0,
        template=ChunkTemplate(IDENTITY, index, chat=chat, null_usage=include_usage),
        logprobs=LogprobRenderer(Words(), chat=chat) if logprobs else None,  # type: ignore[arg-type]
        running_usage=running_usage,
    )


def delta(text: str, tokens: Sequence[int] = (1,), logprobs=None) -> Delta:
    return Delta(tokens=list(tokens), text=text, logprobs=logprobs)


def good(reason: FinishReason = FinishReason.STOP, *, cached: int = 0, emitted: int = 1) -> End:
    return End(
        reason=reason,
        error=None,
        message="",
        prompt_tokens=5,
        cached_tokens=cached,
        emitted_tokens=emitted,
    )


def judged() -> End:
    """A good end that says where the time went."""
    times = Times(queue=0.1, prefill=0.2, transfer=0.0, decode=0.7, workers=(WorkerId(0),))
    return msgspec.structs.replace(good(), times=times)


def bad(kind: ErrorKind = ErrorKind.WORKER_LOST) -> End:
    return End(
        reason=None,
        error=kind,
        message="it broke",
        prompt_tokens=5,
        cached_tokens=0,
        emitted_tokens=0,
    )


def events(raw: bytes) -> list:
    assert raw.endswith(b"\n\n")
    lines = [part.removeprefix(b"data: ") for part in raw.split(b"\n\n")[:-1]]
    return [line.decode() if line == b"[DONE]" else json.loads(line) for line in lines]


def unchunk(raw: bytes) -> bytes:
    data = b""
    while raw:
        size, _, raw = raw.partition(b"\r\n")
        length = int(size, 16)
        data += raw[:length]
        assert raw[length : length + 2] == b"\r\n"
        raw = raw[length + 2 :]
    return data


async def test_a_chat_stream_has_role_content_reason_and_end_mark():
    wire, owner = Wire(), stream()
    answer = sink(owner)
    owner.open(wire, chunked=False)
    answer.push(delta('he"y\n'))
    answer.push(delta("", tokens=[2]))
    answer.push(delta("you"))
    answer.end(good())
    first, second, third, last, done = events(wire.data)
    assert first["choices"] == [
        {
            "index": 0,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
    ]
    assert second["choices"][0]["delta"] == {"content": 'he"y\n'}
    assert third["choices"][0]["delta"] == {"content": "you"}
    assert last["choices"][0] == {
        "index": 0,
        "delta": {},
        "logprobs": None,
        "finish_reason": "stop",
    }
    assert done == "[DONE]"
    for event in (first, second, third, last):
        assert {key: event[key] for key in ("id", "object", "created", "model")} == {
            "id": "x-1",
            "object": "chunk",
            "created": 7,
            "model": "m",
        }
        assert "usage" not in event
    assert wire.writes == 4  # one per step that had text, the reason, the end mark
    assert owner.over.done()


async def test_a_completion_stream_has_text():
    wire, owner = Wire(), stream()
    answer = sink(owner, chat=False)
    owner.open(wire, chunked=False)
    answer.push(delta("abc"))
    answer.end(good(FinishReason.LENGTH))
    first, last, _ = events(wire.data)
    assert first["choices"] == [
        {"index": 0, "text": "abc", "logprobs": None, "finish_reason": None}
    ]
    assert last["choices"] == [
        {"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}
    ]


async def test_what_comes_before_the_headers_waits():
    wire, owner = Wire(), stream()
    answer = sink(owner, chat=False)
    answer.push(delta("early"))
    owner.open(wire, chunked=True)
    answer.push(delta("late"))
    answer.end(good())
    texts = [event["choices"][0]["text"] for event in events(unchunk(wire.data))[:-1]]
    assert texts == ["early", "late", ""]


async def test_an_empty_answer_still_has_role_and_reason():
    wire, owner = Wire(), stream()
    answer = sink(owner)
    owner.open(wire, chunked=False)
    answer.end(good(emitted=0))
    first, last, done = events(wire.data)
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert last["choices"][0]["finish_reason"] == "stop"
    assert done == "[DONE]"


async def test_usage_comes_last_with_no_choices():
    wire, owner = Wire(), stream(2, include_usage=True)
    owner.usage.prompt_tokens = 5
    one, two = (sink(owner, index, include_usage=True) for index in range(2))
    owner.open(wire, chunked=False)
    one.push(delta("a", tokens=[1, 2]))
    two.push(delta("b"))
    one.end(good(cached=4))
    assert not owner.over.done()
    two.end(good(cached=5))
    *chunks, usage, done = events(wire.data)
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 3,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    assert all(chunk["usage"] is None for chunk in chunks)
    reasons = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["finish_reason"]]
    assert [choice["index"] for choice in reasons] == [0, 1]


async def test_running_usage_counts_every_chunk():
    wire, owner = Wire(), stream(include_usage=True)
    owner.usage.prompt_tokens = 5
    answer = sink(owner, include_usage=True, running_usage=True)
    owner.open(wire, chunked=False)
    for text in ("a", "", "b"):
        answer.push(delta(text))
    answer.end(good())
    chunks = [event for event in events(wire.data)[:-1] if event.get("usage")]
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 1, 2, 3, 3, 3]
    assert all(chunk["usage"]["prompt_tokens"] == 5 for chunk in chunks)


async def test_logprobs_of_a_token_without_text_are_sent():
    wire, owner = Wire(), stream()
    answer = sink(owner, logprobs=True)
    owner.open(wire, chunked=False)
    entry = TokenLogprobs(logprob=-0.5, top_ids=(1, 3), top_logprobs=(-0.5, -float("inf")))
    answer.push(delta("", tokens=[1], logprobs=[entry]))
    answer.end(good())
    chunk = events(wire.data)[1]["choices"][0]
    assert chunk["logprobs"]["content"] == [
        {
            "token": "t1",
            "logprob": -0.5,
            "bytes": [116, 49],
            "top_logprobs": [
                {"token": "t1", "logprob": -0.5, "bytes": [116, 49]},
                {"token": "t3", "logprob": -9999.0, "bytes": [116, 51]},
            ],
        }
    ]


async def test_r1_an_error_in_mid_stream_is_the_last_event():
    wire, owner = Wire(), stream(2)
    one, two = (sink(owner, index) for index in range(2))
    owner.open(wire, chunked=False)
    one.push(delta("a"))
    one.end(bad())
    two.push(delta("more"))
    two.end(good())
    *_, last = events(wire.data)
    assert last == {
        "error": {
            "message": "it broke",
            "type": "server_error",
            "param": None,
            "code": "worker_lost",
        }
    }
    assert owner.over.done()
    assert b"[DONE]" not in wire.data
    assert b"more" not in wire.data


async def test_an_error_before_the_headers_is_left_to_the_handler():
    wire, owner = Wire(), stream()
    sink(owner).end(bad())
    assert owner.error is not None
    assert owner.error.status == 503
    assert owner.over.done()
    assert wire.data == b""


async def test_an_error_while_the_headers_are_sent_is_not_lost():
    wire, owner = Wire(), stream()
    answer = sink(owner, chat=False)
    answer.push(delta("a"))
    answer.end(bad())
    owner.open(wire, chunked=False)
    text, error = events(wire.data)
    assert text["choices"][0]["text"] == "a"
    assert error["error"]["code"] == "worker_lost"


async def test_r15_a_reader_past_the_cap_is_cut_off_once():
    slow: list[str] = []
    wire, owner = Wire(), stream(cap=1000, slow=lambda: slow.append("slow"))
    answer = sink(owner, chat=False)
    owner.open(wire, chunked=True)
    for _ in range(100):
        answer.push(delta("x" * 50))
    assert wire.aborted
    assert len(wire.data) < 1500
    assert slow == []  # not from within push
    await asyncio.sleep(0)
    assert slow == ["slow"]
    answer.end(bad(ErrorKind.SLOW_READER))
    assert owner.over.done()


async def test_nothing_is_written_to_a_peer_that_has_gone():
    wire, owner = Wire(), stream()
    answer = sink(owner)
    owner.open(wire, chunked=True)
    wire.aborted = True
    answer.push(delta("a"))
    answer.push(delta("b"))
    answer.end(good())
    assert wire.data == b""


def collect(exchange: Exchange, *, chat: bool, logprobs: bool = True) -> CollectSink:
    renderer = LogprobRenderer(Words(), chat=chat) if logprobs else None  # type: ignore[arg-type]
    return CollectSink(exchange, meter=meter(), leads=True, logprobs=renderer)


async def test_a_collected_completion_has_columns_of_logprobs():
    exchange = Exchange(1, asyncio.get_running_loop())
    answer = collect(exchange, chat=False)
    for token in (1, 22):
        entry = TokenLogprobs(logprob=-1.0, top_ids=(3,), top_logprobs=(-0.1,))
        answer.push(delta(f"t{token}", tokens=[token], logprobs=[entry]))
    answer.end(good())
    assert answer.text == "t1t22"
    assert answer.logprobs == {
        "text_offset": [0, 2],
        "token_logprobs": [-1.0, -1.0],
        "tokens": ["t1", "t22"],
        "top_logprobs": [{"t3": -0.1, "t1": -1.0}, {"t3": -0.1, "t22": -1.0}],
    }
    assert exchange.over.done()
    assert exchange.usage.completion_tokens == 2


async def test_collected_logprobs_are_absent_when_not_asked_for():
    exchange = Exchange(1, asyncio.get_running_loop())
    assert collect(exchange, chat=True, logprobs=False).logprobs is None
    assert collect(exchange, chat=True).logprobs == {"content": [], "refusal": None}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("kind", "row"),
    [
        (None, (2, 0)),
        (ErrorKind.WORKER_LOST, (0, 1)),
        (ErrorKind.CANCELLED, (0, 0)),
        (ErrorKind.SLOW_READER, (0, 0)),
    ],
)
async def test_an_answer_counts_when_its_whole_request_is_complete(streamed, kind, row):
    stats, loop = ApiStats(), asyncio.get_running_loop()
    latency = stats.latency(Slo())
    owner = stream(2) if streamed else Exchange(2, loop)

    def answer(index: int):
        taken = Meter(latency, 0.0, lambda: 1.0)
        if not isinstance(owner, EventStream):
            return CollectSink(owner, meter=taken, leads=True, logprobs=None)
        template = ChunkTemplate(IDENTITY, index, chat=True, null_usage=False)
        return SseSink(
            owner, meter=taken, leads=True, template=template, logprobs=None, running_usage=False
        )

    one, two = answer(0), answer(1)
    for each in (one, two):
        each.push(delta("a"))
    one.end(judged())
    assert (latency.met, latency.missed, latency.lost) == (0, 0, 0)
    two.end(judged() if kind is None else bad(kind))
    met, lost = row
    assert (latency.met, latency.missed, latency.lost) == (met, 0, lost)
    assert owner.error_kind == kind


async def test_an_answer_that_completes_after_the_failure_of_another_is_lost_too():
    stats = ApiStats()
    latency = stats.latency(Slo())
    exchange = Exchange(2, asyncio.get_running_loop())
    one, two = (
        CollectSink(exchange, meter=Meter(latency, 0.0, lambda: 1.0), leads=True, logprobs=None)
        for _ in range(2)
    )
    one.end(bad())
    two.end(judged())
    assert (latency.met, latency.lost) == (0, 1)


@pytest.mark.parametrize("first", [0, 1])
async def test_the_first_failure_ends_the_exchange(first):
    exchange = Exchange(2, asyncio.get_running_loop())
    sinks = [collect(exchange, chat=True) for _ in range(2)]
    sinks[first].end(bad(ErrorKind.POISON))
    assert exchange.over.done()
    sinks[1 - first].end(good())
    assert exchange.error is not None
    assert exchange.error.body.code == "poison_request"
