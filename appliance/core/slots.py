"""The questions that a policy answers.

A policy decides, the mechanism applies: each slot gets a read-only view and returns a decision that
the Dispatcher or the Batcher checks, books and carries out. A slot is a plain callable, so one
algorithm is one file with a few functions or one small class.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

from msgspec import field

from appliance.core.types import ErrorKind, Phase, Record, Request, RequestId, Role, WorkerId
from appliance.core.view import LocalView, NodeView, SeqView


class PolicyMistake(Exception):
    """A policy answered what the mechanism cannot carry out."""


class Accept(Record, frozen=True, kw_only=True, tag=True):
    """Queue the request."""


class Refuse(Record, frozen=True, kw_only=True, tag=True):
    """Turn the request away with words for the client."""

    kind: ErrorKind
    reason: str
    retry_after: float | None = None


Admission = Accept | Refuse


class AdmitSlot(Protocol):
    """May this request enter the node's queue?"""

    def __call__(self, view: NodeView, request: Request, now: float) -> Admission: ...


class OrderSlot(Protocol):
    """In which order are the waiting requests offered to `place`? Returns a permutation or a
    prefix."""

    def __call__(
        self, queue: Sequence[Request], view: NodeView, now: float
    ) -> Sequence[Request]: ...


class PlaceSlot(Protocol):
    """Which worker takes this request for this phase? None: leave it waiting; for decode: leave it
    where it is."""

    def __call__(
        self, view: NodeView, request: Request, phase: Phase, now: float
    ) -> WorkerId | None: ...


class Late(Record, frozen=True, kw_only=True):
    """What becomes of a live request whose targets cannot be met any more.

    "demote": it is served as best effort, and never dropped; its budgets bind nobody else. "refuse"
    (only while it waits and nothing of it was sent): it ends with `ErrorKind.BUDGET`. `reason` is
    for the client and the audit."""

    id: RequestId
    action: Literal["demote", "refuse"]
    reason: str


class LateSlot(Protocol):
    """Whose targets cannot be met any more? Asked after every message, before `order`; each request
    is to be named once."""

    def __call__(self, view: NodeView, now: float) -> Sequence[Late]: ...


class RolePlan(Record, frozen=True, kw_only=True):
    """What the node's roles should be, who should be in service, and why.

    `roles` names the workers that should take another role, as one transaction; `wake` parked
    workers (or ones that are being parked) that should serve, `park` those that should go on
    standby, `add` how many of the spare workers should be started. The mechanism carries out what
    is legal: one structural action at a time in each pool of workers of one role. `trigger` says
    in stable words what was found (a "no" is put on record when these words change), `prediction`
    and `cost` (instance-seconds of the transition) are by name. The slot is not asked again before
    `again`, and with `alarm` it is asked then even if nothing happens."""

    roles: Mapping[WorkerId, Role] = field(default_factory=dict)
    wake: tuple[WorkerId, ...] = ()
    park: tuple[WorkerId, ...] = ()
    add: int = 0
    trigger: str
    prediction: dict[str, float] = field(default_factory=dict)
    cost: float = 0.0
    again: float
    alarm: bool = False


class RolesSlot(Protocol):
    """Which worker should have which role?"""

    def __call__(self, view: NodeView, now: float) -> RolePlan: ...


class Migration(Record, frozen=True, kw_only=True):
    """Move this request, which decodes somewhere, to that worker."""

    id: RequestId
    target: WorkerId


class MigrateSlot(Protocol):
    """Which running requests should go where, to balance the node? A few at a time: it is asked
    after every message. Hand-offs, drains and flips need no answer: for them `place` is asked with
    `Phase.DECODE`. Legal are the workers of `NodeView.willing` for decode."""

    def __call__(self, view: NodeView, now: float) -> Sequence[Migration]: ...


class VictimSlot(Protocol):
    """Whom to preempt when memory is short, among `candidates` (never empty)?"""

    def __call__(self, view: LocalView, candidates: Sequence[SeqView], now: float) -> RequestId: ...


class Grant(Record, frozen=True, kw_only=True, array_like=True):
    """Up to `num_tokens` tokens of this sequence in the step being planned (a decode asks for
    1)."""

    id: RequestId
    num_tokens: int


class FillSlot(Protocol):
    """How many tokens for whom in this step, most important first?

    The sum may not exceed `budget_tokens`. The mechanism walks the grants in order, admits those
    that still wait (prefix cache looked up then), allocates blocks, preempts if it must, and trims
    a grant to what a sequence can use."""

    def __call__(self, view: LocalView, budget_tokens: int, now: float) -> Sequence[Grant]: ...


class NodeWakeSlot(Protocol):
    """When should the Dispatcher ask again even if nothing happens? None: no need."""

    def __call__(self, view: NodeView, now: float) -> float | None: ...


class DispatchSlots(Record, frozen=True, kw_only=True):
    """The slots filled in the Dispatcher. Without `roles` nobody flips but operators, without
    `migrate` nothing moves but for hand-offs, drains and flips, without `late` nobody is
    demoted."""

    admit: AdmitSlot
    order: OrderSlot
    place: PlaceSlot
    wakeup: NodeWakeSlot
    roles: RolesSlot | None = None
    late: LateSlot | None = None
    migrate: MigrateSlot | None = None


class BatchSlots(Record, frozen=True, kw_only=True):
    """The slots filled in every Batcher."""

    victim: VictimSlot
    fill: FillSlot


class Policy(Record, frozen=True, kw_only=True):
    """One published algorithm as a bundle of answers."""

    name: str
    dispatch: DispatchSlots
    batch: BatchSlots
    chunk: int | None = None
    """How many prompt tokens `fill` puts beside decodes, for those who predict what roles would do:
    None for full steps, 0 where it fits them into the slack of the decodes."""
    uses_priority: bool = False
    """Whether it looks at `Request.priority`; otherwise clients are told that it is ignored."""
