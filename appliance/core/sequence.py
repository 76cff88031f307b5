"""One sequence in a Batcher, and the queues it stands in.

Where a sequence stands, and how it moves on::

    BLOCKED     waits until the leader of its n > 1 group has computed the prompt, or until cached
                blocks have been copied for it; no blocks
    WAITING     in the queue; no blocks
    RUNNING     admitted, may be planned
    LAST        admitted, its last allowed token is planned: it will end with that token
    PREEMPTED   lost its blocks to somebody, but planned steps still touch them
    CANCELLED   aborted, but planned steps still touch its blocks
    ENDED       finished, but steps planned before that was known still touch its blocks
    STOPPING    goes to another worker, but planned steps still compute it
    HELD        goes to another worker: computed no further here, its blocks are a lease

From LAST to STOPPING they are `stale`: they hold blocks, cannot be planned, and move on when a
planned step is finished. A held sequence is in no queue: it waits for the node. A sequence that has
left every planned step and every queue is forgotten.

With plan-ahead the counts come in two kinds: *planned* (`num_known`, `num_computed`: as if every
planned step had been done, which is what the next plan builds on) and *committed* (`num_emitted`,
`num_done`: by finished steps only, which is what may be told to others).
"""

from bisect import bisect_left, insort
from enum import Enum, auto

from appliance.core.blocks import BlockLedger, BlockTable
from appliance.core.step_model import StepModel
from appliance.core.types import (
    BatcherConfig,
    BlockHash,
    Phase,
    Request,
    RequestId,
    Slo,
    WorkerLoad,
)


class SeqState(Enum):
    """Where a sequence stands."""

    BLOCKED = auto()
    WAITING = auto()
    RUNNING = auto()
    LAST = auto()
    PREEMPTED = auto()
    CANCELLED = auto()
    ENDED = auto()
    STOPPING = auto()
    HELD = auto()


OVER = (SeqState.CANCELLED, SeqState.ENDED)
"""States in which no result counts any more."""


class LiveSequence:
    """Bookkeeping of one sequence; satisfies `SeqView`, so policies look at it as it is."""

    __slots__ = (
        "answer_abort",
        "cached_tokens",
        "capacity",
        "emitted_before",
        "first_token_at",
        "followers",
        "fresh",
        "hashes",
        "id",
        "last_step",
        "leader",
        "limit",
        "mark",
        "num_computed",
        "num_done",
        "num_emitted",
        "num_known",
        "num_outstanding",
        "num_sent",
        "num_shared",
        "order",
        "phase",
        "request",
        "slo",
        "state",
        "table",
        "target",
        "unsent",
    )

    def __init__(
        self, request: Request, *, emitted_tokens: int, limit: int, ticket: int, block_tokens: int
    ) -> None:
        self.request = request
        self.id: RequestId = request.id
        self.slo: Slo = request.slo
        self.order = (request.arrived, ticket)
        """Place in the queue: first come, first in it; never changes."""
        self.limit = limit
        """Known tokens (prompt and answer) at which it ends for length."""
        self.num_shared = min(
            (request.prompt_tokens - 1) // block_tokens, len(request.prefix_hashes)
        )
        """Leading blocks that the siblings of its n > 1 group can take over."""
        self.followers: list[LiveSequence] = []
        """Siblings that wait (BLOCKED) for those blocks."""
        self.leader: LiveSequence | None = None
        """Whom it waits for while BLOCKED."""
        self.hashes: list[BlockHash] = list(request.prefix_hashes)
        """Content of its full blocks of known tokens, as far as told."""
        self.state = SeqState.WAITING
        self.phase = Phase.PREFILL
        self.num_emitted = self.emitted_before = emitted_tokens
        self.num_known = request.prompt_tokens + emitted_tokens
        self.num_computed = 0
        """While waiting: what the prefix cache is expected to give."""
        self.num_done = 0
        self.target = self.num_known
        """Tokens to compute before the next new one can be sampled: the end of its prefill."""
        self.cached_tokens: int | None = None
        """Prompt tokens found in the cache at its first admission; None before."""
        self.first_token_at: float | None = None
        self.answer_abort = False
        """Somebody waits for `Aborted`."""
        # Blocks; all of this is reset when they are given back.
        self.table: BlockTable | None = None
        self.capacity = 0
        """Tokens that its table can hold."""
        self.num_sent = 0
        """Length of the table that work items have carried so far."""
        self.unsent = False
        """The next work item has something to say about the table."""
        self.fresh = False
        """The next work item is the first since admission."""
        self.mark = 0
        """`num_done` at which a block is complete that was not before."""
        # Planned steps.
        self.num_outstanding = 0
        """Planned and unfinished steps that compute it."""
        self.last_step = 0
        """The latest step that it was planned in."""

    @property
    def backlog(self) -> int:
        """Tokens of its prefill whose KV no finished step has computed."""
        return max(0, self.target - self.num_done)

    def story(self) -> str:
        """Everything about it in one line, for errors."""
        return (
            f"request {self.id}: {self.state.name}, {self.phase}, {self.request.prompt_tokens} "
            f"prompt tokens, emitted {self.num_emitted}, known {self.num_known}, computed "
            f"{self.num_computed}, done {self.num_done}, limit {self.limit}, in "
            f"{self.num_outstanding} planned steps, last {self.last_step}"
        )


def _order(seq: LiveSequence) -> tuple[float, int]:
    return seq.order


class Queues:
    """All sequences of one Batcher; satisfies `LocalView`. Only the Batcher and its planner
    change it.

    `waiting` is sorted by `order`, `running` is in the order of admission. A preempted sequence
    goes back to its own place, which under first come, first served is the front."""

    def __init__(
        self, config: BatcherConfig, ledger: BlockLedger, *, steps: StepModel | None = None
    ) -> None:
        self.config = config
        self.ledger = ledger
        self.steps = steps or StepModel()
        """How long a step of this worker lasts."""
        self.by_id: dict[RequestId, LiveSequence] = {}
        """Every sequence that is here in any state."""
        self.waiting: list[LiveSequence] = []
        self.running: list[LiveSequence] = []
        self.stale: set[RequestId] = set()
        self.num_blocked = 0
        self.num_over = 0
        """Of `running`, those in CANCELLED or ENDED."""
        self.num_stopping = 0
        """Of `running`, those in STOPPING; each keeps its slot."""
        self.num_held = 0
        self.num_reserved = 0
        """Slots kept for sequences that are on their way to this worker."""
        self.head_refused = False
        """In the latest plan there was no room for the first that waits."""
        self.backlog_tokens = 0
        """Sum of `backlog` over all that are not over."""

    # --- LocalView ------------------------------------------------------------------------------

    @property
    def free_blocks(self) -> int:
        """Of the scarcest cache group, evictable cached blocks included."""
        return self.ledger.num_free

    @property
    def total_blocks(self) -> int:
        """Of the smallest cache group."""
        return self.ledger.num_total

    @property
    def block_tokens(self) -> int:
        """Tokens in a block."""
        return self.ledger.block_tokens

    @property
    def max_num_seqs(self) -> int:
        """Sequences that one step may hold."""
        return self.config.max_num_seqs

    @property
    def max_batch_tokens(self) -> int:
        """Tokens that one step may compute."""
        return self.config.max_batch_tokens

    # --- moves ----------------------------------------------------------------------------------

    @property
    def free_slots(self) -> int:
        """Sequences that may still be admitted."""
        taken = len(self.running) - len(self.stale) + self.num_stopping + self.num_reserved
        return self.config.max_num_seqs - taken

    def oldest(self) -> LiveSequence | None:
        """The first of `running` that can be planned: it is never preempted."""
        for seq in self.running:
            if seq.state is SeqState.RUNNING:
                return seq
        return None

    def promise(self, seq: LiveSequence, spare: list[int]) -> None:
        """Add to `spare`, blocks per cache group, what a running sequence will need: the rest of
        its prefill, one to grow."""
        if seq.phase is Phase.PREFILL:
            have = seq.capacity // self.ledger.block_tokens
            needs = self.ledger.growth(have, self.ledger.blocks_for(seq.target))
            for group, need in enumerate(needs):
                spare[group] += need
        if seq.capacity < seq.limit - 1:
            for group in range(len(spare)):
                spare[group] += 1

    def load(self) -> WorkerLoad:
        """Blocks of all cache groups together, and the queues, as of now."""
        counts = self.ledger.counts()
        return WorkerLoad(
            blocks_total=counts.total,
            blocks_free=counts.free,
            blocks_cached=counts.cached,
            blocks_held=counts.held,
            blocks_leased=counts.leased,
            queued=len(self.waiting) + self.num_blocked,
            running=len(self.running) - self.num_over,
            backlog_tokens=self.backlog_tokens,
        )

    def promised(self) -> list[int]:
        """Blocks per cache group that those who run will need, and who comes new must leave."""
        spare = [0] * len(self.ledger.pools)
        for seq in self.running:
            if seq.state is SeqState.RUNNING:
                self.promise(seq, spare)
        return spare

    def leader_to_wait_for(self, seq: LiveSequence) -> LiveSequence | None:
        """The leader of its n > 1 group, if blocks of the prompt will be there to share that are
        not yet. A leader that is not here (any more) is not waited for."""
        group = seq.request.group
        if group is None or group == seq.id or not self.config.enable_prefix_cache:
            return None
        leader = self.by_id.get(group)
        if leader is None or leader.state in OVER:
            return None
        shared = min(seq.num_shared, leader.num_shared) * self.ledger.block_tokens
        return leader if leader.num_done < shared else None

    def enter(self, seq: LiveSequence, leader: LiveSequence | None) -> None:
        """Take in a new sequence: into the queue, or behind the `leader` whose prompt it shares."""
        self.by_id[seq.id] = seq
        self.backlog_tokens += seq.target
        if leader is None:
            insort(self.waiting, seq, key=_order)
        else:
            seq.state = SeqState.BLOCKED
            seq.leader = leader
            leader.followers.append(seq)
            self.num_blocked += 1

    def enter_blocked(self, seq: LiveSequence) -> None:
        """Take in a new sequence for which blocks are copied first; `unblock` lets it go on."""
        self.by_id[seq.id] = seq
        self.backlog_tokens += seq.target
        seq.state = SeqState.BLOCKED
        self.num_blocked += 1

    def unblock(self, seq: LiveSequence) -> None:
        """BLOCKED -> WAITING."""
        seq.state = SeqState.WAITING
        self.num_blocked -= 1
        insort(self.waiting, seq, key=_order)

    def admit(self, seq: LiveSequence, table: BlockTable) -> None:
        """WAITING -> RUNNING with a table that may hold blocks found in the cache."""
        self._leave_waiting(seq)
        self.running.append(seq)
        tokens = table.num_blocks * self.ledger.block_tokens
        seq.state = SeqState.RUNNING
        seq.table = table
        seq.num_computed = seq.num_done = seq.capacity = tokens
        seq.mark = tokens + self.ledger.block_tokens
        seq.num_sent = 0
        seq.fresh = seq.unsent = True
        self.backlog_tokens -= tokens
        if seq.cached_tokens is None:
            seq.cached_tokens = min(tokens, seq.request.prompt_tokens)
        if seq.followers and table.num_blocks >= seq.num_shared:
            self.free_followers(seq)

    def requeue(self, seq: LiveSequence) -> int:
        """RUNNING or PREEMPTED -> WAITING: its blocks go back, all its known tokens are to be
        computed again. No planned step may hold it. The caller takes it out
        of `running`. Returns the computed tokens it lost."""
        lost = seq.num_done
        self._give_blocks_back(seq)
        self.backlog_tokens -= seq.backlog
        seq.state = SeqState.WAITING
        seq.phase = Phase.PREFILL
        seq.num_computed = seq.num_done = 0
        seq.target = seq.num_known
        self.backlog_tokens += seq.target
        self.stale.discard(seq.id)
        insort(self.waiting, seq, key=_order)
        return lost

    def set_aside(self, seq: LiveSequence, state: SeqState) -> None:
        """Make an admitted sequence stale; it keeps its blocks until planned steps let it go."""
        seq.state = state
        self.stale.add(seq.id)

    def stop(self, seq: LiveSequence) -> None:
        """RUNNING -> STOPPING."""
        self.set_aside(seq, SeqState.STOPPING)
        self.num_stopping += 1

    def unstop(self, seq: LiveSequence) -> None:
        """STOPPING -> RUNNING."""
        seq.state = SeqState.RUNNING
        self.stale.discard(seq.id)
        self.num_stopping -= 1

    def hold(self, seq: LiveSequence) -> None:
        """STOPPING -> HELD, when no planned step holds it. The caller has leased its blocks."""
        self.running.remove(seq)
        self.stale.discard(seq.id)
        self.num_stopping -= 1
        self.num_held += 1
        self.backlog_tokens -= seq.backlog
        self._give_blocks_back(seq)
        seq.state = SeqState.HELD

    def unhold(self, seq: LiveSequence, table: BlockTable) -> None:
        """HELD -> RUNNING with what was its table, or -> WAITING without it if no slot is free."""
        self.num_held -= 1
        seq.table = table
        seq.capacity = table.num_blocks * self.ledger.block_tokens
        self.backlog_tokens += seq.backlog
        if self.free_slots <= 0:
            self.requeue(seq)
            return
        self._begin(seq)

    def land(self, seq: LiveSequence, table: BlockTable, num_tokens: int) -> None:
        """Take in a sequence that comes with the KV of `num_tokens` tokens, all but the last of
        those known. The caller has given its reserved slot back."""
        self.by_id[seq.id] = seq
        seq.table = table
        seq.capacity = table.num_blocks * self.ledger.block_tokens
        seq.num_computed = seq.num_done = seq.target = num_tokens
        seq.phase = Phase.DECODE
        self._begin(seq)

    def _begin(self, seq: LiveSequence) -> None:
        self.running.append(seq)
        seq.state = SeqState.RUNNING
        size = self.ledger.block_tokens
        seq.mark = (seq.num_done // size + 1) * size
        seq.num_sent = 0
        seq.fresh = seq.unsent = True

    def forget_held(self, seq: LiveSequence) -> None:
        """Drop a HELD sequence. The caller ends its lease."""
        self.num_held -= 1
        del self.by_id[seq.id]

    def end(self, seq: LiveSequence, state: SeqState) -> None:
        """CANCELLED or ENDED for an admitted sequence: no result of it counts any more."""
        if seq.state is SeqState.STOPPING:
            self.num_stopping -= 1
        self.set_aside(seq, state)
        self.num_over += 1
        self.backlog_tokens -= seq.backlog
        self.free_followers(seq)

    def forget_over(self, seq: LiveSequence) -> None:
        """A sequence that is over has left the last planned step. The caller takes it out of
        `running`."""
        self._give_blocks_back(seq)
        self.num_over -= 1
        self.stale.discard(seq.id)
        del self.by_id[seq.id]

    def forget_queued(self, seq: LiveSequence) -> None:
        """Drop a BLOCKED or WAITING sequence."""
        if seq.state is SeqState.WAITING:
            self._leave_waiting(seq)
        if seq.leader is not None:
            seq.leader.followers.remove(seq)
        if seq.state is SeqState.BLOCKED:
            self.num_blocked -= 1
        self.backlog_tokens -= seq.backlog
        del self.by_id[seq.id]
        self.free_followers(seq)

    def free_followers(self, leader: LiveSequence) -> None:
        """BLOCKED -> WAITING for all that waited for this leader."""
        for seq in leader.followers:
            seq.state = SeqState.WAITING
            seq.leader = None
            insort(self.waiting, seq, key=_order)
        self.num_blocked -= len(leader.followers)
        leader.followers.clear()

    def _leave_waiting(self, seq: LiveSequence) -> None:
        del self.waiting[bisect_left(self.waiting, seq.order, key=_order)]

    def _give_blocks_back(self, seq: LiveSequence) -> None:
        if seq.table is not None:
            self.ledger.close(seq.table)
            seq.table = None
        seq.capacity = 0
        seq.unsent = seq.fresh = False
