"""Items from a request trace: its arrivals, lengths, shared prefixes and classes.

What a trace lacks comes from the specification: classes by the shares, targets of the class, and
arrivals where only lengths are known. A load factor divides the times."""

from collections.abc import Mapping, Sequence
from itertools import accumulate

import msgspec

from appliance.core.types import Slo
from appliance.workload.arrivals import Arrivals, arrival_times, parse_arrivals
from appliance.workload.draws import Draws
from appliance.workload.generate import asked_tokens
from appliance.workload.items import Item
from appliance.workload.lengths import fitted
from appliance.workload.spec import Calibration, WorkloadSpec
from appliance.workload.trace_rows import (
    TraceError,
    TraceRow,
    block_tokens,
    read_trace,
    spread_seconds,
)

__all__ = ["TraceError", "TraceRow", "read_trace", "trace_items"]


def trace_items(
    spec: WorkloadSpec,
    rows: Sequence[TraceRow],
    *,
    load: float = 1.0,
    seconds: float | None = None,
    seed: int = 0,
    rate: float | None = None,
    arrivals: Arrivals | None = None,
    spread: float | None = None,
    prefix_block_tokens: int | None = None,
    calibration: Calibration | None = None,
) -> list[Item]:
    """The requests of a trace, sorted by `at`, the first at about 0.

    `load` 2 plays it at twice its speed; `seconds` cuts the run there (after scaling). Arrivals
    recorded in coarse steps are spread evenly over `spread` seconds (None: as detected, 0: not).
    Rows of lengths alone arrive by `arrivals` (None: the specification's) at `rate`; then `rate`
    and `seconds` must be given. A row's `class` counts if the specification has it, or if the row
    has an `slo` of its own ({ttft_ms, tpot_ms, e2e_ms}); else the class is drawn by the shares.

    Raises `TraceError` naming what is missing."""
    timed = [row for row in rows if row.arrival_s is not None]
    if timed:
        placed = _recorded(timed, load=load, spread=spread, seed=seed)
    else:
        placed = _by_process(
            spec, rows, rate=rate, seconds=seconds, seed=seed, arrivals=arrivals, load=load
        )
    calibration = calibration or spec.calibration
    size = block_tokens(rows) if prefix_block_tokens is None else prefix_block_tokens
    classes = Draws(seed, "trace classes")
    cumulative = list(accumulate(one.share for one in spec.classes))
    items: list[Item] = []
    for at, row in placed:
        drawn = spec.classes[classes.pick(cumulative)].name
        if seconds is not None and at >= seconds:
            break
        prompt, output = fitted(
            row.prompt_tokens, row.output_tokens, scale=spec.length_scale, max_len=spec.max_len
        )
        slo = _slo(spec, row, drawn, prompt=prompt, calibration=calibration)
        block = max(1, round(size * spec.length_scale)) if size else 0
        items.append(
            Item(
                index=len(items),
                at=at,
                class_name=slo.class_name,
                prompt_tokens=prompt,
                output_tokens=output,
                max_tokens=asked_tokens(spec, prompt, output),
                slo=slo,
                prefix=row.prefix_ids[: -(-prompt // block)] if block else (),
                prefix_block_tokens=block,
            )
        )
    return items


def _recorded(
    rows: Sequence[TraceRow], *, load: float, spread: float | None, seed: int
) -> list[tuple[float, TraceRow]]:
    """Rows with their times, from 0, scaled and in order."""
    if load <= 0:
        raise TraceError(f"load = {load}: must be above 0")
    step = spread_seconds(rows) if spread is None else spread
    draws = Draws(seed, "trace spread")
    start = min(row.arrival_s for row in rows if row.arrival_s is not None)
    placed = []
    for row in rows:
        assert row.arrival_s is not None
        shift = draws.uniform() * step if step else 0.0
        placed.append(((row.arrival_s - start + shift) / load, row))
    placed.sort(key=lambda pair: pair[0])
    return placed


def _by_process(
    spec: WorkloadSpec,
    rows: Sequence[TraceRow],
    *,
    rate: float | None,
    seconds: float | None,
    seed: int,
    arrivals: Arrivals | None,
    load: float,
) -> list[tuple[float, TraceRow]]:
    """Rows drawn from the trace, at times of a process."""
    if rate is None or seconds is None:
        raise TraceError("the trace has lengths only: give a rate and seconds for its arrivals")
    times = arrival_times(
        parse_arrivals(spec.arrivals) if arrivals is None else arrivals,
        rate=rate * load,
        seconds=seconds,
        shares={one.name: one.share for one in spec.classes},
        seed=seed,
    )
    draws = Draws(seed, "trace rows")
    return [(at, rows[int(draws.uniform() * len(rows))]) for at, _ in times]


class _RowSlo(msgspec.Struct, frozen=True, kw_only=True):
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None


def _slo(
    spec: WorkloadSpec,
    row: TraceRow,
    drawn: str,
    *,
    prompt: int,
    calibration: Calibration | None,
) -> Slo:
    known = spec.named(row.class_name) if row.class_name else None
    if isinstance(row.slo, Mapping):
        try:
            own = msgspec.convert(row.slo, _RowSlo)
        except msgspec.ValidationError as error:
            raise TraceError(f"slo = {row.slo!r}: {error}") from error
        if own != _RowSlo():
            return Slo(
                class_name=row.class_name or drawn,
                ttft=_scaled(own.ttft_ms, spec.slo_scale),
                tpot=_scaled(own.tpot_ms, spec.slo_scale),
                e2e=_scaled(own.e2e_ms, spec.slo_scale),
                weight=known.weight if known is not None else 1.0,
            )
    kind = known if known is not None else spec.named(drawn)
    assert kind is not None
    return kind.slo(prompt, calibration=calibration, scale=spec.slo_scale)


def _scaled(milliseconds: float | None, scale: float) -> float | None:
    return None if milliseconds is None else milliseconds * scale / 1000
