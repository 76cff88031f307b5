"""Every live request as the Dispatcher knows it, and the queue of those that wait.

A request is in exactly one place: in the queue, among the suspects (requests that must run alone,
see `appliance.core.isolation`), or at a worker: the one whose tokens count. While it moves, a
second worker is its source or its target (`Move`). The queue is sorted: requests that lost their
worker stand before those that never had one, and each kind stands in the order of arrival."""

from bisect import bisect_left

from appliance.core.lifecycle import (
    REQUEST_MOVES,
    IllegalTransition,
    RequestState,
    check_request_move,
)
from appliance.core.types import ErrorKind, MoveId, Request, RequestId, WorkerId
from appliance.core.view import QueueChanges


class Move:
    """One attempt to bring a request's KV from one worker to another."""

    __slots__ = ("began", "blocks", "id", "leased", "live", "source", "stopped", "target")

    def __init__(
        self,
        move: MoveId,
        source: WorkerId,
        *,
        target: WorkerId,
        live: bool,
        blocks: int,
        began: float,
    ) -> None:
        self.id = move
        self.source = source
        self.target = target
        self.live = live
        self.blocks = blocks
        """What it counts for at the target until the source has stopped."""
        self.began = began
        self.stopped = False
        """The source said `Prefilled`: the request is the target's."""
        self.leased = False
        """The source holds the KV of the stopped sequence."""


class RequestRecord:
    """One live request. Changed only through `NodeState` and `RequestTable`."""

    __slots__ = (
        "acquitted",
        "avoid",
        "cancel_kind",
        "deaths",
        "decodes",
        "demoted",
        "emitted",
        "first_token_at",
        "history",
        "isolated",
        "leaving",
        "move",
        "move_after",
        "moves_failed",
        "pending",
        "refusals",
        "reports_before",
        "request",
        "resumed",
        "spared",
        "state",
        "strict",
        "suspected",
        "trial_steps",
        "trials",
        "worker",
    )

    def __init__(self, request: Request, now: float) -> None:
        self.request = request
        self.state = RequestState.WAITING
        self.worker: WorkerId | None = None
        """Where it is; None exactly while WAITING or ENDED."""
        self.emitted = 0
        """Tokens that went to the client, over all workers it was at."""
        self.pending = 0
        """Prefill tokens it counts for at its worker; 0 once a token has come from there."""
        self.first_token_at: float | None = None
        self.decodes = False
        """Tokens come from its worker, and it is counted in that one's `WorkerTally`."""
        self.demoted = False
        """Its budget cannot be met any more: it is served after others."""
        self.deaths: list[tuple[WorkerId, int]] = []
        """Incarnations (worker, epoch) that died while it was there, those spared aside."""
        self.reports_before = 0
        """The worker's `num_loads` when it was given this request; `COMPUTED` after a move."""
        self.spared = 0
        """Deaths that were not counted: the worker had said nothing since it got this request."""
        self.suspected = False
        """To be tried, or on trial (`appliance.core.isolation`)."""
        self.isolated = False
        """On trial at its worker."""
        self.strict = False
        """Its next trial is strict."""
        self.trials = 0
        """Trials that are over, by an acquittal or an inconclusive death."""
        self.trial_steps = 0
        """Steps of the present trial that computed tokens of it."""
        self.acquitted = False
        """Its last trial acquitted it, and it has been at no death since."""
        self.refusals = 0
        self.avoid: dict[WorkerId, tuple[int, float]] = {}
        """Workers that refused it: not offered again while the worker's `changes` has this value
        and this time has not come."""
        self.move: Move | None = None
        """On its way to another worker."""
        self.moves_failed = 0
        """In a row."""
        self.move_after = 0.0
        """Not moved again before this time."""
        self.resumed: MoveId | None = None
        """Its worker was told to go on after this move, whose lease may have ended meanwhile."""
        self.leaving: set[WorkerId] = set()
        """Workers that were told to forget it and have not said `Aborted`: what they still say of
        it is of the past, so it is not given to them."""
        self.cancel_kind: ErrorKind | None = None
        """Why it is CANCELLING."""
        self.history: list[tuple[float, RequestState, WorkerId | None]] = [
            (now, RequestState.WAITING, None)
        ]

    @property
    def order(self) -> tuple[float, RequestId]:
        """Sorts by arrival."""
        return (self.request.arrived, self.request.id)

    def story(self) -> str:
        """The history in words, for an exception."""
        moves = (
            f"{state} at {at:.6f}" + ("" if worker is None else f" (worker {worker})")
            for at, state, worker in self.history
        )
        return f"request {self.request.id}: " + ", ".join(moves)


LOG_LENGTH = 2048
"""Changes of the queue that are remembered, at most."""


class WaitingQueue:
    """Waiting requests in the order described above; `requests()` costs a copy only after a
    change."""

    def __init__(self) -> None:
        self._keys: list[tuple[bool, float, RequestId]] = []
        self._requests: list[Request] = []
        self._snapshot: tuple[Request, ...] | None = ()
        self._log: list[tuple[Request, bool]] = []
        self._log_start = 0
        self.tokens = 0
        """Prompt tokens of all of them."""

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, record: RequestRecord) -> None:
        """Insert at its place."""
        key = self._key(record)
        keys = self._keys
        index = len(keys) if not keys or keys[-1] < key else bisect_left(keys, key)
        keys.insert(index, key)
        self._requests.insert(index, record.request)
        self._snapshot = None
        self._note((record.request, True))
        self.tokens += record.request.prompt_tokens

    def remove(self, record: RequestRecord) -> None:
        """Take out one that is in it; raises `IllegalTransition` otherwise."""
        key = self._key(record)
        index = bisect_left(self._keys, key)
        if index == len(self._keys) or self._keys[index] != key:
            raise IllegalTransition(f"not in the queue; {record.story()}")
        del self._keys[index]
        del self._requests[index]
        self._snapshot = None
        self._note((record.request, False))
        self.tokens -= record.request.prompt_tokens

    def requests(self) -> tuple[Request, ...]:
        """All of them, first first."""
        if self._snapshot is None:
            self._snapshot = tuple(self._requests)
        return self._snapshot

    def changes(self, since: int) -> QueueChanges:
        """What happened after the mark `since` (0: from the beginning)."""
        log, start = self._log, self._log_start
        mark = start + len(log)
        if not start <= since <= mark:
            whole = [(request, True) for request in self._requests]
            return QueueChanges(mark=mark, changes=whole, whole=True)
        return QueueChanges(mark=mark, changes=log[since - start :] if since < mark else ())

    def _note(self, change: tuple[Request, bool]) -> None:
        self._log.append(change)
        if len(self._log) > LOG_LENGTH:
            del self._log[: LOG_LENGTH // 2]
            self._log_start += LOG_LENGTH // 2

    @staticmethod
    def _key(record: RequestRecord) -> tuple[bool, float, RequestId]:
        # the history of one that was placed before holds more than its first entry
        return (len(record.history) == 1, *record.order)


class RequestTable:
    """The live requests by id. A request that ended is forgotten."""

    def __init__(self) -> None:
        self._records: dict[RequestId, RequestRecord] = {}
        self.queue = WaitingQueue()
        self.suspects: dict[RequestId, RequestRecord] = {}
        """WAITING, kept out of the queue until they can run alone; in the order they got there."""
        self.refused: dict[RequestId, RequestRecord] = {}
        """WAITING with a worker to avoid."""

    def __len__(self) -> int:
        return len(self._records)

    def get(self, request_id: RequestId) -> RequestRecord | None:
        """The live request of that id."""
        return self._records.get(request_id)

    def records(self) -> list[RequestRecord]:
        """All live requests in the order they were accepted."""
        return list(self._records.values())

    def is_queued(self, record: RequestRecord) -> bool:
        """Whether it waits in the queue (and not among the suspects)."""
        return record.state is RequestState.WAITING and record.request.id not in self.suspects

    def add(self, request: Request, now: float) -> RequestRecord:
        """Accept into the queue. Raises `ValueError` for an id that is alive."""
        if request.id in self._records:
            raise ValueError(f"request id {request.id} is in use; ids are unique while alive")
        record = RequestRecord(request, now)
        self._records[request.id] = record
        self.queue.add(record)
        return record

    def wait(self, record: RequestRecord, now: float, *, suspect: bool) -> None:
        """Back to WAITING from a worker it has left: into the queue, or among the suspects."""
        self.move(record, RequestState.WAITING, now)
        if suspect:
            self.suspects[record.request.id] = record
        else:
            self.queue.add(record)
        if record.avoid:
            self.refused[record.request.id] = record

    def stop_waiting(self, record: RequestRecord) -> None:
        """Take a WAITING request out of the queue or from the suspects."""
        if self.suspects.pop(record.request.id, None) is None:
            self.queue.remove(record)
        self.refused.pop(record.request.id, None)

    def move(
        self,
        record: RequestRecord,
        state: RequestState,
        now: float,
        *,
        worker: WorkerId | None = None,
    ) -> None:
        """Change the state along the table and note it; raises `IllegalTransition` with the
        story."""
        if state not in REQUEST_MOVES[record.state]:  # looked up first: the story is not free
            check_request_move(record.state, state, story=record.story())
        record.state = state
        record.worker = worker
        record.history.append((now, state, worker))
        if state is RequestState.ENDED:
            del self._records[record.request.id]
