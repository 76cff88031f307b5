"""What operators ask of the node itself, how that ended, and why the node decided what it did.

Members of the unions in `appliance.core.messages`.
"""

from enum import StrEnum

import msgspec

from appliance.core.types import Role, Tagged, WorkerId, WorkerSpec


class RolesAsked(Tagged, frozen=True, kw_only=True):
    """An operator wants these workers to take these roles, as one; answered by `Answered`."""

    ask: int
    roles: tuple[tuple[WorkerId, Role], ...]


class ParkAsked(Tagged, frozen=True, kw_only=True):
    """An operator wants this worker out of service, its process kept; answered by `Answered`."""

    ask: int
    worker: WorkerId


class WakeAsked(Tagged, frozen=True, kw_only=True):
    """An operator wants a parked worker back in service; answered by `Answered`."""

    ask: int
    worker: WorkerId


class WorkerAsked(Tagged, frozen=True, kw_only=True):
    """An operator wants one more worker; answered by `Answered` when it serves, or cannot."""

    ask: int
    spec: WorkerSpec


class Outcome(StrEnum):
    """How something that was asked for ended."""

    DONE = "done"
    ROLLED_BACK = "rolled_back"
    REFUSED = "refused"
    """It was not begun: impossible, or something else is under way."""


class Answered(Tagged, frozen=True, kw_only=True):
    """The end of what an operator asked for. `migrated` counts sequences that went elsewhere for
    it; `reason` is for people, empty when done."""

    ask: int
    outcome: Outcome
    seconds: float
    migrated: int = 0
    reason: str = ""


class Decided(Tagged, frozen=True, kw_only=True):
    """One decision about the node itself, for the audit. Said again with the same `decision` when
    its outcome is known. Also said for "no": kind "none".

    `kind`: flip, none, park, wake, restart, add, rebalance, fallback (a phase was served by a
    worker of another role), turn_away (requests are refused at the door), and of single requests
    demote, refuse. `by`: operator, controller, policy, mechanism. `prediction` and `cost` are in
    seconds, by name."""

    decision: int
    at: float
    kind: str
    by: str
    workers: tuple[WorkerId, ...]
    trigger: str
    prediction: dict[str, float] = msgspec.field(default_factory=dict)
    cost: float = 0.0
    outcome: str = ""
