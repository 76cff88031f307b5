"""What the node and the surfaces in front of it say to each other.

A *submission* is one API request; it has one *sink* per answer (`n`). A sink is called
synchronously from the callback of a worker's frame: it must neither block nor await nor raise.
"""

import asyncio
from array import array
from typing import Protocol

from appliance.core.payload import Sampling, TokenLogprobs
from appliance.core.stamps import Times
from appliance.core.types import BlockHash, ErrorKind, FinishReason, Record, RequestId, Slo


class Rejected(Exception):
    """The node does not take this request now. `retry_after` in seconds when trying again helps."""

    def __init__(self, kind: ErrorKind, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason
        self.retry_after = retry_after


class Encoded(Record, frozen=True, kw_only=True):
    """Token ids of a prompt (`array("i")`) and the names of its full blocks under `salt`."""

    ids: "array[int]"
    hashes: tuple[BlockHash, ...] = ()
    salt: str = ""


class Submission(Record, frozen=True, kw_only=True):
    """One API request. `name` is its public id; answer `i` draws with `sampling.seed + i`.

    With another `salt` than the prompt was encoded with, its blocks are named again at
    submission."""

    name: str
    prompt: Encoded
    sampling: Sampling
    max_tokens: int
    slo: Slo = Slo()
    arrived: float | None = None
    """When the request arrived, on the node's clock (`time.monotonic`); None: now. Latency budgets
    are counted from here, so the time of tokenising is part of them."""
    salt: str = ""
    tenant: str = ""
    priority: int = 0


class Delta(Record, frozen=True, kw_only=True):
    """What one step, or several joined together, added to one answer; `text` may be empty while a
    character is incomplete."""

    tokens: list[int]
    text: str
    logprobs: list[TokenLogprobs] | None = None
    joined: list[tuple[int, str]] | None = None
    """The steps, if there were several: (number of tokens, text)."""

    def steps(self) -> list[tuple[int, str]]:
        """What each step added: (number of tokens, text)."""
        return [(len(self.tokens), self.text)] if self.joined is None else self.joined


class End(Record, frozen=True, kw_only=True):
    """How an answer ended: a `reason`, or an `error` with words for the client."""

    reason: FinishReason | None
    error: ErrorKind | None
    message: str
    prompt_tokens: int
    cached_tokens: int
    emitted_tokens: int
    times: Times | None = None
    """Where the time of a complete answer went."""
    retry_after: float | None = None
    """Of an error: seconds after which the same request might be served."""


class Sink(Protocol):
    """Takes one answer. `end` is called exactly once, after the last `push`."""

    def push(self, delta: Delta) -> None: ...

    def end(self, end: End) -> None: ...


class Ticket:
    """A submission that was accepted. `done` resolves when every sink has ended."""

    def __init__(self, name: str, request_ids: tuple[RequestId, ...]) -> None:
        self.name = name
        self.request_ids = request_ids
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.num_open = len(request_ids)

    def one_ended(self) -> None:
        """Count one answer as ended."""
        self.num_open -= 1
        if self.num_open == 0 and not self.done.done():
            self.done.set_result(None)


class Health(Record, frozen=True, kw_only=True):
    """Whether the node makes progress; `reason` in words either way."""

    ok: bool
    reason: str


class NodeInfo(Record, frozen=True, kw_only=True):
    """What does not change while the node lives. `created` is a Unix time in seconds."""

    model: str
    created: int
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    policy: str
    uses_priority: bool
    """Whether that policy looks at the `priority` of a request."""
    judges_budgets: bool
    """Whether that policy demotes or refuses what cannot be in time."""
    version: str
    fingerprint: str
    dtype: str
