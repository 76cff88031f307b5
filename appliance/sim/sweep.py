"""Sweeps: every policy at every load with every seed, each point a run of its own.

A load is relative to the *reference rate* of the machine for the workload, which is computed and
not measured: the requests per second at which every worker is busy all the time with full steps,
prompts in steps of `max_batch_tokens` tokens, answers in steps of `REFERENCE_DECODES` sequences.
Real schedulers end somewhere round it: a step that has both overlaps arithmetic and memory, and
latency targets cost something.
"""

import re
from collections.abc import Mapping, Sequence

from msgspec import field
from msgspec.structs import replace

from appliance.core.types import Record
from appliance.metrics.outcome import Outcome
from appliance.metrics.phases import Recovery, recoveries
from appliance.metrics.score import EmptySpan, Summary, check_span, summarise
from appliance.policy.choice import PolicyChoice, parse_choices, static_ratios
from appliance.sim.machine import Machine
from appliance.sim.simulation import Ablation, Extras, simulate
from appliance.workload.arrivals import Arrivals, change_times, parse_arrivals
from appliance.workload.generate import generate
from appliance.workload.items import Item
from appliance.workload.spec import Calibration, WorkloadSpec
from appliance.workload.traces import TraceRow, trace_items

REFERENCE_DECODES = 64
_SAMPLE = 4000


class Sweep(Record, frozen=True, kw_only=True):
    """What all points have in common. With `rows` arrivals and lengths are those of a trace."""

    spec: WorkloadSpec
    machine: Machine
    arrivals: str
    seconds: float
    reference: float
    """Requests per second at load 1."""
    rows: tuple[TraceRow, ...] = ()
    calibration: Calibration | None = None
    ablation: Ablation = Ablation()
    validate: bool = False


class Point(Record, frozen=True, kw_only=True):
    """One run."""

    choice: PolicyChoice
    load: float
    seed: int


class PointResult(Record, frozen=True, kw_only=True):
    """What came of it."""

    summary: Summary
    extras: Extras
    recoveries: tuple[Recovery, ...] = ()
    """After each change of the mix, where the arrivals have some."""
    counts: Mapping[str, int] = field(default_factory=dict)


def parse_policies(text: str, num_workers: int) -> list[PolicyChoice]:
    """Choices with commas between them; NAME@static stands for every static ratio of prompt to
    decode workers. Raises `PolicySettingsError`."""
    words: list[str] = []
    for word in re.split(r",(?![^{]*\})", text):
        if "@static" in word:
            ratios = static_ratios(num_workers)
            words += [word.replace("@static", f"@{roles}") for roles in ratios]
        else:
            words.append(word)
    choices = list(parse_choices(",".join(words)))
    for choice in choices:
        choice.role_tuple(num_workers)
    return choices


def points(
    choices: Sequence[PolicyChoice], loads: Sequence[float], seeds: Sequence[int]
) -> list[Point]:
    """Every point, load by load."""
    return [
        Point(choice=choice, load=load, seed=seed)
        for load in loads
        for seed in seeds
        for choice in choices
    ]


def items_of(sweep: Sweep, *, load: float, seed: int) -> list[Item]:
    """The requests of a run: the same for every policy."""
    spec, rate = sweep.spec, load * sweep.reference
    if not sweep.rows:
        return generate(
            spec,
            rate=rate,
            seconds=sweep.seconds,
            seed=seed,
            arrivals=parse_arrivals(sweep.arrivals),
            calibration=sweep.calibration,
        )
    timed = [row.arrival_s for row in sweep.rows if row.arrival_s is not None]
    if len(timed) < 2:
        return trace_items(
            spec,
            sweep.rows,
            rate=rate,
            seconds=sweep.seconds,
            seed=seed,
            arrivals=parse_arrivals(sweep.arrivals),
            calibration=sweep.calibration,
        )
    recorded = (len(timed) - 1) / max(max(timed) - min(timed), 1e-9)
    return trace_items(
        spec,
        sweep.rows,
        load=rate / recorded,
        seconds=sweep.seconds,
        seed=seed,
        calibration=sweep.calibration,
    )


def run_point(sweep: Sweep, point: Point) -> PointResult:
    """Simulate and score one point. Raises `EmptySpan` where no request counts."""
    items = items_of(sweep, load=point.load, seed=point.seed)
    warm, end = counted_span(sweep, items, load=point.load)
    result = simulate(
        items,
        point.choice,
        sweep.machine,
        seed=point.seed,
        validate=sweep.validate,
        ablation=sweep.ablation,
    )
    summary = summarise(
        result.outcomes,
        policy=point.choice.word,
        load=point.load,
        span=(warm, end),
        instance_seconds=result.instance_seconds,
        workload=sweep.spec.name,
        arrivals="trace" if sweep.rows else sweep.arrivals,
        seed=point.seed,
    )
    return PointResult(
        summary=summary,
        extras=result.extras,
        recoveries=_recoveries(sweep, result.outcomes, point, end),
        counts={"items": len(items), "tokens": sum(each.num_tokens for each in result.outcomes)},
    )


def counted_span(sweep: Sweep, items: Sequence[Item], *, load: float) -> tuple[float, float]:
    """From when to when requests count, in seconds of the run. Raises `EmptySpan`, which names the
    load, where none is due then."""
    end = sweep.seconds
    if sweep.rows and items:
        end = min(end, items[-1].at + 1e-6)
    warm = min(sweep.spec.warm_up_seconds, end / 4)
    try:
        check_span((item.at for item in items), (warm, end))
    except EmptySpan as error:
        raise EmptySpan(f"load {load:g}: {error}") from error
    return warm, end


def _recoveries(
    sweep: Sweep, outcomes: Sequence[Outcome], point: Point, end: float
) -> tuple[Recovery, ...]:
    if sweep.rows:
        return ()
    arrivals: Arrivals = parse_arrivals(sweep.arrivals)
    shares = {one.name: one.share for one in sweep.spec.classes}
    rate = point.load * sweep.reference
    changes = change_times(arrivals, rate=rate, seconds=end, shares=shares)
    return tuple(recoveries(outcomes, changes, end=end)) if changes else ()


def calibration_of(machine: Machine) -> Calibration:
    """What an unloaded worker of this machine takes, by its profile: for relative targets."""
    step, size = machine.profile.step_seconds, machine.max_batch_tokens

    def prompt(num_tokens: int) -> float:
        return step(
            num_tokens=num_tokens,
            num_samples=1,
            num_pairs=num_tokens * num_tokens // 2,
            num_kv_tokens=num_tokens,
        )

    least, most = prompt(1), prompt(size)
    delay = 2 * (machine.front_seconds + machine.pipe_seconds)
    context = 512
    tpot = step(num_tokens=1, num_samples=1, num_pairs=context, num_kv_tokens=context)
    return Calibration(a=least + delay, b=(most - least) / size, tpot0=tpot)


def reference_rate(machine: Machine, items: Sequence[Item]) -> float:
    """See the module's text; `items` are a sample of what arrives. 0 without any."""
    sample = items[:_SAMPLE]
    if not sample:
        return 0.0
    seconds = sum(_device_seconds(machine, item) for item in sample) / len(sample)
    return machine.num_workers / seconds


def reference_for(sweep: Sweep) -> float:
    """The reference rate of a sweep whose own is not known yet."""
    if sweep.rows:
        probe = replace(sweep, reference=1.0)
        return reference_rate(sweep.machine, _trace_sample(probe))
    items = generate(sweep.spec, rate=_SAMPLE / 100, seconds=100, seed=0)
    return reference_rate(sweep.machine, items)


def _trace_sample(sweep: Sweep) -> list[Item]:
    return trace_items(sweep.spec, sweep.rows, rate=float(_SAMPLE), seconds=1.0)


def _device_seconds(machine: Machine, item: Item) -> float:
    step = machine.profile.step_seconds
    prompt, answer = item.prompt_tokens, min(item.output_tokens, item.max_tokens)
    full, decodes = machine.max_batch_tokens, min(REFERENCE_DECODES, machine.max_num_seqs)
    prefill = step(
        num_tokens=full,
        num_samples=max(1, full // prompt),
        num_pairs=full * prompt // 2,
        num_kv_tokens=full,
    )
    context = prompt + answer // 2
    decode = step(
        num_tokens=decodes,
        num_samples=decodes,
        num_pairs=decodes * context,
        num_kv_tokens=decodes * context,
    )
    return prompt / full * prefill + answer / decodes * decode
