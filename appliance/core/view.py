"""What a policy may see: read-only, and never a true output length.

The Dispatcher's view of a worker is a hint that is as old as `as_of` says; the worker's own ledger
is the truth. `SeqView` is a Protocol that the Batcher's bookkeeping objects satisfy as they are, so
a step over hundreds of sequences copies nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Protocol

from appliance.core.answer_lengths import AnswerLengths
from appliance.core.lifecycle import WorkerState
from appliance.core.step_model import StepModel
from appliance.core.types import (
    BlockHash,
    Phase,
    Record,
    Request,
    RequestId,
    Role,
    Slo,
    WorkerId,
    WorkerLoad,
)


class WorkerView(Record, frozen=True, kw_only=True):
    """One worker as the Dispatcher knows it at `as_of`."""

    id: WorkerId
    state: WorkerState
    role: Role
    as_of: float
    load: WorkerLoad
    block_tokens: int
    max_num_seqs: int
    max_batch_tokens: int
    assigned: int
    """Requests assigned and not ended, whether the worker has reported them or not; those that
    move here not counted."""
    pending_tokens: int
    """Prefill tokens assigned whose first token has not been reported (includes those on the
    way)."""
    step_seconds: float
    """Mean of the recent steps; 0 before the first."""
    reserved: bool = False
    """Kept free of new work by the mechanism (a suspected poison request runs here alone)."""
    incoming: int = 0
    """Requests of other workers that it pulls."""
    leased: int = 0
    """Sequences that stopped here and whose KV it keeps for a peer."""
    tier_blocks: int = 0
    """Blocks in its host tier."""
    role_since: float = 0.0
    """When it took its role."""
    next_role: Role | None = None
    """The role it is about to take; None unless it flips."""
    parked: bool = False
    """Wanted on standby: it is parked, on its way there, or will be when it is up."""
    on_call: bool = True
    """The controller may wake it: no operator has parked it."""
    decodes: int = 0
    """Sequences that emit there."""
    context_tokens: int = 0
    """Their prompt and emitted tokens: the KV that a step reads."""
    tightest_tpot: float | None = None
    """The least TPOT budget of all that are there or on their way, the demoted aside."""
    promised_blocks: int = 0
    """What `incoming` needs."""


class PromptView(Record, frozen=True, kw_only=True):
    """One request whose prefill is assigned to a worker and not known to be done."""

    request: Request
    tokens: int
    """To compute, when it was assigned."""
    heard: bool
    """The worker has reported since: what it did of them is in `WorkerView.load`."""
    demoted: bool


class RunningView(Record, frozen=True, kw_only=True):
    """One request at a worker."""

    request: Request
    emitted: int
    decoding: bool
    """Its first token from there has come."""
    moving: bool
    demoted: bool = False
    first_token_at: float | None = None


class PrefixPlan(Record, frozen=True, kw_only=True):
    """What a worker need not compute of a prompt. The first `local_blocks` blocks are in its cache;
    with `pull_from` it would copy from that peer's cache until it has `pull_blocks`, in
    `copy_seconds`, because that is predicted to take less time than to compute them."""

    local_blocks: int = 0
    pull_from: WorkerId | None = None
    pull_blocks: int = 0
    copy_seconds: float = 0.0

    @property
    def num_blocks(self) -> int:
        """Blocks that are not computed."""
        return max(self.local_blocks, self.pull_blocks)


class QueueChanges(Record, frozen=True, kw_only=True):
    """What came into the queue and what left it, first first.

    `changes` are (request, it came); with `whole` they are the whole queue, and what was known of
    it before is void. `mark` is what to ask with next time."""

    mark: int
    changes: Sequence[tuple[Request, bool]]
    whole: bool = False


class Traffic(Record, frozen=True, kw_only=True):
    """What came and went since the node began; counts and sums."""

    arrived: int
    prompt_tokens: int
    finished: int
    emitted_tokens: int
    met: int
    """Answers with targets that met all of them."""
    missed: int
    demoted: int = 0
    """Requests whose targets were given up."""
    refused: int = 0
    """Requests that were accepted, and ended because their targets could not be met."""
    expected_tokens: float = 0.0
    """How long the answers of all that arrived are expected to be, as it was when each arrived."""
    prefilled_tokens: int = 0
    """Prompt tokens that were computed, those of a recomputation too."""
    instance_seconds: float = 0.0
    """What the workers cost: the time of each that it was not on standby (or quarantined), its
    starts and its winding down included; up to the last message."""


class Targets(Record, frozen=True, kw_only=True):
    """The tightest latency budgets of the live requests, in seconds; None: nobody has one."""

    ttft: float | None = None
    tpot: float | None = None


class CostView(Protocol):
    """What work costs on this node, as learnt so far; seconds."""

    @property
    def steps(self) -> StepModel:
        """How long a step lasts, learnt from all workers. For reading."""

    @property
    def lengths(self) -> AnswerLengths:
        """How long answers are, by class. For reading."""

    @property
    def tail(self) -> float:
        """Factor from the expected to the tail duration of a step."""

    def step_seconds(self, worker: WorkerId) -> float:
        """Mean of the worker's recent steps; 0 before the first."""

    def prefill_seconds(self, num_tokens: int, *, prefix_tokens: int = 0) -> float:
        """Computing the KV of that many tokens, which come after `prefix_tokens` others."""

    @property
    def decode_step_seconds(self) -> float:
        """A step that computes no prefill."""

    @property
    def answer_tokens(self) -> float:
        """Length of an answer."""

    def copy_seconds(self, num_bytes: int, bytes_per_second: float) -> float:
        """Copying cached blocks from a peer."""

    def decode_seconds(self, max_num_seqs: int) -> float:
        """A whole answer's share of the steps of a full batch."""

    def work_seconds(self, worker: WorkerView, new_tokens: int) -> float:
        """Work at this worker if it also got a sequence with `new_tokens` to prefill."""

    def backlog_seconds(
        self, workers: Iterable[WorkerView], *, num_waiting: int, waiting_tokens: int
    ) -> float:
        """Until what is assigned to `workers` and what waits is done."""


class NodeView(Protocol):
    """The node as the Dispatcher knows it."""

    @property
    def workers(self) -> Mapping[WorkerId, WorkerView]:
        """Every configured worker, dead ones too; another mapping as soon as anything changes."""

    @property
    def num_waiting(self) -> int:
        """Requests accepted and not placed."""

    @property
    def waiting_tokens(self) -> int:
        """Their prompt tokens."""

    @property
    def cost(self) -> CostView: ...

    def cached_blocks(self, worker: WorkerId, hashes: Sequence[BlockHash]) -> int:
        """How many leading blocks of `hashes` that worker is believed to hold."""

    def prefix_plan(self, worker: WorkerId, hashes: Sequence[BlockHash]) -> PrefixPlan:
        """What of a prompt with these blocks that worker has, or could copy for less than it would
        compute."""

    def willing(
        self, request: Request, now: float, phase: Phase = Phase.PREFILL
    ) -> Sequence[WorkerId]:
        """Workers that may get this request now, by the mechanism's rules. An answer of `place`
        outside of these is a mistake of the policy.

        For prefill, of a waiting request: ready, not reserved, not full, large enough, not one that
        has just refused it; those whose role is decode only while no ready worker prefers prefill.
        For decode, of a request at a worker that it should leave: workers that are linked with that
        one, have room, and prefer decode."""

    def links(self, worker: WorkerId) -> Mapping[WorkerId, float]:
        """Peers that this worker can copy from, with bytes per second as probed."""

    def prompts(self, worker: WorkerId) -> Sequence[PromptView]:
        """What of prefill is assigned to that worker, oldest first; few, unlike `running`."""

    def queue_changes(self, since: int) -> QueueChanges:
        """What came into the queue and what left it after the mark `since` (0: all), so that a
        policy can keep an order of its own without looking at all that waits."""

    def emitted(self, request: RequestId) -> int:
        """Tokens of this live request that were sent."""

    def is_demoted(self, request: RequestId) -> bool:
        """Whether the targets of this live request were given up."""

    def running(self, worker: WorkerId) -> Sequence[RunningView]:
        """What is assigned to that worker, oldest assignment first."""

    @property
    def traffic(self) -> Traffic:
        """Sums over the node's life."""

    @property
    def targets(self) -> Targets:
        """The tightest budgets of the live requests."""

    @property
    def num_spares(self) -> int:
        """Workers that could still be started beside those there are."""

    def overdue(self, now: float) -> int:
        """Waiting requests whose prompt cannot be computed any more before their target for the
        first token. Looks at each of them."""


class SeqView(Protocol):
    """One sequence in a Batcher."""

    @property
    def id(self) -> RequestId: ...

    @property
    def request(self) -> Request: ...

    @property
    def slo(self) -> Slo: ...

    @property
    def phase(self) -> Phase: ...

    @property
    def num_known(self) -> int:
        """Prompt and emitted tokens, planned ones included (their values may still be unknown)."""

    @property
    def num_computed(self) -> int:
        """Tokens whose KV is in place or planned."""

    @property
    def num_emitted(self) -> int: ...

    @property
    def emitted_before(self) -> int:
        """Those of `num_emitted` that were there when its KV was computed anew: they came from a
        worker that died. A move changes nothing about it."""

    @property
    def first_token_at(self) -> float | None:
        """When the first token after those came, from here or from where it moved away."""


class LocalView(Protocol):
    """One Batcher."""

    @property
    def waiting(self) -> Sequence[SeqView]:
        """Not admitted: they hold no blocks. In the order of the queue."""

    @property
    def running(self) -> Sequence[SeqView]:
        """Admitted: they hold blocks. In the order of admission."""

    @property
    def free_blocks(self) -> int:
        """Of the scarcest cache group, evictable cached blocks included."""

    @property
    def total_blocks(self) -> int: ...

    @property
    def block_tokens(self) -> int: ...

    @property
    def max_num_seqs(self) -> int: ...

    @property
    def max_batch_tokens(self) -> int: ...

    @property
    def steps(self) -> StepModel:
        """How long a step of this worker lasts. For reading."""

    @property
    def stale(self) -> AbstractSet[RequestId]:
        """Sequences that cannot be planned now (cancelled or preempted, still in a running
        step)."""
