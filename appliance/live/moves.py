"""Sequences on their way from one worker to another, as the node sees them.

Two sockets are read in any order, and a sequence that moves speaks on both: its source says
`Prefilled` behind its last tokens, its target `KvPulled` before its first. The source says so
before the target can know it; the node may *read* it later. So a frame with `KvPulled` waits, and
with it all later frames of that worker, until the source's word was handled or cannot come any
more. What waits is already in the node's memory or in a socket's buffer, so the wait is one turn of
the loop.

Beside that stands what the node shows of moves: those under way, and how the others ended.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence

from appliance.core.messages import (
    HOST_TIER,
    KvPulled,
    LinkDown,
    LinkUp,
    Migrate,
    PrefixPulled,
    Pull,
    PullFailed,
    Released,
    Report,
    Resume,
)
from appliance.core.types import MoveId, RequestId, WorkerId

Frame = tuple[WorkerId, list[Report], bytes]
MoveObserver = Callable[[str, str, float], None]
"""(kind of move, path, seconds from the stop of the source), once per move that succeeded."""


class MoveSeen:
    """One move under way."""

    __slots__ = ("begun", "id", "live", "request_id", "source", "stopped", "target")

    def __init__(self, pull: Pull, now: float) -> None:
        self.id = pull.move
        self.request_id = pull.request.id
        self.source = pull.source
        self.target = pull.worker
        self.begun = now
        self.live = False
        """It decodes while it is copied; set by `Migrate`."""
        self.stopped = False
        """The source has said its last word."""

    @property
    def kind(self) -> str:
        """In words: what the copy is for."""
        return "migration" if self.live else "hand-off"


class PathCount:
    """What went one way from one worker to another."""

    __slots__ = ("num", "num_bytes", "seconds")

    def __init__(self) -> None:
        self.num = 0
        self.num_bytes = 0
        self.seconds = 0.0

    def add(self, num_bytes: int, seconds: float) -> None:
        """Count one transfer."""
        self.num += 1
        self.num_bytes += num_bytes
        self.seconds += seconds


class Moves:
    """Moves under way, frames that wait for them, and what came of the others."""

    def __init__(self) -> None:
        self.under_way: dict[MoveId, MoveSeen] = {}
        self.outcomes: Counter[tuple[str, str]] = Counter()
        """Moves that are over, by (kind, outcome)."""
        self.resumed = 0
        """Sequences that were told to go on where they were."""
        self.expired_leases = 0
        self.pulled: dict[tuple[str, str, WorkerId, WorkerId], PathCount] = {}
        """Transfers that succeeded, by (kind, path, source, target). A prefix's kind is "prefix";
        its source may be `HOST_TIER`."""
        self.prefixes: Counter[str] = Counter()
        """Prefixes that were asked for, by outcome: all, some, none."""
        self.links: dict[tuple[WorkerId, WorkerId], LinkUp] = {}
        """Probed links that are up, by (target, source)."""
        self.observe: MoveObserver | None = None
        self._held: dict[WorkerId, deque[tuple[list[Report], bytes]]] = {}
        self._live: MoveId | None = None
        """A live move whose source was told before its target."""

    # --- what the Dispatcher says --------------------------------------------------------------

    def begun(self, pull: Pull, now: float) -> None:
        """The target has been told."""
        move = self.under_way[pull.move] = MoveSeen(pull, now)
        move.live = pull.move == self._live

    def migrating(self, migrate: Migrate) -> None:
        """The source has been told."""
        if not migrate.live:
            return
        move = self.under_way.get(migrate.move)
        if move is None:  # the target will be told next
            self._live = migrate.move
        else:
            move.live = True

    def resuming(self, resume: Resume) -> None:
        """The source has been told to go on."""
        self.resumed += 1
        self._over(resume.move, "resumed")

    def given_up(self, request_id: RequestId) -> None:
        """The sequence is placed anew, or has ended: no move of it counts any more."""
        if self.under_way:
            for move in [m for m in self.under_way.values() if m.request_id == request_id]:
                self._over(move.id, "given_up")

    # --- what workers say ----------------------------------------------------------------------

    def prefilled(self, move_id: MoveId) -> None:
        """The source's last word was handled."""
        move = self.under_way.get(move_id)
        if move is not None:
            move.stopped = True

    def arrived(self, report: KvPulled) -> None:
        """The target goes on with it."""
        move = self.under_way.get(report.move)
        kind = "given up" if move is None else move.kind
        self._count(kind, report)
        if self.observe is not None and move is not None:
            self.observe(kind, report.path, report.seconds)
        self._over(report.move, "done")

    def failed(self, report: PullFailed) -> None:
        """The target does not have it."""
        self._over(report.move, "failed")

    def released(self, report: Released) -> None:
        """A lease has ended. One that ended after its move was over (so answers a `Resume` that
        came too late) kept nobody waiting."""
        self.expired_leases += report.expired and report.move in self.under_way

    def prefix_pulled(self, report: PrefixPulled) -> None:
        """A cached prefix was fetched, or not."""
        if report.num_blocks:
            self._count("prefix", report)
        some = "some" if report.num_blocks else "none"
        self.prefixes["all" if report.num_blocks >= report.wanted else some] += 1

    def worker_down(self, worker: WorkerId) -> None:
        """Nothing more comes from this worker: what waited of it is dropped, and nobody waits for
        it."""
        self._held.pop(worker, None)
        for move in list(self.under_way.values()):
            if worker == move.target:
                self._over(move.id, "target_died")
            elif worker == move.source and not move.stopped:
                self._over(move.id, "source_died")
        for pair in [pair for pair in self.links if worker in pair]:
            del self.links[pair]

    def link_up(self, report: LinkUp) -> None:
        """A link was probed."""
        self.links[report.worker, report.peer] = report

    def link_down(self, report: LinkDown) -> None:
        """A link is of no more use."""
        link = self.links.get((report.worker, report.peer))
        if link is not None and link.peer_epoch == report.peer_epoch:
            del self.links[report.worker, report.peer]

    # --- the gate ------------------------------------------------------------------------------

    def holds(self, worker: WorkerId, reports: list[Report], payload: bytes) -> bool:
        """Whether this frame must wait; it is kept then."""
        if not self.under_way and not self._held:
            return False
        frames = self._held.get(worker)
        if frames is None:
            if not self._is_early(reports):
                return False
            frames = self._held[worker] = deque()
        frames.append((reports, payload))
        return True

    def next_frame(self) -> Frame | None:
        """A frame that need not wait any longer; in the order of its worker."""
        for worker, frames in self._held.items():
            if not self._is_early(frames[0][0]):
                reports, payload = frames.popleft()
                if not frames:
                    del self._held[worker]
                return worker, reports, payload
        return None

    def _is_early(self, reports: Sequence[Report]) -> bool:
        for report in reports:
            if isinstance(report, KvPulled):
                move = self.under_way.get(report.move)
                if move is not None and not move.stopped:
                    return True
        return False

    # --- odds and ends -------------------------------------------------------------------------

    def counts(self) -> Iterator[tuple[str, str, WorkerId, WorkerId, PathCount]]:
        """(kind, path, source, target, count), sorted."""
        for key in sorted(self.pulled):
            yield *key, self.pulled[key]

    def _count(self, kind: str, report: KvPulled | PrefixPulled) -> None:
        key = (kind, report.path, report.source, report.worker)
        count = self.pulled.get(key)
        if count is None:
            count = self.pulled[key] = PathCount()
        count.add(report.num_bytes, report.seconds)

    def _over(self, move_id: MoveId, outcome: str) -> None:
        move = self.under_way.pop(move_id, None)
        if move is not None:
            self.outcomes[move.kind, outcome] += 1


def source_name(worker: WorkerId) -> str:
    """The name of where something was copied from."""
    return "host" if worker == HOST_TIER else str(worker)
