"""Clients: they send when it is time, whatever happens, and note when each token comes."""

from collections.abc import Sequence
from operator import sub

from appliance.core.messages import Ended, Reject
from appliance.core.types import ErrorKind, Slo, WorkerId
from appliance.metrics.outcome import Outcome
from appliance.workload.items import Item


class Client:
    """One request under way. Times are those of the node's clock."""

    __slots__ = ("demoted", "item", "sent", "times", "worker", "workers")

    def __init__(self, item: Item, sent: float) -> None:
        self.item = item
        self.sent = sent
        self.times: list[float] = []
        """When the node had each token."""
        self.worker: WorkerId | None = None
        """Whose tokens are its."""
        self.workers: list[int] = []
        self.demoted = False

    def at(self, worker: WorkerId) -> None:
        """Served there from now on."""
        self.worker = worker
        if self.workers[-1:] != [worker]:
            self.workers.append(worker)

    def outcome(self, end: Ended | Reject | None, *, origin: float, delay: float) -> Outcome:
        """What came of it. `origin` is the start of the run, `delay` from node to client. None:
        nothing has, the run is over."""
        item, times = self.item, self.times
        error, cached, finished = "unfinished", 0, False
        match end:
            case Ended(reason=reason, error=kind, cached_tokens=cached_tokens):
                finished = reason is not None
                error = "" if finished else str((kind or ErrorKind.INTERNAL).value)
                cached = cached_tokens
            case Reject(kind=kind):
                error = kind.value
            case None:
                pass
        shift = delay - origin
        return Outcome(
            index=item.index,
            class_name=item.class_name,
            slo=item.slo,
            prompt_tokens=item.prompt_tokens,
            wanted_tokens=min(item.output_tokens, item.max_tokens),
            at=item.at,
            sent=self.sent - origin,
            first=times[0] + shift if times else None,
            last=times[-1] + shift if times else None,
            num_tokens=len(times),
            on_time=on_time(times, item.slo, sent=self.sent - delay),
            longest_gap=max(map(sub, times[1:], times), default=0.0),
            finished=finished,
            error=error,
            cached_tokens=cached,
            workers=tuple(self.workers),
            server={"demoted": True} if self.demoted else None,
        )


def on_time(times: Sequence[float], slo: Slo, *, sent: float) -> float:
    """Share of tokens that came by `sent + ttft + k * tpot`; see `Outcome`. 0 of none."""
    if not times:
        return 0.0
    if slo.tpot is None:
        return 1.0
    due = times[0] if slo.ttft is None else sent + slo.ttft
    tpot, good = slo.tpot, 0
    for time in times:
        good += time <= due
        due += tpot
    return good / len(times)
