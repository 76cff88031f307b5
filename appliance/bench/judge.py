"""From what came over the wire to an `Outcome`."""

from collections.abc import Sequence
from itertools import pairwise
from math import ceil
from typing import Any

from appliance.bench.loop import Asked
from appliance.core.types import Slo
from appliance.metrics.outcome import Outcome


def outcome_of(asked: Asked, *, start: float, natural: bool = False) -> Outcome:
    """The fate of one request that is over; `start` is the run's zero on the answer's clock.
    `natural`: no particular number of tokens was wanted."""
    item, answer = asked.item, asked.answer
    times = [time - start for time in answer.times]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    return Outcome(
        index=item.index,
        class_name=item.class_name,
        slo=item.slo,
        prompt_tokens=answer.prompt_tokens or item.prompt_tokens,
        wanted_tokens=0 if natural else item.output_tokens,
        at=item.at,
        sent=asked.sent,
        first=times[0] if times else None,
        last=times[-1] if times else None,
        num_tokens=answer.num_tokens,
        on_time=on_time(times, slo=item.slo, sent=asked.sent, num_tokens=answer.num_tokens),
        longest_gap=max(gaps, default=0.0),
        finished=answer.finished,
        error=answer.error,
        cached_tokens=answer.cached_tokens,
        workers=_workers(answer.server),
        server=answer.server,
    )


def on_time(times: Sequence[float], *, slo: Slo, sent: float, num_tokens: int) -> float:
    """The share of tokens that came by `sent + ttft + k * tpot`, k from 0 (see `Outcome`). Where
    there are more tokens than events, they are spread evenly over the events."""
    if not times:
        return 0.0
    if slo.tpot is None:
        return 1.0
    start = times[0] if slo.ttft is None else sent + slo.ttft
    number, last = max(num_tokens, len(times)), len(times) - 1
    if number == len(times):
        kept = sum(time <= start + index * slo.tpot for index, time in enumerate(times))
    else:
        step = last / (number - 1)
        kept = sum(
            times[min(last, ceil(index * step))] <= start + index * slo.tpot
            for index in range(number)
        )
    return kept / number


def _workers(server: dict[str, Any] | None) -> tuple[int, ...]:
    given = server.get("workers") if server else None
    if not isinstance(given, list):
        return ()
    return tuple(worker for worker in given if isinstance(worker, int))
