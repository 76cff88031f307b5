"""What the node notes of every message that was handled: counters, milestones, readiness.

Nothing here decides anything; what it keeps is read by the surfaces.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence

from appliance.core.dispatcher import Dispatcher
from appliance.core.lifecycle import WorkerState
from appliance.core.messages import (
    Heartbeat,
    Input,
    KvPulled,
    LinkDown,
    LinkUp,
    Preempted,
    Prefilled,
    PrefixPulled,
    PullFailed,
    Refused,
    Released,
    RoleChanged,
    StepReported,
    WeightsLoaded,
    WorkerDown,
    WorkerUp,
)
from appliance.live.moves import Moves
from appliance.live.stats import NodeStats

log = logging.getLogger(__name__)
MAX_MILESTONES = 400
LINK_DOWN_SECONDS = 1.0
GONE = frozenset({WorkerState.DEAD, WorkerState.QUARANTINED, WorkerState.STARTING})


class Bookkeeper:
    """Hears what the Dispatcher heard, after it did."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        *,
        stats: NodeStats,
        moves: Moves,
        clock: Callable[[], float],
    ) -> None:
        self._dispatcher = dispatcher
        self._stats = stats
        self._moves = moves
        self._clock = clock
        self.timeline: list[tuple[float, str]] = []
        """What happened during the start: (time on the node's clock, words)."""
        self.unready_since: float | None = clock()
        """Since when no worker has been ready; None while one is."""

    def milestone(self, words: str) -> None:
        """Something that an operator may want to see the time of."""
        if len(self.timeline) < MAX_MILESTONES:
            self.timeline.append((self._clock(), words))

    def note(self, message: Input, now: float) -> None:
        """Keep the numbers that the node shows."""
        match message:
            case StepReported():
                self._stats.worker(message.worker).stepped(message, now)
                if self._stats.observe_step is not None:
                    self._stats.observe_step(message.worker, message.elapsed, len(message.ids))
            case Heartbeat():
                stats = self._stats.worker(message.worker)
                stats.beat(message)
                if self._dispatcher.view.workers[message.worker].assigned == 0:
                    stats.moved_at = now  # nothing to do is progress
            case Preempted():
                self._stats.worker(message.worker).preemptions += 1
            case WorkerDown() | WorkerUp() | WeightsLoaded() | RoleChanged():
                self._life(message, now)
            case Refused(command="Start"):
                log.error(
                    "worker cannot start",
                    extra={"worker": message.worker, "reason": message.reason},
                )
            case (
                KvPulled()
                | PullFailed()
                | Prefilled()
                | PrefixPulled()
                | Released()
                | LinkUp()
                | LinkDown()
            ):
                self._move(message)
            case _:
                pass

    def _life(
        self, message: WorkerDown | WorkerUp | WeightsLoaded | RoleChanged, now: float
    ) -> None:
        worker, stats = message.worker, self._stats.worker(message.worker)
        match message:
            case WorkerDown():
                self._watch_readiness(now)
                self._moves.worker_down(worker)
            case WorkerUp():
                self._watch_readiness(now)
                stats.born(now)
                role = self._dispatcher.view.workers[worker].role
                self.milestone(f"worker {worker}: ready, role {role.value}")
                log.info("worker is ready", extra={"worker": worker, "role": role.value})
            case WeightsLoaded():
                stats.weights_source, stats.weights_seconds = message.source, message.seconds
                self.milestone(f"worker {worker}: weights from {message.source}{_pace(message)}")
            case RoleChanged():
                stats.flips += 1
                log.info(
                    "worker has a new role", extra={"worker": worker, "role": message.role.value}
                )

    def _move(
        self,
        message: KvPulled | PullFailed | Prefilled | PrefixPulled | Released | LinkUp | LinkDown,
    ) -> None:
        moves = self._moves
        match message:
            case Prefilled():
                moves.prefilled(message.move)
            case KvPulled():
                moves.arrived(message)
            case PullFailed():
                moves.failed(message)
                _say_failed(message)
            case PrefixPulled():
                moves.prefix_pulled(message)
            case Released():
                moves.released(message)
            case LinkUp():
                moves.link_up(message)
                self.milestone(f"link {link_words(message)}")
            case LinkDown():
                moves.link_down(message)
                self._link_down(message)

    def _link_down(self, message: LinkDown) -> None:
        """A peer's death is heard of a little later than that its doorbell is mute, and said
        elsewhere; any other reason is a slower node, which must not stay unsaid."""
        loop = asyncio.get_running_loop()
        loop.call_later(LINK_DOWN_SECONDS, self._say_link_down, message)

    def _say_link_down(self, message: LinkDown) -> None:
        workers = self._dispatcher.view.workers
        for worker in (message.worker, message.peer):
            view = workers.get(worker)
            if view is None or view.state in GONE:
                return
        is_up = (message.worker, message.peer) in self._moves.links
        if is_up or self._dispatcher.epoch(message.peer) != message.peer_epoch:
            return
        log.warning(
            "link is down: no KV moves this way any more",
            extra={"worker": message.worker, "peer": message.peer, "reason": message.reason},
        )

    def _watch_readiness(self, now: float) -> None:
        views = self._dispatcher.view.workers.values()
        if any(view.state is WorkerState.READY for view in views):
            self.unready_since = None
        elif self.unready_since is None:
            self.unready_since = now


def link_words(link: LinkUp) -> str:
    """`0 -> 1: shared memory, 9.8 GB/s`: KV goes from 0 to 1."""
    return f"{link.peer} -> {link.worker}: {link.path}, {link.bytes_per_second / 1e9:.1f} GB/s"


def link_summary(links: Sequence[LinkUp]) -> list[str]:
    """`12 links: shared memory, 8.1 to 9.8 GB/s`, one line per path."""
    speeds: dict[str, list[float]] = {}
    for link in links:
        speeds.setdefault(link.path, []).append(link.bytes_per_second / 1e9)
    return [
        f"{len(each)} links: {path}, {min(each):.1f} to {max(each):.1f} GB/s"
        for path, each in sorted(speeds.items())
    ]


def _pace(loaded: WeightsLoaded) -> str:
    """` in 0.31 s, 1.7 GB/s`; empty when nothing had to be moved."""
    if not loaded.num_bytes:
        return ""
    rate = loaded.num_bytes / max(loaded.seconds, 1e-9) / 1e9
    return f" in {loaded.seconds:.2f} s, {rate:.1f} GB/s"


def _say_failed(message: PullFailed) -> None:
    log.info(
        "a move failed",
        extra={
            "request": message.request_id,
            "source": message.source,
            "target": message.worker,
            "reason": message.reason,
        },
    )
