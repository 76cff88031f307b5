"""Requests as bytes, made before they are due.

Encoding a long prompt takes a millisecond, which would be lateness of everything that is due then.
So bodies are made ahead: as many as fit into a budget of memory before the run, and for each one
sent the next one that is missing, right after the send.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Any

import msgspec

from appliance.bench.prompts import PromptMaker
from appliance.core.types import Record, Slo
from appliance.workload.items import Item

AHEAD_BYTES = 256 * 1024 * 1024


class Route(StrEnum):
    """What the server is asked."""

    IDS = "/v1/completions with token ids"
    TEXT = "/v1/completions with text"
    CHAT = "/v1/chat/completions"

    @property
    def path(self) -> str:
        """Path of the URL."""
        return self.value.split(" ", 1)[0]


class Targets(StrEnum):
    """What the server is told of a request's targets."""

    FULL = "class and targets"
    NUMBERS = "targets"
    NONE = "none"


class BodySettings(Record, frozen=True):
    """What all bodies of a run have in common."""

    model: str
    route: Route
    targets: Mapping[str, Targets] = {}
    """By class; a class that is not named here gets none."""
    natural: bool = False
    """No `ignore_eos`, and `max_tokens` far above every answer."""
    natural_max_tokens: int = 2048
    room: int | None = None
    """Tokens of prompt and answer together that the server takes, where that is known."""
    usage: bool = True
    """Ask for `stream_options.include_usage`."""
    extra: Mapping[str, Any] = {}


def slo_object(slo: Slo, targets: Targets) -> dict[str, Any] | None:
    """The `slo` of a body: milliseconds, and the class by name."""
    if targets is Targets.NONE:
        return None
    pairs = {"ttft_ms": slo.ttft, "tpot_ms": slo.tpot, "e2e_ms": slo.e2e}
    found: dict[str, Any] = {k: round(v * 1000, 3) for k, v in pairs.items() if v is not None}
    if targets is Targets.FULL:
        found["class"] = slo.class_name
    return found or None


def make_body(item: Item, *, prompt: bytes, settings: BodySettings) -> bytes:
    """The JSON of one request; `prompt` is encoded already."""
    document: dict[str, Any] = {
        "model": settings.model,
        "stream": True,
        "temperature": 0,
        "max_tokens": _max_tokens(item, settings),
        **settings.extra,
    }
    if not settings.natural:
        document["ignore_eos"] = True
    if settings.usage:
        document["stream_options"] = {"include_usage": True}
    targets = slo_object(item.slo, settings.targets.get(item.class_name, Targets.NONE))
    if targets is not None:
        document["slo"] = targets
    start = msgspec.json.encode(document)[:-1]
    if settings.route is Route.CHAT:
        return start + b',"messages":[{"role":"user","content":' + prompt + b"}]}"
    return start + b',"prompt":' + prompt + b"}"


def _max_tokens(item: Item, settings: BodySettings) -> int:
    if not settings.natural:
        return item.max_tokens
    room = settings.natural_max_tokens
    if settings.room is not None:
        room = min(room, settings.room - item.prompt_tokens)
    return max(1, room)


def head_maker(*, path: str, host: str, key: str) -> Callable[[int], bytes]:
    """A function from the length of a body to the head of its request."""
    lines = [
        f"POST {path} HTTP/1.1",
        f"host: {host}",
        "content-type: application/json",
        "accept: text/event-stream",
        "user-agent: appliance-bench",
    ]
    if key:
        lines.append(f"authorization: Bearer {key}")
    start = ("\r\n".join(lines) + "\r\ncontent-length: ").encode("latin-1")
    return lambda length: start + b"%d\r\n\r\n" % length


class Requests:
    """The requests of a run in the order of their times, made ahead of them."""

    def __init__(
        self,
        items: Sequence[Item],
        *,
        prompts: PromptMaker,
        settings: BodySettings,
        head: Callable[[int], bytes],
        ahead_bytes: int = AHEAD_BYTES,
    ) -> None:
        self._missing: Iterator[Item] = iter(items)
        self._prompts = prompts
        self._settings = settings
        self._head = head
        self._ahead = ahead_bytes
        self._ready: deque[bytes] = deque()
        self._bytes = 0
        self.fill()

    def fill(self) -> None:
        """Make all that fit."""
        while self._bytes < self._ahead and self.more():
            pass

    def take(self) -> bytes:
        """The next request, whole. Raises `StopIteration` when all were taken."""
        if not self._ready and not self.more():
            raise StopIteration
        request = self._ready.popleft()
        self._bytes -= len(request)
        return request

    def more(self) -> bool:
        """Make one; False when none is missing."""
        item = next(self._missing, None)
        if item is None:
            return False
        body = make_body(item, prompt=self._prompts(item), settings=self._settings)
        request = self._head(len(body)) + body
        self._ready.append(request)
        self._bytes += len(request)
        return True
