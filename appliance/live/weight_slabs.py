"""The weights that a node holds: one slab that all workers map, or one slab for each worker.

Mapped (the default): the node has one slab, the first worker fills it from disk, everybody maps it.
Copied: the node's slab is filled in the same way and stays as the copy in host memory; each worker
has a slab of its own, as devices with memory of their own need it, and fills it from the best
source there is. The order is: peers whose slab is complete, the one that the fewest are reading
from first, then the one with the least work; the node's slab; disk. Who has received is a source at
once. A worker's slab outlives it: its successor finds it complete, and until then it is the least
loaded source of all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from appliance.core.messages import WeightsLoaded
from appliance.core.start import WeightPlan
from appliance.core.types import Record, WorkerId
from appliance.live.slabs import Slab

MAX_PEERS = 2
"""So many peers are offered to a receiver; one that fits is enough."""
HOST = "host"


class WeightSettings(Record, frozen=True, kw_only=True):
    """What the operator says of weights."""

    share: Literal["map", "copy"] = "map"
    threads: int = 1
    """That read or copy in one worker."""
    full_check: bool = False
    """Check every copied byte, not a sample."""


@dataclass(frozen=True, kw_only=True)
class Grant:
    """What one incarnation gets: descriptors (its slab, then the sources) and what they are."""

    fds: Sequence[int]
    plan: WeightPlan
    load: bool
    """It has to fill the node's slab from disk; everybody else waits for that."""


class WeightSlabs:
    """The slabs, who fills which, and who may copy from whom."""

    def __init__(
        self,
        num_bytes: int,
        *,
        settings: WeightSettings,
        busy: Callable[[WorkerId], float],
    ) -> None:
        """`num_bytes` 0: the engine has no weights. `busy` is how much work a worker has."""
        self._num_bytes = num_bytes
        self._settings = settings
        self._busy = busy
        self._node: Slab | None = None
        self._node_complete = num_bytes == 0
        self._loader: WorkerId | None = None
        self._own: dict[WorkerId, Slab] = {}
        self._complete: set[WorkerId] = set()
        """Workers whose own slab is complete."""
        self._reading: dict[WorkerId, tuple[str, ...]] = {}
        """Workers that are filling their slab: the sources offered to each."""
        self._fingerprint = ""

    @property
    def is_loading(self) -> bool:
        """Somebody is filling the node's slab: who needs it has to wait."""
        return not self._node_complete and self._loader is not None

    def resident_bytes(self) -> int:
        """Bytes of all weight slabs that have been touched."""
        slabs = [*self._own.values()] + ([self._node] if self._node is not None else [])
        return sum(slab.resident_bytes() for slab in slabs)

    def grant(self, worker: WorkerId) -> Grant:
        """What a new incarnation of `worker` gets. Raises `SlabError`."""
        if self._num_bytes == 0:
            return Grant(fds=(), plan=WeightPlan(), load=False)
        load = not self._node_complete
        if self._node is None:
            self._node = Slab("appliance-weights", self._num_bytes)
        settings = self._settings
        plan = WeightPlan(
            own=settings.share == "copy",
            fingerprint=self._fingerprint,
            full_check=settings.full_check,
            threads=settings.threads,
        )
        if not plan.own:
            return Grant(fds=(self._node.fd,), plan=plan, load=load)
        if worker not in self._own:
            self._own[worker] = Slab(f"appliance-weights-{worker}", self._num_bytes)
        peers = self._peers_for(worker)
        names = (*(f"peer:{peer}" for peer in peers), HOST)
        fds = (self._own[worker].fd, *(self._own[peer].fd for peer in peers), self._node.fd)
        plan = WeightPlan(
            own=True,
            sources=names,
            fingerprint=plan.fingerprint,
            full_check=plan.full_check,
            threads=plan.threads,
        )
        return Grant(fds=fds, plan=plan, load=load)

    def started(self, worker: WorkerId, grant: Grant) -> None:
        """The incarnation that got `grant` runs."""
        if grant.load:
            self._loader = worker
        if grant.plan.own and worker not in self._complete:
            self._reading[worker] = grant.plan.sources

    def loaded(self, worker: WorkerId, report: WeightsLoaded) -> bool:
        """A living worker has its weights; True if those who wait can go on now."""
        self._reading.pop(worker, None)
        if worker in self._own:
            self._complete.add(worker)
        if self._loader != worker:
            return False
        self._loader = None
        self._node_complete = True
        self._fingerprint = report.fingerprint
        return True

    def died(self, worker: WorkerId, *, confirmed: bool) -> bool:
        """An incarnation is gone; True if it was filling the node's slab: that is thrown away.

        Not `confirmed`: it may still write, so nobody shall read its slab any more."""
        self._reading.pop(worker, None)
        if not confirmed and (own := self._own.pop(worker, None)) is not None:
            self._complete.discard(worker)
            own.close()
        if self._loader != worker:
            return False
        self._loader = None
        if self._node is not None:
            self._node.close()
            self._node = None
        return True

    def close(self) -> None:
        """Give up all slabs."""
        for slab in self._own.values():
            slab.close()
        if self._node is not None:
            self._node.close()

    def _peers_for(self, worker: WorkerId) -> list[WorkerId]:
        """Peers with complete weights, the least loaded first."""

        def load(peer: WorkerId) -> tuple[int, float, int]:
            readers = sum(names[:1] == (f"peer:{peer}",) for names in self._reading.values())
            return readers, self._busy(peer), peer

        return sorted(self._complete - {worker}, key=load)[:MAX_PEERS]
