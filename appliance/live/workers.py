"""All workers of a node: who runs, who loads the weights, who is watched, who is killed.

The Dispatcher decides when a worker starts; here it is done. The first worker fills the node's
weight slab from disk while the others wait: a fork takes milliseconds, a second read of the
checkpoint does not. If the loader dies half-way, the slab is thrown away and another worker
loads (`appliance.live.weight_slabs`). Every worker keeps its own KV slab over all its lives; one
whose last process could not be confirmed dead gets a new one. Whoever is up is introduced to its
peers (`appliance.live.links`).

The watch looks at every channel that has been silent for `silence_seconds`: a stopped process
(state T in /proc) is killed, then its death is reported and its requests move; any other one is
only flagged, until `kill_seconds` of silence. Heartbeats come from a thread, so a long step is
not silent.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import msgspec

from appliance.core.kv_layout import index_offset, pool_bytes
from appliance.core.messages import Command, Report, WeightsLoaded
from appliance.core.start import WorkerStart
from appliance.core.types import Record, WorkerId
from appliance.core.wire import command_codec, report_codec
from appliance.live.incarnation import Codecs, Death, Incarnation
from appliance.live.links import Links, PoolShape
from appliance.live.slabs import Slab, SlabError
from appliance.live.spawner import Spawner
from appliance.live.weight_slabs import WeightSettings, WeightSlabs

log = logging.getLogger(__name__)

IMPORT_PATIENCE = 10
"""How many times `kill_seconds` a fork server may take that has not done its imports yet."""


class WatchSettings(Record, frozen=True, kw_only=True):
    """When silence means what; seconds. `interval` is how often the watch looks."""

    interval: float = 0.1
    silence_seconds: float = 0.6
    kill_seconds: float = 30.0
    close_seconds: float = 5.0
    """Time for an orderly end before a worker is killed."""


class PoolPlan(Record, frozen=True, kw_only=True):
    """What the workers are made of. Sizes in bytes; `weight_bytes` 0: the engine has no weights."""

    entry: str
    """`module:function` that a new process calls with its channel."""
    weight_bytes: int
    num_blocks: int
    """Usable KV blocks of each worker."""
    block_bytes: int
    weights: WeightSettings = WeightSettings()

    @property
    def kv_bytes(self) -> int:
        """Size of one worker's KV slab, its index included."""
        return pool_bytes(num_blocks=self.num_blocks, block_bytes=self.block_bytes)


class WorkerEvents(Protocol):
    """What the node hears of its workers."""

    def frame(self, worker: WorkerId, reports: list[Report], payload: bytes) -> None:
        """A frame of the living incarnation."""

    def down(self, worker: WorkerId, epoch: int, cause: str) -> None:
        """The incarnation is gone; nothing of it will be heard any more."""

    def stderr(self, worker: WorkerId, line: str) -> None:
        """A line that the worker wrote to its standard error."""


class StartFactory(Protocol):
    """Makes what an incarnation is told."""

    def __call__(self, worker: WorkerId, epoch: int, *, load_weights: bool) -> WorkerStart: ...


class Workers:
    """The living incarnations and the slabs of one node."""

    def __init__(
        self,
        plan: PoolPlan,
        spawner: Spawner,
        *,
        make_start: StartFactory,
        events: WorkerEvents,
        watch: WatchSettings,
        clock: Callable[[], float],
        busy: Callable[[WorkerId], float] = lambda _: 0.0,
    ) -> None:
        """`busy` is how much work a worker has: weights are copied from the one with the least."""
        self._plan = plan
        self._spawner = spawner
        self._make_start = make_start
        self._events = events
        self._watch_settings = watch
        self._clock = clock
        self._codecs = Codecs(commands=command_codec(), reports=report_codec())
        self._living: dict[WorkerId, Incarnation] = {}
        self._kv: dict[WorkerId, Slab] = {}
        self._links = Links(
            PoolShape(
                num_blocks=plan.num_blocks,
                block_bytes=plan.block_bytes,
                index_offset=index_offset(num_blocks=plan.num_blocks, block_bytes=plan.block_bytes),
            )
        )
        self._weights = WeightSlabs(plan.weight_bytes, settings=plan.weights, busy=busy)
        self._held: list[tuple[WorkerId, int]] = []
        """Starts that wait for the weights."""
        self._closing = False
        self._all_gone: asyncio.Future[None] | None = None
        self._watch_timer: asyncio.TimerHandle | None = None
        self._watch_due = 0.0

    # --- what the node reads -------------------------------------------------------------------

    @property
    def living(self) -> Mapping[WorkerId, Incarnation]:
        """Incarnations that have been started and are not known to be gone."""
        return self._living

    def silence(self, worker: WorkerId, now: float) -> float:
        """Seconds since anything came from the worker's process; 0 when it is not running."""
        life = self._living.get(worker)
        return 0.0 if life is None or life.pid is None else now - life.heard_at

    def kv_resident_bytes(self) -> int:
        """Bytes of all KV slabs that have been touched."""
        return sum(slab.resident_bytes() for slab in self._kv.values())

    # --- what the node asks for ----------------------------------------------------------------

    def open(self) -> None:
        """Begin to watch. Needs the running loop."""
        self._schedule_watch()

    def start(self, worker: WorkerId, epoch: int) -> None:
        """Start this incarnation: at once, or when the weights are in place.

        Raises `SlabError` or `OSError` when it cannot be started now; a held start that fails is a
        death."""
        if self._closing:
            return
        if self._weights.is_loading:
            self._held.append((worker, epoch))
            return
        self._launch(worker, epoch)

    def send(self, worker: WorkerId, command: Command, payload: bytes = b"") -> None:
        """Send a command; one to a worker that is gone is dropped (its death is on the way)."""
        life = self._living.get(worker)
        if life is not None:
            life.send(command, payload)

    def is_up(self, worker: WorkerId, epoch: int) -> None:
        """This incarnation serves: introduce it to its peers."""
        life = self._living.get(worker)
        if life is not None and life.start.epoch == epoch:
            self._links.up(worker, self._kv_slab(worker).fd)

    def kill(self, worker: WorkerId, reason: str) -> None:
        """SIGKILL the worker's process and hear nothing more of it."""
        life = self._living.get(worker)
        if life is not None:
            log.warning("worker is killed", extra={"worker": worker, "reason": reason})
            life.kill(reason)

    async def close(self) -> None:
        """End all workers in order, kill those that take too long, free the slabs."""
        self._closing = True
        self._held.clear()
        if self._watch_timer is not None:
            self._watch_timer.cancel()
        if self._living:
            self._all_gone = asyncio.get_running_loop().create_future()
            for life in self._living.values():
                life.finish()
            await asyncio.wait([self._all_gone], timeout=self._watch_settings.close_seconds)
            for life in list(self._living.values()):
                life.kill("it did not end in time")
            if self._living:
                await self._all_gone
        self._links.close()
        for slab in self._kv.values():
            slab.close()
        self._weights.close()

    # --- life ----------------------------------------------------------------------------------

    def _launch(self, worker: WorkerId, epoch: int) -> None:
        grant = self._weights.grant(worker)
        start = self._make_start(worker, epoch, load_weights=grant.load)
        start = msgspec.structs.replace(start, weights=grant.plan)
        kv = self._kv_slab(worker)
        life = Incarnation(
            start,
            codecs=self._codecs,
            clock=self._clock,
            on_frame=self._frame,
            on_stderr=lambda life, line: self._events.stderr(life.start.worker, line),
            on_death=self._died,
        )
        with self._links.open(worker, epoch) as links:
            fds = [*grant.fds, kv.fd, links.fileno()]
            try:
                life.launch(self._spawner, entry=self._plan.entry, fds=fds)
            except OSError:
                self._links.down(worker)
                raise
        self._living[worker] = life  # only now: a launch that failed leaves nothing behind
        self._weights.started(worker, grant)

    def _kv_slab(self, worker: WorkerId) -> Slab:
        slab = self._kv.get(worker)
        if slab is None:
            slab = self._kv[worker] = Slab(f"appliance-kv-{worker}", self._plan.kv_bytes)
        return slab

    def _frame(self, life: Incarnation, reports: list[Report], payload: bytes) -> None:
        worker = life.start.worker
        for report in reports:
            if isinstance(report, WeightsLoaded) and self._weights.loaded(worker, report):
                self._start_held()
        self._events.frame(worker, reports, payload)

    def _start_held(self) -> None:
        held, self._held = self._held, []
        for worker, epoch in held:
            try:
                self.start(worker, epoch)
            except (SlabError, OSError) as error:
                self._events.down(worker, epoch, str(error))

    def _died(self, life: Incarnation, death: Death) -> None:
        worker, epoch = life.start.worker, life.start.epoch
        del self._living[worker]
        self._links.down(worker)
        if not death.confirmed and (slab := self._kv.pop(worker, None)) is not None:
            slab.close()
        if self._weights.died(worker, confirmed=death.confirmed):
            self._start_held()
        if not self._closing:
            self._events.down(worker, epoch, death.cause)
        elif not self._living and self._all_gone is not None and not self._all_gone.done():
            self._all_gone.set_result(None)

    # --- the watch -----------------------------------------------------------------------------

    def _schedule_watch(self) -> None:
        interval = self._watch_settings.interval
        self._watch_due = self._clock() + interval
        self._watch_timer = asyncio.get_running_loop().call_later(interval, self._watch)

    def _watch(self) -> None:
        now = self._clock()
        own_delay = now - self._watch_due  # the loop was held up: the silence may be its own
        for worker, life in list(self._living.items()):
            silence = now - life.heard_at - own_delay
            if life.pid is None:
                if silence >= self._unborn_seconds():
                    words = {"worker": worker, "seconds": silence}
                    log.error("the fork server does not answer and is killed", extra=words)
                    self._spawner.kill()
                    break
                continue
            if silence >= self._watch_settings.silence_seconds and is_stopped(life.pid):
                self.kill(worker, f"it was stopped (no sign of life for {silence:.1f} s)")
            elif silence >= self._watch_settings.kill_seconds:
                self.kill(worker, f"it hung (no sign of life for {silence:.1f} s)")
        self._schedule_watch()

    def _unborn_seconds(self) -> float:
        """How long the fork server may take to fork; its imports may be slow."""
        limit = self._watch_settings.kill_seconds
        return limit if self._spawner.is_ready else IMPORT_PATIENCE * limit


def is_stopped(pid: int) -> bool:
    """Whether the process is stopped by a signal or a tracer (state T or t)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False
    return stat[stat.rindex(b")") + 2 : stat.rindex(b")") + 3] in (b"T", b"t")
