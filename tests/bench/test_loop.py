"""The open loop against a server that misbehaves: every request is an outcome."""

import asyncio
import contextlib
from time import perf_counter

import pytest

from appliance.bench.bodies import BodySettings, Requests, Route, Targets
from appliance.bench.connection import Pool
from appliance.bench.judge import outcome_of
from appliance.bench.loop import Asked, LoopSettings, OpenLoop
from appliance.bench.prompts import IdPrompts
from appliance.bench.target import address_of
from appliance.core.types import Slo
from appliance.metrics.outcome import Outcome
from appliance.workload.items import Item
from tests.bench.misbehaving_server import Stub


def items_of(*classes: str, gap: float = 0.01, tokens: int = 5, max_tokens: int = 0) -> list[Item]:
    """One request of each class, in order."""
    return [
        Item(
            index=index, at=index * gap, class_name=name, prompt_tokens=8, output_tokens=tokens,
            max_tokens=max_tokens or tokens, slo=Slo(class_name=name),
        )
        for index, name in enumerate(classes)
    ]  # fmt: skip


async def offer(
    url: str, items: list[Item], *, patience: float = 30.0, drain: float = 30.0
) -> list[Outcome]:
    """Outcomes in the order of the items."""
    settings = BodySettings(
        model="stub", route=Route.IDS, targets={item.class_name: Targets.FULL for item in items}
    )
    head = address_of(url).head(settings.route.path)
    requests = Requests(items, prompts=IdPrompts("s"), settings=settings, head=head)
    outcomes: list[Outcome] = []
    pool = Pool(url)

    def ended(asked: Asked) -> None:
        outcomes.append(outcome_of(asked, start=loop.start))

    loop = OpenLoop(
        items, requests=requests, pool=pool, on_end=ended,
        settings=LoopSettings(timeout=patience, drain=drain),
    )  # fmt: skip
    try:
        await loop.run()
    finally:
        await pool.close()
    assert loop.num_sent == loop.num_ended == len(items)
    return sorted(outcomes, key=lambda outcome: outcome.index)


async def test_every_answer_is_counted_and_connections_are_kept() -> None:
    async with Stub().running() as server:
        outcomes = await offer(server.url, items_of(*["a"] * 20))
        assert [outcome.num_tokens for outcome in outcomes] == [5] * 20
        assert all(outcome.finished and not outcome.error for outcome in outcomes)
        assert all(outcome.sent >= outcome.at - 0.001 for outcome in outcomes)
        assert len(server.connections) < 20


@pytest.mark.parametrize(
    ("way", "error", "num_tokens"),
    [
        ("truncated", "truncated", 2),
        ("error event", "worker_lost", 2),
        ("429", "http_429", 0),
        ("500", "http_500", 0),
    ],
)
async def test_a_failure_is_an_outcome_with_its_kind_and_the_others_go_on(
    way: str, error: str, num_tokens: int
) -> None:
    async with Stub({"bad": way}).running() as server:
        good, bad, after = await offer(server.url, items_of("a", "bad", "a"))
        assert (bad.error, bad.num_tokens, bad.finished) == (error, num_tokens, False)
        assert good.finished
        assert after.finished


async def test_an_answer_that_never_comes_is_given_up() -> None:
    async with Stub({"bad": "never"}).running() as server:
        bad, good = await offer(server.url, items_of("bad", "a"), patience=0.3)
        assert (bad.error, bad.first, bad.finished) == ("timeout", None, False)
        assert good.finished


async def test_what_is_open_when_the_drain_is_over_is_unfinished() -> None:
    async with Stub({"bad": "never"}).running() as server:
        bad, good = await offer(server.url, items_of("bad", "a"), drain=0.3)
        assert bad.error == "unfinished"
        assert good.finished


async def test_slow_headers_hold_up_no_other_request() -> None:
    async with Stub({"slow": "slow headers"}).running() as server:
        slow, *others = await offer(server.url, items_of("slow", *["a"] * 5))
        assert slow.finished
        assert slow.first is not None
        assert all(one.last is not None and one.last < slow.first for one in others)


async def test_nobody_at_the_port_is_an_outcome_too() -> None:
    async with Stub().running() as server:
        url = server.url
    outcomes = await offer(url, items_of("a", "a"))
    assert [outcome.error for outcome in outcomes] == ["refused", "refused"]


async def test_what_is_no_http_is_an_outcome_too() -> None:
    async def nonsense(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"hello\r\n\r\n")
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(nonsense, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        outcomes = await offer(f"http://127.0.0.1:{port}", items_of("a"))
    assert [outcome.error for outcome in outcomes] == ["protocol"]


async def test_a_connection_that_died_while_idle_is_replaced_without_a_failure() -> None:
    """A server closes idle connections when it likes, also while the next request is under way."""
    event = b'data: {"choices": [{"index": 0, "text": "a", "finish_reason": "length"}]}\n\n'
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    reply = head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(event), event)
    num_connections = 0
    over = asyncio.Semaphore(0)

    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_connections
        num_connections += 1
        request = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(request.split(b"content-length: ")[1]))
        writer.write(reply)
        await writer.drain()
        with contextlib.suppress(ConnectionError):
            await reader.read(1)  # the next request has begun
        writer.close()
        over.release()

    server = await asyncio.start_server(once, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        items = items_of("a", "a", "a", gap=0.2, tokens=1)
        outcomes = await offer(f"http://127.0.0.1:{port}", items)
        for _ in range(3):
            await over.acquire()
        await asyncio.sleep(0.05)
    assert [outcome.error for outcome in outcomes] == [""] * 3
    assert num_connections == 3


async def test_a_client_that_asks_for_more_than_it_wants_stops_reading() -> None:
    """`max_tokens` then says nothing about the length of the answer."""
    async with Stub().running() as server:
        (one,) = await offer(server.url, items_of("a", tokens=3, max_tokens=2_000))
        assert (one.num_tokens, one.finished, one.error) == (3, True, "")
        assert server.bodies[0]["max_tokens"] == 2_000


async def test_requests_are_sent_at_their_times_and_not_when_answers_come() -> None:
    async with Stub({"a": "never"}).running() as server:
        began = perf_counter()
        outcomes = await offer(server.url, items_of(*["a"] * 10), drain=0.2)
        assert perf_counter() - began < 20
        assert [outcome.error for outcome in outcomes] == ["unfinished"] * 10
        assert len(server.bodies) == 10
