"""Every configured worker as the Dispatcher knows it: what it reported, and what was sent to it.

A worker's own ledger is the truth and a slot is a hint about it. A slot counts what is on the way
(the requests assigned, their prefill tokens, those that move here), which no report shows yet."""

import math
from collections.abc import Iterable, Sequence

from appliance.core.cost import CostModel
from appliance.core.lifecycle import WorkerState, check_worker_move
from appliance.core.messages import CacheChanged, WorkerUp
from appliance.core.request_table import RequestRecord
from appliance.core.types import (
    BlockHash,
    CacheGroupSpec,
    MoveId,
    Request,
    RequestId,
    Role,
    WorkerLoad,
    WorkerSpec,
)
from appliance.core.view import WorkerView
from appliance.core.worker_tally import WorkerTally

NO_LOAD = WorkerLoad(
    blocks_total=0,
    blocks_free=0,
    blocks_cached=0,
    blocks_held=0,
    blocks_leased=0,
    queued=0,
    running=0,
    backlog_tokens=0,
)
SERVING = frozenset(
    {WorkerState.READY, WorkerState.DRAINING, WorkerState.FLIPPING, WorkerState.PARKED}
)
"""States in which a worker's reports about its work are heard."""


class WorkerSlot:
    """One worker. Changed only through `NodeState`, `LifeKeeper`, `Isolation`, `Flipper` and
    `Roster`; whoever changes what the view shows calls `touch`."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self.id = spec.id
        self.role = spec.role
        """The node's word; a worker that comes up with another one is told."""
        self.role_since = 0.0
        self.next_role: Role | None = None
        """The role it is about to take; None unless it flips."""
        self.role_epoch = 0
        """Number of the last `SetRole`."""
        self.parked = spec.parked
        """Wanted on standby: it gets no work, or is losing it."""
        self.on_call = True
        """The controller may wake it; False once an operator has parked it."""
        self.state = WorkerState.STARTING
        self.epoch = 0
        """Number of the present incarnation; 0 before the first start was asked for."""
        self.start_at: float | None = 0.0
        """When to (re)start it; None while it lives or is quarantined."""
        self.block_tokens = 1
        self.capacity_tokens: int | None = None
        """Tokens of one sequence that its pools can hold; None while it has never been up."""
        self.max_num_seqs = 0
        self.max_batch_tokens = 0
        self.load = NO_LOAD
        self.as_of = 0.0
        self.num_loads = 0
        """Reports with a load so far. A worker sends one before it first computes what it was
        given."""
        self.assigned: dict[RequestId, RequestRecord] = {}
        self.pending_tokens = 0
        """Sum of `pending` of those assigned."""
        self.tally = WorkerTally()
        """What `assigned` and `incoming` add up to."""
        self.incoming: dict[RequestId, RequestRecord] = {}
        """Requests of others that it pulls. They become `assigned` when their source has
        stopped."""
        self.promised_blocks = 0
        """What `incoming` needs. Part of it is reserved there already."""
        self.leased: dict[RequestId, MoveId] = {}
        """Sequences that have stopped here and whose KV it keeps for a peer."""
        self.leaving: dict[RequestId, RequestRecord] = {}
        """Live requests that it was told to forget, and has not yet."""
        self.moved_out = 0
        """Sequences that went on elsewhere, ever."""
        self.moves_refused = 0
        self.moves_after = 0.0
        """It refused to take part in a move: not asked again before this time."""
        self.changes = 0
        """Counts what may change a refusal: a request that left, a new incarnation."""
        self.cached: set[BlockHash] = set()
        self.tier: set[BlockHash] = set()
        """Blocks in its host tier."""
        self.reserved = False
        self.up_at: float | None = None
        """When this incarnation came up."""
        self.proved_at: float | None = None
        """Its last proof of health: a finished step, or an idle heartbeat."""
        self.given = False
        """It got work in this incarnation."""
        self.stepped = False
        """It finished a step in this incarnation."""
        self.bad_epochs: list[int] = []
        """Incarnations that died in a row and count towards quarantine."""
        self.last_words = ""
        """Why this incarnation could not start, in its own words."""
        self.last_cause = ""
        """What its last death was put down to."""
        self.seen: WorkerView | None = None
        """What policies see; None when something of it has changed since it was built."""

    def touch(self) -> None:
        """Something that the view shows has changed."""
        self.seen = None

    def seat(self, record: RequestRecord) -> None:
        """The request is this worker's."""
        self.assigned[record.request.id] = record
        self.tally.enter(record)
        self.seen = None

    def unseat(self, record: RequestRecord) -> None:
        """It is so no longer; its prefill has been settled."""
        del self.assigned[record.request.id]
        self.tally.leave(record)
        self.tally.end_decode(record)
        self.changes += 1
        self.seen = None

    def expect(self, record: RequestRecord, blocks: int) -> None:
        """The request begins to move here."""
        self.incoming[record.request.id] = record
        self.promised_blocks += blocks
        self.tally.enter(record)
        self.seen = None

    def unexpect(self, record: RequestRecord, blocks: int) -> None:
        """It has come, or does not."""
        del self.incoming[record.request.id]
        self.promised_blocks -= blocks
        self.tally.leave(record)
        self.changes += 1
        self.seen = None

    def go(self, state: WorkerState) -> None:
        """Change the state along the table."""
        check_worker_move(self.state, state, story=f"worker {self.id}, epoch {self.epoch}")
        self.state = state
        self.seen = None

    def up(self, report: WorkerUp, now: float) -> None:
        """Take over what the new incarnation says about itself; nothing is assigned or cached
        yet."""
        self.go(WorkerState.READY)
        self.max_num_seqs = report.max_num_seqs
        self.max_batch_tokens = report.max_batch_tokens
        self.block_tokens = report.groups[0].block_tokens if report.groups else 1
        self.capacity_tokens = capacity_tokens(report.groups)
        total = report.groups[0].num_blocks if report.groups else 0
        self.load = WorkerLoad(
            blocks_total=total,
            blocks_free=total,
            blocks_cached=0,
            blocks_held=0,
            blocks_leased=0,
            queued=0,
            running=0,
            backlog_tokens=0,
        )
        self.as_of = self.up_at = self.proved_at = now
        self.given = self.stepped = False
        self.changes += 1

    def down(self) -> None:
        """Forget what died with the incarnation. Its requests have been taken away before."""
        self.go(WorkerState.DEAD)
        self.load = NO_LOAD
        self.cached.clear()
        self.tier.clear()
        self.leased.clear()
        self.reserved = False
        self.moves_refused = 0
        self.moves_after = 0.0
        self.up_at = self.proved_at = None

    def note_load(self, load: WorkerLoad, now: float) -> None:
        """The worker's ledger and queues as it says."""
        self.load = load
        self.num_loads += 1
        self.as_of = now
        self.seen = None

    def note_cache(self, report: CacheChanged) -> None:
        """Blocks that can now be found there, and those that no longer can."""
        self.cached.difference_update(report.removed)
        self.cached.update(report.added)
        self.tier.difference_update(report.tier_removed)
        self.tier.update(report.tier_added)
        if report.tier_added or report.tier_removed:
            self.seen = None

    def cached_blocks(self, hashes: Sequence[BlockHash]) -> int:
        """Leading blocks of `hashes` believed to be there."""
        cached = self.cached
        if not cached:
            return 0
        for index, name in enumerate(hashes):
            if name not in cached:
                return index
        return len(hashes)

    def tier_blocks(self, hashes: Sequence[BlockHash], local: int) -> int:
        """Leading blocks of `hashes` that are there when the first `local` ones are, and those that
        follow come from its host tier."""
        tier, num_blocks = self.tier, local
        if tier:
            while num_blocks < len(hashes) and hashes[num_blocks] in tier:
                num_blocks += 1
        return num_blocks

    def missing_tokens(self, record: RequestRecord, num_blocks: int) -> int:
        """Tokens to prefill if the request came here and had KV of its first `num_blocks` blocks;
        at least one is always computed."""
        known = record.request.prompt_tokens + record.emitted
        return max(1, known - num_blocks * self.block_tokens)

    def is_open(self, queue_ahead: int, prefill_ahead: int) -> bool:
        """Whether it may get new work at all: ready, not reserved, not full. A worker whose role is
        prefill is full when it has `prefill_ahead` steps of prompts, so that what it cannot begin
        soon waits where it can be ordered, and reserves nothing at a decode worker."""
        return (
            self.state is WorkerState.READY
            and not self.reserved
            and len(self.assigned) + len(self.incoming) < self.max_num_seqs + queue_ahead
            and (
                self.role is not Role.PREFILL
                or self.pending_tokens < prefill_ahead * self.max_batch_tokens
            )
        )

    @property
    def costs(self) -> bool:
        """Whether its time counts: it is not on standby, nor quarantined. One that starts or winds
        down counts."""
        if self.parked and self.state is not WorkerState.DRAINING:
            return False
        return self.state is not WorkerState.QUARANTINED

    @property
    def capacity(self) -> float:
        """Tokens of one sequence that its pools can hold."""
        return math.inf if self.capacity_tokens is None else self.capacity_tokens

    @property
    def prefers_decode(self) -> bool:
        """Whether its role, or the one it is about to take, is for decoding."""
        return (self.next_role or self.role) is not Role.PREFILL

    @property
    def prefers_prefill(self) -> bool:
        """Whether its role, or the one it is about to take, is for prompts."""
        return (self.next_role or self.role) is not Role.DECODE

    def has_room(self, record: RequestRecord) -> bool:
        """Whether a sequence that moves here could run at once, as far as is known here."""
        if len(self.assigned) + len(self.incoming) >= self.max_num_seqs:
            return False
        return self.promised_blocks + self.blocks_of(record) <= self.load.blocks_free

    def blocks_of(self, record: RequestRecord) -> int:
        """Blocks that the sequence needs now, its next token included."""
        return -(-(record.request.prompt_tokens + record.emitted + 1) // self.block_tokens)

    def fits(self, request: Request, max_model_len: int) -> bool:
        """Whether the pool could hold the longest answer."""
        capacity = self.capacity_tokens
        return (
            capacity is None
            or request.prompt_tokens + request.max_tokens <= capacity  # the usual case, at once
            or kv_tokens(request, max_model_len) <= capacity
        )

    def takes(self, record: RequestRecord, now: float, *, max_model_len: int) -> bool:
        """Whether nothing speaks against this request here: the pool is large enough, it was not
        refused here since anything changed, and what it was here before is over."""
        if self.id in record.leaving or not self.fits(record.request, max_model_len):
            return False
        if not record.avoid:
            return True
        refusal = record.avoid.get(self.id)
        return refusal is None or refusal[0] != self.changes or now >= refusal[1]

    def view(self, cost: CostModel) -> WorkerView:
        """What policies see; built again only after a change."""
        if self.seen is None:
            self.seen = WorkerView(
                id=self.id,
                state=self.state,
                role=self.role,
                as_of=self.as_of,
                load=self.load,
                block_tokens=self.block_tokens,
                max_num_seqs=self.max_num_seqs,
                max_batch_tokens=self.max_batch_tokens,
                assigned=len(self.assigned),
                pending_tokens=self.pending_tokens,
                step_seconds=cost.step_seconds(self.id),
                reserved=self.reserved,
                incoming=len(self.incoming),
                leased=len(self.leased),
                tier_blocks=len(self.tier),
                role_since=self.role_since,
                next_role=self.next_role,
                decodes=self.tally.decodes,
                context_tokens=self.tally.context_tokens,
                tightest_tpot=self.tally.tightest_tpot,
                promised_blocks=self.promised_blocks,
                parked=self.parked,
                on_call=self.on_call,
            )
        return self.seen


def kv_tokens(request: Request, max_model_len: int) -> int:
    """Tokens whose KV the longest answer needs at once; that of the last token is never
    computed."""
    return min(request.prompt_tokens + request.max_tokens, max_model_len) - 1


def capacity_tokens(groups: Iterable[CacheGroupSpec]) -> int | None:
    """Longest sequence that the paged pools can hold; None if none of them keeps every token."""
    sizes = [group.num_blocks * group.block_tokens for group in groups if group.kind == "paged"]
    return min(sizes, default=None)
