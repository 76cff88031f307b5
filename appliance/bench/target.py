"""The server under test: who it is and what it takes, found out by asking it.

Each question is a request of the very form that the run will send, so what is accepted here is
accepted there. Nothing is assumed of the server but the OpenAI routes.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import msgspec

from appliance.bench.bodies import BodySettings, Route, Targets, head_maker, make_body
from appliance.bench.connection import Connection, Pool
from appliance.bench.http import Head
from appliance.bench.prompts import (
    ID_RANGES,
    IdPrompts,
    PromptMaker,
    TextPrompts,
    TextScale,
    words_of,
)
from appliance.bench.stream import Answer, StreamReceiver
from appliance.core.types import Record, Slo
from appliance.workload.items import Item

PROBE_SECONDS = 60.0
PROBE_TOKENS = 32
PROBE_ANSWER = 2
"""Tokens of prompt and of answer."""
NATURAL_MAX_TOKENS = 2048
"""Asked for where the model ends its answers: far above nearly all of them."""
SCALE_WORDS = (64, 320)


class BenchError(Exception):
    """The run cannot be made; the text names cause and fix."""


class Address(Record, frozen=True):
    """Where the server is."""

    url: str
    """Scheme, host, port."""
    host: str
    """Value of the Host header."""
    prefix: str
    """Path before `/v1`, without a slash at its end."""
    key: str = ""

    def head(self, path: str) -> Any:
        """The maker of heads of POST requests to `path`."""
        return head_maker(path=self.prefix + path, host=self.host, key=self.key)


class Target(Record, frozen=True):
    """What a run needs to know of the server."""

    address: Address
    settings: BodySettings
    first_id: int
    scale: TextScale
    max_model_len: int | None
    notes: Sequence[str] = ()
    """What a person should know, in sentences."""

    def prompts(self, salt: str) -> PromptMaker:
        """The maker of prompts for a run."""
        if self.settings.route is Route.IDS:
            return IdPrompts(salt, first_id=self.first_id)
        return TextPrompts(salt, scale=self.scale)


def address_of(url: str, *, key: str = "") -> Address:
    """Parse `--url`, with or without `/v1` at its end. Raises `BenchError`."""
    parts = urlsplit(url if "//" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BenchError(f"--url {url!r} is no address; write it like http://127.0.0.1:8000")
    prefix = parts.path.rstrip("/").removesuffix("/v1")
    base = f"{parts.scheme}://{parts.netloc}"
    return Address(url=base, host=parts.netloc, prefix=prefix, key=key)


async def probe(
    pool: Pool,
    address: Address,
    *,
    slos: Mapping[str, Slo],
    model: str = "",
    natural: bool = False,
    tell_targets: bool = True,
) -> Target:
    """Ask the server what it takes; `slos` are the classes of the workload. Raises `BenchError`."""
    card, notes = await _card(pool, address, model)
    name = str(card.get("id", model))
    length = card.get("max_model_len")
    max_len = length if isinstance(length, int) and length > 0 else None
    first = BodySettings(
        model=name, route=Route.IDS, natural=natural, natural_max_tokens=PROBE_ANSWER
    )
    asking = _Asking(pool, address, first)
    await asking.find_route()
    if asking.settings.route is not Route.IDS:
        await asking.find_scale()
        notes.append(
            f"the server takes no token ids: prompts are words, {asking.scale.per_word:.2f} tokens "
            "each, so lengths are approximate and shared prefixes nearly exact"
        )
    if tell_targets:
        notes += await asking.find_targets(slos)
    settings = asking.settings
    settings = msgspec.structs.replace(
        settings, natural_max_tokens=NATURAL_MAX_TOKENS, room=max_len
    )
    return Target(
        address=address,
        settings=settings,
        first_id=asking.first_id,
        scale=asking.scale,
        max_model_len=max_len,
        notes=tuple(notes),
    )


async def _card(pool: Pool, address: Address, model: str) -> tuple[dict[str, Any], list[str]]:
    status, raw = await fetch(pool, address, "/v1/models")
    if status in (401, 403):
        raise BenchError(f"the server wants a key ({status}): give it with --key")
    if status != 200:
        if model:
            return {"id": model}, [f"no list of models (GET /v1/models: {status})"]
        raise BenchError(f"GET /v1/models answered {status}: name the model with --model")
    document = msgspec.json.decode(raw)
    cards = [each for each in document.get("data", []) if isinstance(each, dict)]
    names = [str(each.get("id")) for each in cards]
    if not model and not cards:
        raise BenchError("the server lists no model; name one with --model")
    if model:
        found = [each for each in cards if each.get("id") == model]
        return (found[0], []) if found else ({"id": model}, [f"{model} is not among {names}"])
    return cards[0], [f"the first of {len(cards)} models"] if len(cards) > 1 else []


class _Asking:
    """Questions to one server, and what is known so far."""

    def __init__(self, pool: Pool, address: Address, settings: BodySettings) -> None:
        self._pool = pool
        self._address = address
        self.settings = settings
        self.first_id = ID_RANGES[0]
        self.scale = TextScale()

    async def find_route(self) -> None:
        """The first of the routes that is answered. Raises `BenchError`."""
        told: dict[str, list[str]] = {}
        for route, first_id in (
            *((Route.IDS, first) for first in ID_RANGES),
            (Route.TEXT, ID_RANGES[0]),
            (Route.CHAT, ID_RANGES[0]),
        ):
            self.settings = msgspec.structs.replace(self.settings, route=route)
            self.first_id = first_id
            answer = await self._ask(self._prompt())
            if answer.finished:
                return
            words = f"{answer.error} {answer.message}".strip()
            told.setdefault(words, []).append(str(route))
            if answer.status == 503 or not answer.status:
                break
        reasons = "; ".join(
            f"{', '.join(dict.fromkeys(routes))}: {words}" for words, routes in told.items()
        )
        raise BenchError(
            f"the server answers no route ({reasons}). Is --model right? One that knows no "
            "ignore_eos: try --natural."
        )

    async def find_scale(self) -> None:
        """Tokens per word. Without counts from the server a word is taken for a token."""
        counts: list[int] = []
        for index, number in enumerate(SCALE_WORDS):
            answer = await self._ask(msgspec.json.encode(words_of(number, seed=index)))
            if not answer.finished or answer.prompt_tokens is None:
                return
            counts.append(answer.prompt_tokens)
        few, many = SCALE_WORDS
        slope = max(0.1, (counts[1] - counts[0]) / (many - few))
        self.scale = TextScale(per_word=slope, fixed=max(0.0, counts[0] - slope * few))

    async def find_targets(self, slos: Mapping[str, Slo]) -> list[str]:
        """How much of each class the server can be told; notes about what it refused. Raises
        `BenchError` where it refuses all."""
        found: dict[str, Targets] = {}
        unknown: list[str] = []
        for name, slo in slos.items():
            form, answer = await self._form(name, slo)
            if not answer.finished:
                raise BenchError(
                    f"the server refuses targets ({answer.error}: {answer.message}); "
                    "leave them out with --no-slo"
                )
            found[name] = form
            if form is not Targets.FULL:
                unknown.append(name)
        self.settings = msgspec.structs.replace(self.settings, targets=found)
        if not unknown:
            return []
        names = ", ".join(sorted(unknown))
        return [f"the server does not know the classes {names}: it is told their targets alone"]

    async def _form(self, name: str, slo: Slo) -> tuple[Targets, Answer]:
        form = Targets.FULL
        settings = msgspec.structs.replace(self.settings, targets={name: form})
        answer = await self._ask(self._prompt(), settings=settings, slo=slo, name=name)
        if not answer.finished:
            form = Targets.NUMBERS
            settings = msgspec.structs.replace(self.settings, targets={name: form})
            answer = await self._ask(self._prompt(), settings=settings, slo=slo, name=name)
        return form, answer

    def _prompt(self) -> bytes:
        item = _item(Slo(), "probe")
        if self.settings.route is Route.IDS:
            return IdPrompts("probe", first_id=self.first_id)(item)
        return TextPrompts("probe", scale=self.scale)(item)

    async def _ask(
        self,
        prompt: bytes,
        *,
        settings: BodySettings | None = None,
        slo: Slo | None = None,
        name: str = "probe",
    ) -> Answer:
        settings = settings or self.settings
        body = make_body(_item(slo or Slo(), name), prompt=prompt, settings=settings)
        head = self._address.head(settings.route.path)
        return await ask(self._pool, head(len(body)) + body)


def _item(slo: Slo, name: str) -> Item:
    return Item(
        index=0,
        at=0.0,
        class_name=name,
        prompt_tokens=PROBE_TOKENS,
        output_tokens=PROBE_ANSWER,
        max_tokens=PROBE_ANSWER,
        slo=slo,
    )


async def ask(pool: Pool, request: bytes, *, seconds: float = PROBE_SECONDS) -> Answer:
    """Stream one answer to its end. Raises `BenchError` where there is no server."""
    over = asyncio.Event()
    answer = Answer(lambda _: over.set())
    connection = await _connect(pool, fresh=False)
    connection.begin(StreamReceiver(answer, answer.give_up), request)
    try:
        await asyncio.wait_for(over.wait(), seconds)
    except TimeoutError:
        answer.give_up("timeout", f"no answer within {seconds:g} s")
        connection.abort()
    return answer


async def fetch(pool: Pool, address: Address, path: str) -> tuple[int, bytes]:
    """GET a document: status and body. Raises `BenchError`."""
    lines = [f"GET {address.prefix}{path} HTTP/1.1", f"host: {address.host}"]
    if address.key:
        lines.append(f"authorization: Bearer {address.key}")
    lines.append("accept: */*")
    collector = _Collector(asyncio.get_running_loop().create_future())
    connection = await _connect(pool, fresh=True)
    connection.begin(collector, ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
    try:
        await asyncio.wait_for(collector.done, PROBE_SECONDS)
    except TimeoutError as error:
        connection.abort()
        raise BenchError(f"GET {path}: no answer within {PROBE_SECONDS:g} s") from error
    if collector.error:
        raise BenchError(f"GET {path}: {collector.error}")
    return collector.status, collector.raw


async def why_silent(pool: Pool, address: Address) -> str:
    """Why the server answers nothing at all, be it a refusal; empty where it does."""
    try:
        await fetch(pool, address, "/v1/models")
    except BenchError as error:
        return str(error.__cause__ or "") or str(error)
    return ""


async def _connect(pool: Pool, *, fresh: bool) -> Connection:
    try:
        return await pool.get(fresh=fresh)
    except OSError as error:
        raise BenchError(
            f"cannot connect to {pool.url}: {error.strerror or error}. Is --url right, and is the "
            "server up?"
        ) from error


class _Collector:
    """A receiver that keeps a whole body."""

    def __init__(self, done: "asyncio.Future[None]") -> None:
        self.done = done
        self.status = 0
        self.raw = b""
        self.error = ""

    def head(self, head: Head, now: float) -> None:  # noqa: ARG002
        """Status and headers are there."""
        self.status = head.status

    def body(self, data: bytes, now: float) -> None:  # noqa: ARG002
        """A part of the body."""
        self.raw += data

    def over(self, now: float) -> None:  # noqa: ARG002
        """The response is complete."""
        self._settle()

    def failed(self, kind: str, message: str) -> None:
        """It will not be."""
        self.error = f"{kind}: {message}"
        self._settle()

    def _settle(self) -> None:
        if not self.done.done():
            self.done.set_result(None)
