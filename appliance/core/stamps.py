"""Where the time of one answer went, from the arrival of its request to its last token.

Read off the history of states that the Dispatcher keeps of every request, so that nothing is
stamped while tokens flow, and the four parts sum to the whole by construction:

    queue     arrival to the first worker (reading the body and tokenising are part of it), and
              every later wait for one: its worker died, refused it, or it waits to run alone
    prefill   given to a worker until its first token from there; after a death the prompt and what
              was sent before are computed once more, which is prefill too
    transfer  stopped at one worker until it goes on at another (hand-offs and migrations); a
              migration that copies while the source decodes counts from the stop only
    decode    the rest: the tokens after the first, with pauses by a preemption at the same worker
"""

from collections.abc import Sequence

from appliance.core.lifecycle import RequestState
from appliance.core.types import Record, WorkerId

History = Sequence[tuple[float, RequestState, WorkerId | None]]
"""Every state of a request in order: since when, which, and at which worker."""
SERVED = frozenset({RequestState.ASSIGNED, RequestState.DECODING, RequestState.MIGRATING})


class Times(Record, frozen=True, kw_only=True):
    """Seconds by part (see the module), and the workers that computed it in their order (not those
    that refused it or died before its first token from there)."""

    queue: float
    prefill: float
    transfer: float
    decode: float
    workers: tuple[WorkerId, ...]
    demoted: bool = False
    """It was served after others, because its budget could not be met any more."""


def times_of(history: History, *, arrived: float, ended: float, demoted: bool = False) -> Times:
    """The parts of an answer whose last token came at `ended`; `history` has an entry at least,
    the first of them for the time since `arrived`."""
    queue = prefill = transfer = decode = 0.0
    workers: list[WorkerId] = []
    for index, (at, state, worker) in enumerate(history):
        since = at if index else arrived
        until = history[index + 1][0] if index + 1 < len(history) else ended
        match state:
            case RequestState.WAITING:
                queue += until - since
            case RequestState.ASSIGNED:
                prefill += until - since
            case RequestState.HANDING_OFF:
                transfer += until - since
            case _:
                decode += until - since
        left = index + 1 < len(history) and history[index + 1][1] is RequestState.WAITING
        computed = state in SERVED and not (state is RequestState.ASSIGNED and left)
        if worker is not None and computed and worker not in workers[-1:]:
            workers.append(worker)
    return Times(
        queue=queue,
        prefill=prefill,
        transfer=transfer,
        decode=decode,
        workers=tuple(workers),
        demoted=demoted,
    )
