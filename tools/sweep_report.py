"""Tables and pictures of live sweeps.

    python -m tools.sweep_report sweep.jsonl [more.jsonl] --out sweep.md [--png DIRECTORY]
        [--subject hyperflexis@auto]

For each kind of arrivals: capacity at 90 and 99 % (all requests, worst class) of every policy, the
subject against its best rival and against FCFS round-robin, attainment load by load, recovery after
changes, overload. Intervals are explained in `tools.sweep_stats`; runs of several files and of
several seeds are pooled, but not of different devices, workloads or lengths. Policies are compared
on the requests that all of them met; which runs that leaves out is said."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from tools.sweep_kit import LiveRun, read_runs
from tools.sweep_stats import (
    Quantity,
    Reach,
    Sample,
    by_experiment,
    exactly,
    interval,
    mean_over,
    paired,
    ratio,
)

THRESHOLDS: Sequence[tuple[Quantity, float]] = (
    ("worst", 0.9), ("overall", 0.9), ("worst", 0.99), ("overall", 0.99),
)  # fmt: skip
QUANTITIES: Sequence[Quantity] = ("worst", "overall")
WORDS = {"overall": "all requests", "worst": "worst class"}
SUBJECT = "hyperflexis"
BASE = "round-robin"
ALLOWED = 0.02
"""How far the subject may be under the best rival at any load."""


def main() -> None:
    """Read, compute, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, help="markdown (else to the terminal)")
    parser.add_argument("--png", type=Path, metavar="DIRECTORY", help="pictures go there")
    parser.add_argument("--subject", help=f"the policy (else the first {SUBJECT}...)")
    options = parser.parse_args()
    runs = [run for file in options.files for run in read_runs(file)]
    if not runs:
        raise SystemExit("there is no run that counts in these files")
    text = "\n".join(report(runs, subject=options.subject)) + "\n"
    if options.out is None:
        print(text)
    else:
        options.out.write_text(text)
    if options.png is not None:
        from tools.sweep_plots import write_pictures

        for path in write_pictures(runs, options.png):
            print(path)


def report(runs: Sequence[LiveRun], *, subject: str | None = None) -> Iterator[str]:
    """Lines of markdown."""
    for words, everything in by_experiment(runs).items():
        group, left_out = paired(everything)
        arrivals = group[0].arrivals
        policies = list(dict.fromkeys(run.policy for run in group))
        chosen = subject if subject in policies else _first(policies, SUBJECT)
        yield f"## Arrivals: {words}"
        yield ""
        yield _scope(group)
        yield ""
        if left_out:
            yield f"Left out: {'; '.join(left_out)}."
            yield ""
        if arrivals.startswith("steps"):
            yield from overload_table(group, runs)
            continue
        sample = Sample(group)
        yield from capacity_table(sample)
        if chosen is not None:
            yield from against_rivals(sample, chosen)
        yield from load_table(sample, chosen)
        if chosen is not None:
            yield from base_table(group, sample, chosen)
        yield from latency_table(group)
        if any(run.recoveries for run in group):
            yield from recovery_table(group)


def capacity_table(sample: Sample) -> Iterator[str]:
    """A line per policy."""
    heads = [f"{WORDS[quantity]}, {level:.0%}" for quantity, level in THRESHOLDS]
    yield "Capacity, requests per second [95 % interval]:"
    yield ""
    yield f"| policy | {' | '.join(heads)} |"
    yield f"| --- |{' --- |' * len(heads)}"
    for policy in sample.policies:
        cells = []
        for quantity, level in THRESHOLDS:
            found = sample.capacities(policy, quantity, level)
            cells.append(f"{_capacity(found)} {interval(found).bounds(1)}")
        yield f"| {policy} | {' | '.join(cells)} |"
    yield ""
    yield "≥: nothing had failed up to the largest rate tried; ≤: the smallest one already had."
    yield "Before a bound of an interval the same is meant of the resamples that it comes from."
    yield ""


def against_rivals(sample: Sample, subject: str) -> Iterator[str]:
    """The subject's capacity over that of its best rival."""
    rivals = _rivals(sample.policies)
    if not rivals:
        return
    yield f"{subject} against the best rival:"
    yield ""
    for quantity, level in THRESHOLDS:
        best = sample.best(rivals, quantity, level)
        ours, theirs = (sample.capacities(one, quantity, level) for one in (subject, best))
        words = _against(ours, theirs)
        yield f"- {WORDS[quantity]} at {level:.0%}: {words} (best rival: {best})"
    yield ""


def _against(ours: Reach, theirs: Reach) -> str:
    if theirs.nothing:
        return "neither holds it at any load" if ours.nothing else "no rival holds it at any load"
    words = ratio(ours, theirs).words
    match ours.at_least, theirs.at_least:
        case True, True:
            return f"undecided, neither failed: {words}"
        case True, False:
            return f"at least {words}"
        case False, True:
            return f"at most {words}: the rival failed nowhere"
        case _:
            return words


def load_table(sample: Sample, subject: str | None) -> Iterator[str]:
    """Attainment of all policies at all rates."""
    for quantity in QUANTITIES:
        yield f"Attainment, {WORDS[quantity]}, by requests per second:"
        yield ""
        yield f"| policy | {' | '.join(f'{rate:g}' for rate in sample.rates)} |"
        yield f"| --- |{' --- |' * len(sample.rates)}"
        for policy in sample.policies:
            cells = [
                f"{sample.attainment(policy, rate, quantity)[0]:.1%}"
                if sample.has(policy, rate)
                else ""
                for rate in sample.rates
            ]
            yield f"| {policy} | {' | '.join(cells)} |"
        if subject is not None:
            cells = [_difference(sample, subject, rate, quantity) for rate in sample.rates]
            yield f"| *{subject} minus best rival, points* | {' | '.join(cells)} |"
        yield ""


def _difference(sample: Sample, subject: str, rate: float, quantity: Quantity) -> str:
    """In points with its interval; bold where it is under by more than what is allowed, and by more
    than chance."""
    rivals = [one for one in _rivals(sample.policies) if sample.has(one, rate)]
    if not rivals or not sample.has(subject, rate):
        return ""
    best = max(rivals, key=lambda one: sample.attainment(one, rate, quantity)[0])
    ours = sample.attainment(subject, rate, quantity)
    found = interval(exactly(100 * (ours - sample.attainment(best, rate, quantity))))
    words = f"{found.value:+.1f} [{found.low:+.1f}, {found.high:+.1f}]"
    return f"**{words}**" if found.value < -100 * ALLOWED and found.high < 0 else words


def base_table(group: Sequence[LiveRun], sample: Sample, subject: str) -> Iterator[str]:
    """The subject against FCFS round-robin at every rate."""
    base = _first(sample.policies, BASE)
    if base is None:
        return
    e2e = mean_over(group, lambda run: run.e2e_ms.mean)
    ttft = mean_over(group, lambda run: run.ttft_ms.mean)
    yield f"{subject} against {base}:"
    yield ""
    yield (
        "| requests/s | attainment ratio, all | worst class | goodput ratio |"
        " mean latency lower by | mean TTFT lower by |"
    )
    yield "| --- | --- | --- | --- | --- | --- |"
    goodput = mean_over(group, lambda run: run.goodput)
    for rate in sample.rates:
        if not (sample.has(subject, rate) and sample.has(base, rate)):
            continue
        pair = ((subject, rate), (base, rate))
        ratios = [
            ratio(*(exactly(sample.attainment(policy, rate, quantity)) for policy, _ in pair)).words
            for quantity in ("overall", "worst")
        ]
        gain = goodput[pair[0]] / goodput[pair[1]] if goodput[pair[1]] else float("inf")
        lower = [
            f"{1 - figure[pair[0]] / figure[pair[1]]:.1%}" if pair[1] in figure else ""
            for figure in (e2e, ttft)
        ]
        yield f"| {rate:g} | {' | '.join(ratios)} | {gain:.2f} | {' | '.join(lower)} |"
    yield ""


def latency_table(group: Sequence[LiveRun]) -> Iterator[str]:
    """p99 of TTFT and of the whole answer, mean latency, instance-seconds."""
    figures = (
        ("TTFT p99, s", mean_over(group, lambda run: _seconds(run.ttft_ms.p99))),
        ("latency mean, s", mean_over(group, lambda run: _seconds(run.e2e_ms.mean))),
        ("latency p99, s", mean_over(group, lambda run: _seconds(run.e2e_ms.p99))),
        ("goodput, requests/s", mean_over(group, lambda run: run.goodput)),
        ("instance-seconds", mean_over(group, lambda run: run.instance_seconds)),
    )
    rates = sorted({run.rate for run in group})
    for words, figure in figures:
        yield f"{words}, by requests per second:"
        yield ""
        yield f"| policy | {' | '.join(f'{rate:g}' for rate in rates)} |"
        yield f"| --- |{' --- |' * len(rates)}"
        for policy in dict.fromkeys(run.policy for run in group):
            cells = [
                f"{figure[policy, rate]:.3g}" if (policy, rate) in figure else "" for rate in rates
            ]
            yield f"| {policy} | {' | '.join(cells)} |"
        yield ""


def recovery_table(group: Sequence[LiveRun]) -> Iterator[str]:
    """Time until attainment is above 90 % again after each change."""
    yield "After each change of the mix: seconds until attainment is above 90 % and stays there"
    yield "(up to the next change), and attainment of the requests due in the first 30 s of it:"
    yield ""
    yield "| policy | requests/s | changes | median | mean | longest | never | first 30 s |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for rate in sorted({run.rate for run in group}):
        for policy in dict.fromkeys(run.policy for run in group):
            found = [
                one
                for run in group
                if (run.policy, run.rate) == (policy, rate)
                for one in run.recoveries
            ]
            if not found:
                continue
            times = [
                one.until - one.change if one.seconds is None else one.seconds for one in found
            ]
            never = sum(one.seconds is None for one in found)
            early = np.mean([one.first_30s for one in found])
            yield (
                f"| {policy} | {rate:g} | {len(found)} | {np.median(times):.1f} |"
                f" {np.mean(times):.1f} | {max(times):.1f} | {never} | {early:.1%} |"
            )
    yield ""
    yield "Where it is never back, the length of the phase counts."
    yield ""


def overload_table(group: Sequence[LiveRun], runs: Sequence[LiveRun]) -> Iterator[str]:
    """Goodput under overload against that at saturation (found among `runs`), and what came
    after."""
    plain = [run for run in runs if run.arrivals == "poisson"]
    yield (
        "| policy | rate x 1 | goodput at saturation | under overload | ratio | seconds to"
        " recover | goodput after | batch all done, s after the load |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for run in group:
        same = (run.policy, run.devices, run.workload)
        steady = [one.goodput for one in plain if (one.policy, one.devices, one.workload) == same]
        best = max(steady, default=float("nan"))
        under, after = run.piece_goodput[0], run.piece_goodput[-1]
        back = run.recoveries[0].seconds if run.recoveries else None
        done = "no" if run.batch_done is None else f"{run.batch_done:.0f}"
        yield (
            f"| {run.policy} | {run.rate:g} | {best:.1f} | {under:.1f} | {under / best:.2f} |"
            f" {'never' if back is None else f'{back:.1f}'} | {after:.1f} | {done} |"
        )
    yield ""
    yield "Saturation: the largest goodput that the policy reached with steady arrivals."
    yield ""


def _scope(group: Sequence[LiveRun]) -> str:
    seeds = sorted({run.seed for run in group})
    devices = ", ".join(sorted({run.devices for run in group}))
    spans = sorted({round(run.span_seconds) for run in group})
    versions = ", ".join(sorted({run.version for run in group}))
    late = max((run.lateness_ms.p99 or 0.0) for run in group)
    return (
        f"{len(group)} runs on {devices}, workload {group[0].workload}, {spans[0]} s each that"
        f" count, seeds {seeds}; client lateness p99 at most {late:.0f} ms; version {versions}."
    )


def _capacity(found: Reach) -> str:
    return "none" if found.nothing else f"{'≥ ' if found.at_least else ''}{found.rate:.1f}"


def _rivals(policies: Sequence[str]) -> list[str]:
    return [policy for policy in policies if not policy.startswith(SUBJECT)]


def _first(policies: Sequence[str], beginning: str) -> str | None:
    return next((policy for policy in policies if policy.startswith(beginning)), None)


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


if __name__ == "__main__":
    main()
