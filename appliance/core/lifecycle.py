"""Which state may follow which: tables that one can review, looked up by the mechanism.

`docs/architecture.md` draws its diagrams from these tables. A move that is not in the table is a
bug and raises `IllegalTransition` with the history of what moved.
"""

from collections.abc import Mapping
from enum import StrEnum


class RequestState(StrEnum):
    """The life of a request as the Dispatcher knows it."""

    WAITING = "waiting"  # accepted, not placed
    ASSIGNED = "assigned"  # at a worker, no token yet
    DECODING = "decoding"  # at a worker, first token emitted
    MIGRATING = "migrating"  # decodes at one worker while another copies its KV
    HANDING_OFF = "handing_off"  # stopped there, KV leased; the other one copies what is left
    CANCELLING = "cancelling"  # the client has gone, the worker has not confirmed
    ENDED = "ended"  # exactly one terminal event was said


class WorkerState(StrEnum):
    """The life of a worker as the Dispatcher knows it and `/admin/state` shows it."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"  # no new assignments; winds down for a flip, a park or the end
    FLIPPING = "flipping"
    PARKED = "parked"
    QUARANTINED = "quarantined"
    DEAD = "dead"


_R = RequestState
_W = WorkerState

REQUEST_MOVES: Mapping[RequestState, frozenset[RequestState]] = {
    _R.WAITING: frozenset({_R.ASSIGNED, _R.ENDED}),
    _R.ASSIGNED: frozenset(
        {_R.DECODING, _R.MIGRATING, _R.HANDING_OFF, _R.WAITING, _R.CANCELLING, _R.ENDED}
    ),
    _R.DECODING: frozenset({_R.MIGRATING, _R.WAITING, _R.CANCELLING, _R.ENDED}),
    _R.MIGRATING: frozenset({_R.DECODING, _R.HANDING_OFF, _R.WAITING, _R.CANCELLING, _R.ENDED}),
    _R.HANDING_OFF: frozenset({_R.DECODING, _R.WAITING, _R.CANCELLING, _R.ENDED}),
    _R.CANCELLING: frozenset({_R.ENDED}),
    _R.ENDED: frozenset(),
}
"""WAITING after ASSIGNED or later: the worker died or refused, the request is placed again.
DECODING after HANDING_OFF: at the target, or at the source again because the target failed."""

WORKER_MOVES: Mapping[WorkerState, frozenset[WorkerState]] = {
    _W.STARTING: frozenset({_W.READY, _W.DEAD, _W.QUARANTINED}),
    _W.READY: frozenset({_W.DRAINING, _W.FLIPPING, _W.PARKED, _W.DEAD, _W.QUARANTINED}),
    _W.DRAINING: frozenset({_W.READY, _W.FLIPPING, _W.PARKED, _W.DEAD, _W.QUARANTINED}),
    _W.FLIPPING: frozenset({_W.READY, _W.DRAINING, _W.DEAD, _W.QUARANTINED}),
    _W.PARKED: frozenset({_W.READY, _W.DEAD, _W.QUARANTINED}),
    _W.DEAD: frozenset({_W.STARTING, _W.QUARANTINED}),
    _W.QUARANTINED: frozenset({_W.STARTING}),
}


class IllegalTransition(Exception):
    """Something moved along an edge that no table has."""


def check_request_move(old: RequestState, new: RequestState, *, story: str) -> None:
    """Raise `IllegalTransition` with `story` unless a request may go from `old` to `new`."""
    if new not in REQUEST_MOVES[old]:
        raise IllegalTransition(f"request may not go from {old} to {new}; {story}")


def check_worker_move(old: WorkerState, new: WorkerState, *, story: str) -> None:
    """Raise `IllegalTransition` with `story` unless a worker may go from `old` to `new`."""
    if new not in WORKER_MOVES[old]:
        raise IllegalTransition(f"worker may not go from {old} to {new}; {story}")
