"""Closed, tagged unions: what the node's two schedulers say and hear.

A `Command` goes from the Dispatcher to one worker's Batcher, a `Report` comes back, an `Event`
comes from outside, an `Effect` goes to the shell around the Dispatcher. The same structs are the
control pipe's frames, the journal's lines and a simulator's queue. Commands are imperative, the
rest past.

A sequence goes from worker to worker in a *move* (`docs/moves.md`): the target hears `Pull`, the
source `Migrate`, both with the same `MoveId`; they settle the copy between themselves
(`appliance.core.peer`), the source says `Prefilled` when it computes no more, the target `KvPulled`
when it decodes, and the source hears `Release`, or `Resume` if the move failed.
"""

from appliance.core.asks import (
    Answered,
    Decided,
    ParkAsked,
    RolesAsked,
    WakeAsked,
    WorkerAsked,
)
from appliance.core.stamps import Times
from appliance.core.types import (
    BlockHash,
    CacheGroupSpec,
    ErrorKind,
    FinishReason,
    MoveId,
    Record,
    Request,
    RequestId,
    Role,
    Tagged,
    WorkerId,
    WorkerLoad,
)

# --- Commands: Dispatcher -> worker -------------------------------------------------------------


class Assign(Tagged, frozen=True, kw_only=True):
    """Serve this sequence. Payload: `SequenceState` (prompt and emitted ids, sampling, stop rules).

    `emitted_tokens` were sent to the client before and are known tokens: the worker computes their
    KV and goes on with the next one. With `pull_from` the first `pull_blocks` blocks of
    `prefix_hashes` are believed to be in that peer's cache (`HOST_TIER`: in this worker's own host
    memory): those that are not here are copied, not computed; what cannot be had is computed."""

    worker: WorkerId
    request: Request
    emitted_tokens: int = 0
    pull_from: WorkerId | None = None
    pull_blocks: int = 0


class Abort(Tagged, frozen=True, kw_only=True):
    """Forget this sequence; answered by `Aborted` once its blocks are free (also if unknown)."""

    worker: WorkerId
    request_id: RequestId


class Pull(Tagged, frozen=True, kw_only=True):
    """Take this sequence over from `source`: reserve blocks, copy its KV as it is finished there,
    go on when the source has stopped. Payload: `SequenceState` as of `emitted_tokens`; what the
    source emits after that comes with its last offer. Answered by `KvPulled` or `PullFailed`."""

    worker: WorkerId
    move: MoveId
    request: Request
    source: WorkerId
    emitted_tokens: int = 0


class Migrate(Tagged, frozen=True, kw_only=True):
    """Let `target` pull this sequence while it is computed, then stop here; answered by
    `Prefilled`, or `Refused`. Not before the target has reserved its blocks, and not before the
    prompt is computed. With `live` the sequence decodes on until the target is nearly up to date,
    without it stops with the first token."""

    worker: WorkerId
    move: MoveId
    request_id: RequestId
    target: WorkerId
    live: bool = False
    lease_seconds: float = 10.0
    """How long the KV is kept for the target after the stop, unless `Release` or `Resume` comes."""


class Resume(Tagged, frozen=True, kw_only=True):
    """The move is off: go on with this sequence here, whether it has stopped or not. Answered by
    `Released` (`expired`) if it is gone."""

    worker: WorkerId
    move: MoveId
    request_id: RequestId


class Release(Tagged, frozen=True, kw_only=True):
    """The peer holds the KV of this sequence: end its lease; answered by `Released`."""

    worker: WorkerId
    move: MoveId
    request_id: RequestId


class SetRole(Tagged, frozen=True, kw_only=True):
    """Take this role; answered by `RoleChanged` with the same epoch, or `Refused`."""

    worker: WorkerId
    role: Role
    epoch: int


class SetBudget(Tagged, frozen=True, kw_only=True):
    """Bound a step: tokens of prefill per step and sequences in decode."""

    worker: WorkerId
    prefill_tokens: int
    max_decodes: int


class LoadWeights(Tagged, frozen=True, kw_only=True):
    """Have the weights in place, from this peer or (None) from the node's slab or disk."""

    worker: WorkerId
    source: WorkerId | None = None


class Park(Tagged, frozen=True, kw_only=True):
    """Give up serving, keep process and mappings."""

    worker: WorkerId


class Wake(Tagged, frozen=True, kw_only=True):
    """Serve again."""

    worker: WorkerId


Command = (
    Assign
    | Abort
    | Pull
    | Migrate
    | Resume
    | Release
    | SetRole
    | SetBudget
    | LoadWeights
    | Park
    | Wake
)
HOST_TIER = WorkerId(-1)
"""Stands for a worker's own host-memory tier where a peer could be named."""

# --- Reports: worker -> Dispatcher --------------------------------------------------------------


class WorkerUp(Tagged, frozen=True, kw_only=True):
    """The worker is ready to serve. `epoch` counts the incarnations of this worker id."""

    worker: WorkerId
    epoch: int
    groups: tuple[CacheGroupSpec, ...]
    max_num_seqs: int
    max_batch_tokens: int
    num_ranks: int = 1
    role: Role = Role.MIXED


class SeqFinished(Record, frozen=True, kw_only=True, array_like=True):
    """An answer ended: `emitted_tokens` in all, `cached_tokens` of the prompt came from the
    cache."""

    id: RequestId
    reason: FinishReason
    emitted_tokens: int
    cached_tokens: int


class StepReported(Tagged, frozen=True, kw_only=True):
    """One step is done. `ids[i]` emitted `counts[i]` tokens (`counts` empty: one each), in this
    order; `finished` names those that ended with it. Payload: `StepOutputs` in the same order."""

    worker: WorkerId
    step: int
    elapsed: float
    prefill_tokens: int
    decode_tokens: int
    ids: tuple[RequestId, ...]
    load: WorkerLoad
    counts: tuple[int, ...] = ()
    finished: tuple[SeqFinished, ...] = ()
    prefill_pairs: int = 0
    """Of (computed prompt token, token it attends to, itself too)."""
    context_tokens: int = 0
    """Whose KV the decodes of the step read, their own included."""


class Prefilled(Tagged, frozen=True, kw_only=True):
    """This sequence is computed no further here: its KV is complete up to the last of
    `emitted_tokens` tokens and leased to the target of the move."""

    worker: WorkerId
    move: MoveId
    request_id: RequestId
    emitted_tokens: int


class Preempted(Tagged, frozen=True, kw_only=True):
    """Memory was short: this sequence lost its blocks and waits at the same worker to be
    recomputed."""

    worker: WorkerId
    request_id: RequestId
    lost_tokens: int


class Released(Tagged, frozen=True, kw_only=True):
    """The sequence of this move is here no more: its lease has ended by `Release`, or because its
    time was over (`expired`; said once more to a `Resume` that comes too late)."""

    worker: WorkerId
    move: MoveId
    request_id: RequestId
    expired: bool = False


class Aborted(Tagged, frozen=True, kw_only=True):
    """This sequence is gone from the worker and its blocks are free."""

    worker: WorkerId
    request_id: RequestId


class KvPulled(Tagged, frozen=True, kw_only=True):
    """The KV of this sequence has arrived and was verified; it goes on here, after
    `emitted_tokens` tokens. In a frame of its own, before the first step that computes it.
    `num_tokens` tokens of KV were copied (what the prefix cache had was not), `seconds` is the
    time from the stop of the source to now."""

    worker: WorkerId
    move: MoveId
    request_id: RequestId
    source: WorkerId
    emitted_tokens: int
    num_tokens: int
    num_bytes: int
    seconds: float
    path: str
    """How the bytes came: "shared memory", "peer copy" ..."""


class PullFailed(Tagged, frozen=True, kw_only=True):
    """The KV of this sequence did not arrive; nothing of it is held here."""

    worker: WorkerId
    move: MoveId
    request_id: RequestId
    source: WorkerId
    reason: str


class PrefixPulled(Tagged, frozen=True, kw_only=True):
    """Cached blocks were copied for a sequence before its prefill: `num_blocks` of the `wanted`
    ones. `reason` says why some were not."""

    worker: WorkerId
    request_id: RequestId
    source: WorkerId
    wanted: int
    num_blocks: int
    num_bytes: int
    seconds: float
    path: str
    reason: str = ""


class LinkUp(Tagged, frozen=True, kw_only=True):
    """KV can be copied from `peer` (its incarnation `peer_epoch`) into this worker's pool; probed
    with a copy."""

    worker: WorkerId
    peer: WorkerId
    peer_epoch: int
    path: str
    bytes_per_second: float


class LinkDown(Tagged, frozen=True, kw_only=True):
    """Nothing can be copied from `peer` any more (or ever)."""

    worker: WorkerId
    peer: WorkerId
    peer_epoch: int
    reason: str


class CacheChanged(Tagged, frozen=True, kw_only=True):
    """Full blocks that can be found by hash since the last report, and those that no longer can: in
    the pool, and in the worker's host tier."""

    worker: WorkerId
    added: tuple[BlockHash, ...] = ()
    removed: tuple[BlockHash, ...] = ()
    tier_added: tuple[BlockHash, ...] = ()
    tier_removed: tuple[BlockHash, ...] = ()


class Refused(Tagged, frozen=True, kw_only=True):
    """The worker does not do what was asked; a normal answer. `command` is the tag of the
    command."""

    worker: WorkerId
    command: str
    kind: ErrorKind
    reason: str
    request_id: RequestId | None = None


class RoleChanged(Tagged, frozen=True, kw_only=True):
    """The role is in service."""

    worker: WorkerId
    role: Role
    epoch: int


class WeightsLoaded(Tagged, frozen=True, kw_only=True):
    """The weights are in place; `source` says where they came from: "slab" (it was complete and is
    mapped), "peer:N", "host" (the node's slab), "disk", "disk through host". `num_bytes` were
    moved in `seconds`; `notes` say why each better source was not used, and what was checked."""

    worker: WorkerId
    source: str
    seconds: float
    num_bytes: int = 0
    notes: tuple[str, ...] = ()
    fingerprint: str = ""
    """Of the files that the weights were read from."""


class Heartbeat(Tagged, frozen=True, kw_only=True):
    """The worker lives. `step` is the number of its last finished step; `in_step` is how long the
    present one has been running (None: idle). Sent on a timer, and with `load` after every change
    of load that no step reports."""

    worker: WorkerId
    step: int
    in_step: float | None = None
    load: WorkerLoad | None = None


class WorkerDown(Tagged, frozen=True, kw_only=True):
    """The worker's process has ended (or was ended); said by the shell, never by the worker."""

    worker: WorkerId
    epoch: int
    cause: str


Report = (
    WorkerUp
    | StepReported
    | Prefilled
    | Preempted
    | Released
    | Aborted
    | KvPulled
    | PullFailed
    | PrefixPulled
    | LinkUp
    | LinkDown
    | CacheChanged
    | Refused
    | RoleChanged
    | WeightsLoaded
    | Heartbeat
    | WorkerDown
)

# --- Events: outside -> Dispatcher --------------------------------------------------------------


class Arrived(Tagged, frozen=True, kw_only=True):
    """A validated request wants to be served; answered by its end or a `Reject`."""

    request: Request


class Cancelled(Tagged, frozen=True, kw_only=True):
    """The client has gone."""

    request_id: RequestId
    kind: ErrorKind = ErrorKind.CANCELLED


class Woke(Tagged, frozen=True, kw_only=True):
    """The time named by `next_wakeup` has come (or the shell simply asks again)."""


class DrainStarted(Tagged, frozen=True, kw_only=True):
    """Admit nothing more; what was accepted is finished."""


class DrainExpired(Tagged, frozen=True, kw_only=True):
    """The time to drain is over: end what is left with a typed error."""


Event = (
    Arrived
    | Cancelled
    | Woke
    | DrainStarted
    | DrainExpired
    | RolesAsked
    | ParkAsked
    | WakeAsked
    | WorkerAsked
)

# --- Effects: Dispatcher -> shell ---------------------------------------------------------------


class Reject(Tagged, frozen=True, kw_only=True):
    """The request was not accepted. `retry_after` in seconds when trying again makes sense."""

    request_id: RequestId
    kind: ErrorKind
    reason: str
    retry_after: float | None = None


class Degrade(Tagged, frozen=True, kw_only=True):
    """The budget of this request cannot be met any more: it is served after those that can still be
    in time (`demoted` in its verdict), and never dropped for that."""

    request_id: RequestId
    reason: str


class Ended(Tagged, frozen=True, kw_only=True):
    """The one terminal event of an accepted request: `reason`, or `error` with words for the
    client."""

    request_id: RequestId
    reason: FinishReason | None = None
    error: ErrorKind | None = None
    message: str = ""
    cached_tokens: int = 0
    times: Times | None = None
    """Where the time of a complete answer went; None with an error."""
    retry_after: float | None = None
    """Seconds after which the same request might be served, when that makes sense."""


class StartWorker(Tagged, frozen=True, kw_only=True):
    """(Re)start the process of this worker now; `epoch` is the number of the new incarnation."""

    worker: WorkerId
    epoch: int


class Quarantine(Tagged, frozen=True, kw_only=True):
    """This worker died too often: it stays down until an operator acts."""

    worker: WorkerId
    reason: str


Effect = Reject | Degrade | Ended | StartWorker | Quarantine | Answered | Decided

Input = Event | Report
"""What a Dispatcher hears."""
Output = Command | Effect
"""What a Dispatcher says."""
