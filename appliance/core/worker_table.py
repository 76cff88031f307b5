"""Every configured worker as the Dispatcher knows it: what it reported, and what was sent to it.

A worker's own ledger is the truth and a slot is a hint about it. A slot counts what is on the way
(the requests assigned, their prefill tokens), which no report shows yet."""

from collections.abc import Iterable, Sequence

from appliance.core.cost import CostModel
from appliance.core.lifecycle import WorkerState, check_worker_move
from appliance.core.messages import CacheChanged, WorkerUp
from appliance.core.request_table import RequestRecord
from appliance.core.types import (
    BlockHash,
    CacheGroupSpec,
    Request,
    RequestId,
    WorkerLoad,
    WorkerSpec,
)
from appliance.core.view import WorkerView

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
SERVING = frozenset({WorkerState.READY, WorkerState.DRAINING})
"""States in which a worker's reports about its work are heard."""


class WorkerSlot:
    """One worker. Changed only through `NodeState`, `LifeKeeper` and `Isolation`; whoever changes
    what the view shows calls `touch`."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self.id = spec.id
        self.role = spec.role
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
        self.changes = 0
        """Counts what may change a refusal: a request that left, a new incarnation."""
        self.cached: set[BlockHash] = set()
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
        self._view: WorkerView | None = None

    def touch(self) -> None:
        """Something that the view shows has changed."""
        self._view = None

    def go(self, state: WorkerState) -> None:
        """Change the state along the table."""
        check_worker_move(self.state, state, story=f"worker {self.id}, epoch {self.epoch}")
        self.state = state
        self._view = None

    def up(self, report: WorkerUp, now: float) -> None:
        """Take over what the new incarnation says about itself; nothing is assigned or cached
        yet."""
        self.go(WorkerState.READY)
        self.role = report.role
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
        self.reserved = False
        self.up_at = self.proved_at = None

    def note_load(self, load: WorkerLoad, now: float) -> None:
        """The worker's ledger and queues as it says."""
        self.load = load
        self.num_loads += 1
        self.as_of = now
        self._view = None

    def note_cache(self, report: CacheChanged) -> None:
        """Blocks that can now be found there, and those that no longer can."""
        self.cached.difference_update(report.removed)
        self.cached.update(report.added)

    def cached_blocks(self, hashes: Sequence[BlockHash]) -> int:
        """Leading blocks of `hashes` believed to be there."""
        cached = self.cached
        if not cached:
            return 0
        for index, name in enumerate(hashes):
            if name not in cached:
                return index
        return len(hashes)

    def missing_tokens(self, record: RequestRecord) -> int:
        """Tokens to prefill if the request came here; at least one is always computed."""
        request = record.request
        cached = self.cached_blocks(request.prefix_hashes) * self.block_tokens
        return max(1, request.prompt_tokens + record.emitted - cached)

    def is_open(self, queue_ahead: int) -> bool:
        """Whether it may get new work at all: ready, not reserved, not full."""
        return (
            self.state is WorkerState.READY
            and not self.reserved
            and len(self.assigned) < self.max_num_seqs + queue_ahead
        )

    def takes(self, record: RequestRecord, now: float, *, max_model_len: int) -> bool:
        """Whether nothing speaks against this request here: the pool is large enough, and it was
        not refused here since anything changed."""
        capacity = self.capacity_tokens
        if capacity is not None and kv_tokens(record.request, max_model_len) > capacity:
            return False
        refusal = record.avoid.get(self.id)
        return refusal is None or refusal[0] != self.changes or now >= refusal[1]

    def view(self, cost: CostModel) -> WorkerView:
        """What policies see; built again only after a change."""
        if self._view is None:
            self._view = WorkerView(
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
            )
        return self._view


def kv_tokens(request: Request, max_model_len: int) -> int:
    """Tokens whose KV the longest answer needs at once; that of the last token is never
    computed."""
    return min(request.prompt_tokens + request.max_tokens, max_model_len) - 1


def capacity_tokens(groups: Iterable[CacheGroupSpec]) -> int | None:
    """Longest sequence that the paged pools can hold; None if none of them keeps every token."""
    sizes = [group.num_blocks * group.block_tokens for group in groups if group.kind == "paged"]
    return min(sizes, default=None)
