"""What the soak measures of the processes, and when it calls a series of samples growth.

Memory is judged at *settle points* only: no request is open, every worker is up, every connection
of the clients is closed. So all samples are of the same state, and whatever differs has stayed.
The first samples are warm-up: rings, pools and the name tables fill, the allocator finds its size.

The spared worker (the one of the highest number) is never hit and lives as long as the server.
"""

import statistics
from collections.abc import Mapping, Sequence

import psutil

from appliance.core.types import Record

WARM_UP_SHARE = 0.2
FEWEST_FOR_MEMORY = 9
"""Settle points after the warm-up; with fewer memory is shown and not judged."""
MIB = 1 << 20


class Sample(Record, frozen=True, kw_only=True):
    """The server and its processes at one moment; memory in bytes."""

    at: float
    settled: bool
    server_rss: int
    server_fds: int
    server_threads: int
    forker_rss: int
    """Of the fork server, the parent of all workers."""
    spared_rss: int
    """Of the worker that is never hit; 0 while it is not known."""
    workers_rss: int
    processes: int
    descriptors: int
    """Of all processes together."""
    threads: int


class Trend(Record, frozen=True, kw_only=True):
    """One quantity over the settle points after the warm-up."""

    name: str
    samples: int
    first: float
    """Median of the first third."""
    last: float
    slope_per_hour: float
    """By least squares."""
    limit: float
    """How much `last` may be over `first`."""
    judged: bool

    @property
    def grew(self) -> bool:
        """Whether this is a violation."""
        return self.judged and self.last - self.first > self.limit


LIMITS: Mapping[str, float] = {
    "server_rss": 6 * MIB,
    "forker_rss": 1 * MIB,
    "spared_rss": 4 * MIB,
    "workers_rss": 16 * MIB,
    "server_fds": 0,
    "server_threads": 0,
    "processes": 0,
    "descriptors": 0,
    "threads": 0,
}
"""Growth from the first to the last third that is allowed. The allocator's noise for memory, and
nothing at all for what can be counted."""
_MEMORY = ("server_rss", "forker_rss", "spared_rss", "workers_rss")


def take(server: int, *, spared: int | None, at: float, settled: bool) -> Sample:
    """Measure the server of this process id and everything below it."""
    root = psutil.Process(server)
    rss: dict[int, int] = {}
    parents: dict[int, int] = {}
    descriptors = threads = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            with process.oneshot():
                used, fds, count = (
                    process.memory_info().rss,
                    process.num_fds(),
                    process.num_threads(),
                )
                parents[process.pid] = process.ppid()
        except psutil.Error:  # it has just been killed
            continue
        rss[process.pid] = used
        descriptors += fds
        threads += count
    forkers = {pid for pid, parent in parents.items() if parent == server}
    return Sample(
        at=at,
        settled=settled,
        server_rss=rss[server],
        server_fds=root.num_fds(),
        server_threads=root.num_threads(),
        forker_rss=sum(rss[pid] for pid in forkers),
        spared_rss=rss.get(spared or 0, 0),
        workers_rss=sum(used for pid, used in rss.items() if pid != server and pid not in forkers),
        processes=len(rss),
        descriptors=descriptors,
        threads=threads,
    )


def trends(samples: Sequence[Sample]) -> list[Trend]:
    """One line per quantity."""
    settled = [sample for sample in samples if sample.settled]
    kept = settled[max(1, int(len(settled) * WARM_UP_SHARE)) :]
    if len(kept) < 2:
        return []
    return [_trend(name, limit, kept) for name, limit in LIMITS.items()]


def _trend(name: str, limit: float, samples: Sequence[Sample]) -> Trend:
    values = [float(getattr(sample, name)) for sample in samples]
    times = [sample.at for sample in samples]
    third = max(1, len(values) // 3)
    return Trend(
        name=name,
        samples=len(values),
        first=statistics.median(values[:third]),
        last=statistics.median(values[-third:]),
        slope_per_hour=3600 * statistics.linear_regression(times, values).slope,
        limit=limit,
        judged=name not in _MEMORY or len(values) >= FEWEST_FOR_MEMORY,
    )
