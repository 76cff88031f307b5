"""The clients of the soak: what they do, what they may be told, and the accounts they keep.

Every client speaks plain HTTP and believes nothing: an answer counts as ended when its terminal
event was seen (one finish reason per choice and the end mark, or one error), exactly once. Answers
that are a function of their request (greedy, or sampled with a seed) are compared with the first
answer to the same request: whatever happened to the workers in between, the text must be the same.
"""

import asyncio
import json
import random
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import aiohttp

from appliance.core.types import Record

MODEL = "tiny-tasks"
REQUEST_SECONDS = 90.0
"""An accepted request that has not ended by then counts as never ended."""
ALLOWED_ERRORS = frozenset({"queue_full", "poison_request"})
"""What an accepted, well-formed request may be told. The second only because workers are killed on
purpose: a request that saw two deaths runs alone, and a third blow may hit it."""
MAX_KEPT = 50
STUCK_CHOICES = 4


class Violation(Record, frozen=True):
    """A promise that was broken; `at` in seconds of the run."""

    at: float
    kind: str
    detail: str


class Accounts:
    """What all clients saw."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.counts: Counter[str] = Counter()
        self.violations: list[Violation] = []
        self.num_violations = 0
        self.open = 0
        """Answers under way as clients see it."""
        self._texts: dict[tuple[int, int], str] = {}

    def violate(self, kind: str, detail: str) -> None:
        """Book a broken promise; the first ones are kept in words."""
        self.num_violations += 1
        if len(self.violations) < MAX_KEPT:
            at = round(time.monotonic() - self.began, 1)
            self.violations.append(Violation(at, kind, detail[:400]))

    def compare(self, prompt: int, choice: int, text: str) -> None:
        """The text of a deterministic answer: equal to the one seen first."""
        known = self._texts.setdefault((prompt, choice), text)
        self.counts["answers compared"] += 1
        if known != text:
            same = next(
                (i for i, (a, b) in enumerate(zip(known, text, strict=False)) if a != b),
                min(len(known), len(text)),
            )
            self.violate(
                "answer differs",
                f"prompt {prompt} choice {choice} from character {same}: "
                f"{known[same : same + 40]!r} became {text[same : same + 40]!r}",
            )


class Prompt(Record, frozen=True, kw_only=True):
    """One deterministic question."""

    number: int
    body: Mapping[str, Any]
    num_tokens: int
    """Of its answer."""
    greedy: bool


def make_prompts(rng: random.Random, count: int, *, longest_answer: int) -> list[Prompt]:
    """Questions of mixed lengths; a third of them share a long beginning."""
    shared = " ".join(f"w{rng.randrange(900)}" for _ in range(120))
    prompts = []
    for number in range(count):
        words = " ".join(f"w{rng.randrange(900)}" for _ in range(rng.choice((3, 10, 40, 200))))
        num_tokens = rng.choice((1, 4, 16, 40, 90, longest_answer))
        body: dict[str, Any] = {
            "model": MODEL,
            "prompt": f"{shared} {words}" if number % 3 == 0 else words,
            "max_tokens": num_tokens,
            "ignore_eos": True,
        }
        greedy = number % 2 == 0
        body |= {"temperature": 0} if greedy else {"temperature": 0.8, "seed": number}
        prompts.append(Prompt(number=number, body=body, num_tokens=num_tokens, greedy=greedy))
    return prompts


class Reply:
    """One answer as its client sees it: per choice the text and the finish reasons."""

    def __init__(self) -> None:
        self.texts: dict[int, str] = {}
        self.finishes: dict[int, list[str]] = {}
        self.error: str | None = None
        self.num_errors = 0
        self.num_done = 0
        self.usage: Mapping[str, int] | None = None
        self.misplaced = ""

    def line(self, line: bytes) -> None:
        """Take a line of an event stream."""
        if not line.startswith(b"data: "):
            return
        if self.num_done or self.num_errors:
            self.misplaced = f"after the end: {line[:80]!r}"
        data = line[6:].strip()
        if data == b"[DONE]":
            self.num_done += 1
        else:
            self.document(json.loads(data), text_of="text")

    def document(self, document: Mapping[str, Any], *, text_of: str) -> None:
        """Take a chunk, a whole answer, or an error."""
        if "error" in document:
            self.error = str(document["error"]["code"])
            self.num_errors += 1
            return
        for choice in document["choices"]:
            index = choice["index"]
            if choice[text_of] and self.finishes.get(index):
                self.misplaced = f"text of choice {index} after its finish reason"
            self.texts[index] = self.texts.get(index, "") + choice[text_of]
            if choice["finish_reason"]:
                self.finishes.setdefault(index, []).append(choice["finish_reason"])
        self.usage = document.get("usage") or self.usage

    def fault(self, *, n: int, streamed: bool) -> str:
        """Why this is not exactly one terminal event per choice; empty if it is."""
        if self.misplaced:
            return self.misplaced
        if self.num_errors:
            if self.num_errors > 1 or self.num_done:
                return f"{self.num_errors} errors and {self.num_done} end marks"
            return ""
        if streamed and self.num_done != 1:
            return f"{self.num_done} end marks; finish reasons {self.finishes}"
        if self.finishes != {index: ["length"] for index in range(n)}:
            return f"finish reasons {self.finishes} for {n} choices"
        return ""


class Clients:
    """All kinds of clients of one server."""

    def __init__(
        self, url: str, prompts: Sequence[Prompt], accounts: Accounts, *, hold_seconds: float
    ) -> None:
        """`hold_seconds`: how long a stuck reader reads nothing, at most."""
        self.url = url
        self.accounts = accounts
        self._prompts = prompts
        self._hold_seconds = hold_seconds
        self._session: aiohttp.ClientSession | None = None
        self.until = 0.0
        """When the load ends, on the monotonic clock."""

    async def open(self) -> None:
        """Begin with fresh connections."""
        timeout = aiohttp.ClientTimeout(total=REQUEST_SECONDS)
        connector = aiohttp.TCPConnector(limit=0)
        self._session = aiohttp.ClientSession(timeout=timeout, connector=connector)

    async def close(self) -> None:
        """Give all connections back."""
        if self._session is not None:
            await self._session.close()

    @property
    def session(self) -> aiohttp.ClientSession:
        """The open session."""
        assert self._session is not None
        return self._session

    async def ask(self, rng: random.Random, *, n: int = 1) -> None:
        """A well-behaved request, streamed or not; everything about its end is checked."""
        prompt = rng.choice(self._prompts)
        streamed = rng.random() < 0.6
        body = {**prompt.body, "n": n, "stream": streamed}
        if streamed and rng.random() < 0.5:
            body["stream_options"] = {"include_usage": True}
        self.accounts.open += 1
        try:
            reply = await self._exchange(body, streamed=streamed)
        except TimeoutError:
            self.accounts.violate("no terminal event", f"prompt {prompt.number} n={n} {streamed=}")
        except (aiohttp.ClientError, ConnectionError, ValueError, KeyError) as error:
            self.accounts.violate("connection broke", f"prompt {prompt.number}: {error!r}")
        else:
            self._judge(reply, prompt, n=n, streamed=streamed)
        finally:
            self.accounts.open -= 1

    async def _exchange(self, body: Mapping[str, Any], *, streamed: bool) -> Reply:
        reply = Reply()
        async with self.session.post(self.url + "/v1/completions", json=body) as answer:
            self.accounts.counts[f"status {answer.status}"] += 1
            if answer.status != 200 or not streamed:
                reply.document(await answer.json(), text_of="text")
                late = answer.status in (429, 503) and "Retry-After" not in answer.headers
                if late:
                    self.accounts.violate("no Retry-After", f"status {answer.status}")
                return reply
            async for line in answer.content:
                reply.line(line)
        return reply

    def _judge(self, reply: Reply, prompt: Prompt, *, n: int, streamed: bool) -> None:
        accounts = self.accounts
        if reply.error is not None:
            accounts.counts[f"error {reply.error}"] += 1
            if reply.error not in ALLOWED_ERRORS:
                accounts.violate("error", f"{reply.error} for prompt {prompt.number}")
            if reply.error == "queue_full":
                return  # refused, not accepted
        accounts.counts["requests accepted and ended"] += 1
        fault = reply.fault(n=n, streamed=streamed and reply.error is None)
        if fault:
            accounts.violate("terminal events", f"prompt {prompt.number} n={n}: {fault}")
        if reply.error is not None or fault:
            return
        total = n * prompt.num_tokens
        if reply.usage is not None and reply.usage["completion_tokens"] != total:
            accounts.violate("usage", f"{reply.usage} for {total} tokens")
        accounts.counts["tokens received"] += total
        for choice, text in reply.texts.items():
            accounts.compare(prompt.number, 0 if prompt.greedy else choice, text)

    async def chat(self, rng: random.Random) -> None:
        """A conversation that ends by itself."""
        word = f"ocean{rng.randrange(40)}"
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": f"Spell {word} letter by letter."}],
            "temperature": 0,
            "max_completion_tokens": 60,
        }
        try:
            async with self.session.post(self.url + "/v1/chat/completions", json=body) as answer:
                document = await answer.json()
        except TimeoutError:
            self.accounts.violate("no terminal event", f"chat {word}")
            return
        self.accounts.counts[f"status {answer.status}"] += 1
        code = document["error"]["code"] if answer.status != 200 else ""
        if code and code not in ALLOWED_ERRORS:
            self.accounts.violate("error", f"{code} for a chat")
        elif not code and document["choices"][0]["finish_reason"] not in ("stop", "length"):
            self.accounts.violate("terminal events", f"chat: {document['choices']}")
        elif not code:
            self.accounts.counts["requests accepted and ended"] += 1
            self.accounts.compare(
                -int(word[5:]) - 1, 0, document["choices"][0]["message"]["content"]
            )

    async def abandon(self, rng: random.Random) -> None:
        """Hang up: while the body is sent, queued, in prefill, or between two tokens."""
        body = {
            "model": MODEL,
            "prompt": " ".join(f"w{rng.randrange(900)}" for _ in range(rng.choice((3, 80, 700)))),
            "max_tokens": rng.choice((20, 200, 600)),
            "ignore_eos": True,
            "stream": rng.random() < 0.6,
            "n": rng.choice((1, 1, 2, 4)),
        }
        try:
            async with asyncio.timeout(rng.choice((0.001, 0.01, 0.05, 0.3, 1.0)) * rng.random()):
                async with self.session.post(self.url + "/v1/completions", json=body) as answer:
                    await answer.read()
            self.accounts.counts["abandoned too late"] += 1
        except TimeoutError:
            self.accounts.counts["abandoned"] += 1

    async def stick(self, rng: random.Random) -> None:
        """Ask for a fat stream and read none of it for a while; then read on, or go. Not at the end
        of a round, which would be held up."""
        if time.monotonic() + self._hold_seconds > self.until:
            return
        body = {
            "model": MODEL,
            "prompt": f"w{rng.randrange(900)}",
            "max_tokens": 1500,
            "ignore_eos": True,
            "stream": True,
            "logprobs": 20,  # some megabytes in all: more than kernels hold for a connection
            "n": STUCK_CHOICES,
        }
        loop = asyncio.get_running_loop()
        host, _, port = self.url.removeprefix("http://").partition(":")
        with socket.socket() as sock:
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            try:
                await loop.sock_connect(sock, (host, int(port)))
                await loop.sock_sendall(sock, raw_request(body))
                await asyncio.sleep(rng.uniform(0.3, 1.0) * self._hold_seconds)
                if rng.random() < 0.5:
                    self.accounts.counts["stuck readers gone"] += 1
                    return
                async with asyncio.timeout(REQUEST_SECONDS):
                    self._judge_late(await read_all(loop, sock))
            except ConnectionError:
                self.accounts.counts["stuck readers cut"] += 1
            except TimeoutError:
                self.accounts.violate("no terminal event", "a reader that was stuck for a while")

    def _judge_late(self, data: bytes) -> None:
        ends = data.count(b'"finish_reason":"length"') + data.count(b'data: {"error"')
        if data.startswith(b"HTTP/1.1 429"):
            self.accounts.counts["stuck readers refused"] += 1
        elif ends == STUCK_CHOICES and data.count(b"data: [DONE]") == 1:
            self.accounts.counts["stuck readers served"] += 1
        elif b"data: [DONE]" not in data and b'data: {"error"' not in data:
            self.accounts.counts["stuck readers cut"] += 1
        else:
            self.accounts.violate("terminal events", f"{ends} in a stuck reader's stream")

    async def burst(self, rng: random.Random, count: int) -> None:
        """Far more than fits, all at once."""
        self.accounts.counts["bursts"] += 1
        seeds = [rng.random() for _ in range(count)]
        await asyncio.gather(*(self.ask(random.Random(seed)) for seed in seeds))

    async def offend(self, rng: random.Random) -> None:
        """A request that must be refused with a typed error, whatever is wrong with it."""
        body = rng.choice(OFFENCES)(rng)
        route = rng.choice(("/v1/completions", "/v1/chat/completions"))
        headers = {"Content-Type": "application/json"}
        async with self.session.post(self.url + route, data=body, headers=headers) as answer:
            try:
                code = (await answer.json())["error"]["code"]
            except (ValueError, KeyError, TypeError):
                code = None
        self.accounts.counts["malformed bodies"] += 1
        if not 400 <= answer.status < 500 or not code:
            self.accounts.violate("malformed body", f"{answer.status} {code} for {body[:80]!r}")

    async def mumble(self, rng: random.Random) -> None:
        """Bytes that are no whole request, then silence or a hang-up."""
        reader, writer = await asyncio.open_connection(
            *self.url.removeprefix("http://").split(":"), limit=1 << 16
        )
        whole = raw_request({"model": MODEL, "prompt": "w1", "max_tokens": 40})
        choices = (rng.randbytes(200), whole[: rng.randrange(len(whole))], whole)
        try:
            writer.write(rng.choice(choices))
            await writer.drain()
            async with asyncio.timeout(rng.random() * 0.3):
                await reader.read(1 << 16)
        except (TimeoutError, ConnectionError):
            pass
        finally:
            writer.close()
            await asyncio.gather(writer.wait_closed(), return_exceptions=True)
        self.accounts.counts["broken connections"] += 1

    async def look(self, rng: random.Random) -> None:
        """What monitors ask for. Health must hold through every blow."""
        path = rng.choice(("/health", "/metrics", "/v1/models", "/admin/state", "/ready"))
        method = rng.choice(("GET", "HEAD"))
        async with self.session.request(method, self.url + path) as answer:
            await answer.read()
        self.accounts.counts["looks"] += 1
        if answer.status != 200:
            self.accounts.violate("monitoring", f"{method} {path} gave {answer.status}")

    def repertoire(self) -> tuple[Sequence[Callable[[random.Random], Awaitable[None]]], list[int]]:
        """What one user may do next, and how often."""
        weighted = {
            self.ask: 44,
            self._ask_several: 10,
            self.chat: 6,
            self.abandon: 22,
            self.stick: 1,
            self.offend: 6,
            self.mumble: 3,
            self.look: 6,
        }
        return list(weighted), list(weighted.values())

    async def _ask_several(self, rng: random.Random) -> None:
        await self.ask(rng, n=rng.choice((2, 3, 4)))


async def read_all(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> bytes:
    """Everything until the peer ends the connection."""
    parts = []
    while part := await loop.sock_recv(sock, 1 << 16):
        parts.append(part)
    return b"".join(parts)


def raw_request(body: Mapping[str, Any]) -> bytes:
    """A completion request as bytes; the connection ends with the answer."""
    data = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: soak\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


def _with(**fields: Any) -> Callable[[random.Random], bytes]:
    body = {"model": MODEL, "prompt": "w1", "messages": [{"role": "user", "content": "w1"}]}
    return lambda _: json.dumps({**body, **fields}).encode()


OFFENCES: Sequence[Callable[[random.Random], bytes]] = (
    lambda rng: rng.randbytes(rng.randrange(1, 300)),
    lambda rng: b'{"model": "tiny-tasks", "prompt": "w1"'[: rng.randrange(1, 38)],
    lambda _: b"[" * 5000,
    _with(max_tokens=0),
    _with(max_tokens="many"),
    _with(temperature=-1),
    _with(model="other"),
    _with(n=10**6),
    _with(prompt="w1 " * 30_000, messages=[{"role": "user", "content": "w1 " * 30_000}]),
    _with(logit_bias={"no number": 1}),
    _with(stop=["x"] * 1000),
    _with(stream_options={"include_usage": True}),
    _with(prompt=None, messages=None),
)
