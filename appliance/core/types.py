"""The nouns that every package shares.

Ids are small integers: they are cheap on the wire and mean nothing outside the node (the API keeps
its own strings). A `Request` is *one sequence*: an API request with `n > 1` becomes `n` requests
that name the same `group`. The core never sees a token id or a character; what the shells need
travels beside a message as an opaque payload (`appliance.core.payload`).

All times are seconds on one monotonic clock of the node; all sizes are tokens, blocks or bytes as
the name says.
"""

from enum import StrEnum
from typing import NewType

import msgspec

RequestId = NewType("RequestId", int)
WorkerId = NewType("WorkerId", int)
MoveId = NewType("MoveId", int)
"""One attempt to bring a sequence's KV from one worker to another; never used twice."""
BlockId = int
"""Index of a block in one cache group's pool of one worker."""
BlockHash = int
"""Unsigned 64-bit number that names a full block by content: hash(parent, token ids, adapter,
salt)."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """Base of every frozen record: keyword arguments only, compared by value."""


class Tagged(Record, frozen=True, kw_only=True, tag_field="t", tag=True):
    """Base of every message: encoded with its class name under `t`."""


class Phase(StrEnum):
    """What a sequence does in a step."""

    PREFILL = "prefill"
    DECODE = "decode"


class Role(StrEnum):
    """A preset over (prefill-token share, decode cap); a preference, never a prohibition."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


class FinishReason(StrEnum):
    """How an answer ended well (or was cut): the words of the OpenAI API."""

    STOP = "stop"
    LENGTH = "length"


class ErrorKind(StrEnum):
    """Why an accepted request ended without an answer: the machine-readable `code` of the API
    error."""

    CANCELLED = "cancelled"
    QUEUE_FULL = "queue_full"
    DRAINING = "draining"
    TOO_LONG = "context_length_exceeded"
    NO_WORKER = "no_worker"
    WORKER_LOST = "worker_lost"
    POISON = "poison_request"
    SLOW_READER = "slow_reader"
    DRAIN_TIMEOUT = "drain_timeout"
    BUDGET = "budget_unreachable"
    GRAMMAR = "grammar_too_complex"
    INTERNAL = "internal_error"


class OnMiss(StrEnum):
    """What becomes of a request whose budget cannot be met any more."""

    SERVE = "serve"
    """It is demoted: served after those that can still be in time, and never dropped."""
    REFUSE = "refuse"
    """While nothing of it was sent it is ended early, with `ErrorKind.BUDGET`."""


class Slo(Record, frozen=True, kw_only=True):
    """Latency budgets in seconds, `None` for "no target". `weight` is the class's value per
    request."""

    class_name: str = "default"
    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None
    weight: float = 1.0
    on_miss: OnMiss = OnMiss.SERVE

    @property
    def has_targets(self) -> bool:
        """Whether anything bounds it; without targets an answer is in time when it is complete."""
        return self.ttft is not None or self.tpot is not None or self.e2e is not None

    @property
    def bounds_start(self) -> bool:
        """Whether it can be missed by waiting for the first token."""
        return self.ttft is not None or self.e2e is not None


class Request(Record, frozen=True, kw_only=True):
    """One sequence to be answered, as the schedulers see it.

    `prefix_hashes` names the full blocks of the known tokens (prompt, and after a re-placement the
    emitted ones too), first block first. `max_tokens` bounds the answer and is *not* its length.
    """

    id: RequestId
    arrived: float
    prompt_tokens: int
    max_tokens: int
    slo: Slo = Slo()
    prefix_hashes: tuple[BlockHash, ...] = ()
    group: RequestId | None = None
    """Id of the first sequence of an `n > 1` group (the leader names itself); `None` when n = 1."""
    adapter: str | None = None
    decoding: str = "plain"
    tenant: str = ""
    priority: int = 0


class CacheGroupSpec(Record, frozen=True, kw_only=True):
    """One kind of KV state that a model keeps per sequence, held in equal blocks.

    `kind` "paged" keeps every token; "window" keeps the last `window` tokens and gives earlier
    blocks back. Most models have exactly one paged group.
    """

    name: str = "kv"
    kind: str = "paged"
    num_blocks: int
    block_tokens: int
    window: int | None = None


class SeqWork(Record, frozen=True, kw_only=True, array_like=True):
    """What one sequence does in one step.

    Tokens `start .. start + num_tokens` are computed; KV of tokens before `start` is in place.
    `new_blocks[g]` are the block ids appended to the sequence's table of cache group `g` since its
    last work item; with `fresh` the table starts anew and `new_blocks` is the whole table.
    `samples` says that the last computed position yields a new token.
    """

    id: RequestId
    start: int
    num_tokens: int
    phase: Phase
    samples: bool
    fresh: bool
    new_blocks: tuple[tuple[BlockId, ...], ...]


class StepPlan(Record, frozen=True, kw_only=True):
    """One forward step. `segments`, `grant` and `deadline` are for policies that look at the inbox
    within a step, lend time to background work, or bound the step; 1, 0 and None mean "plain"."""

    step: int
    work: tuple[SeqWork, ...]
    segments: int = 1
    grant: float = 0.0
    deadline: float | None = None


class SeqResult(Record, frozen=True, kw_only=True, array_like=True):
    """What came of one `SeqWork` that sampled: `num_tokens` new tokens (1; several under
    speculation).

    `stopped` is set when the shell saw a stop token or string. `hashes` names the blocks that
    became full of *known* tokens with these, in order.
    """

    id: RequestId
    num_tokens: int
    stopped: FinishReason | None = None
    hashes: tuple[BlockHash, ...] = ()


class StepResult(Record, frozen=True, kw_only=True):
    """The outcome of the step of the same number; one entry per work item that sampled, in its
    order."""

    step: int
    results: tuple[SeqResult, ...]
    elapsed: float


class WorkerSpec(Record, frozen=True, kw_only=True):
    """A worker as the operator asked for it: a group of one or more ranks, each on a device."""

    id: WorkerId
    devices: tuple[str, ...]
    role: Role = Role.MIXED
    parked: bool = False
    """Standby: its process is started and gets no work until it is woken."""


class WorkerLoad(Record, frozen=True, kw_only=True, array_like=True):
    """A worker's ledger and queues at one moment. `free` counts evictable cached blocks too (they
    are also shown as `cached`); `held` blocks belong to live sequences; `leased` are pinned for a
    peer. free + held + leased = total."""

    blocks_total: int
    blocks_free: int
    blocks_cached: int
    blocks_held: int
    blocks_leased: int
    queued: int
    running: int
    backlog_tokens: int
    """Tokens of queued and running sequences whose KV is still to be computed (prefill)."""


class BatcherConfig(Record, frozen=True, kw_only=True):
    """Bounds of one Batcher. `max_batch_tokens` is the budget of one step (decode tokens and
    prefill chunks together); `depth` is how many steps are planned ahead of the first uncommitted
    one."""

    max_model_len: int
    max_num_seqs: int = 64
    max_batch_tokens: int = 512
    depth: int = 0
    enable_prefix_cache: bool = True
