"""Runs against one server, one after the other, and what is known when each is over."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import msgspec

from appliance.bench.bodies import Requests
from appliance.bench.connection import Pool
from appliance.bench.judge import outcome_of
from appliance.bench.loop import Asked, LoopSettings, OpenLoop, quiet_collector
from appliance.bench.points import Offer, Point, items_of
from appliance.bench.target import BenchError, Target, fetch, why_silent
from appliance.metrics.outcome import Outcome
from appliance.metrics.score import Summary, summarise

INSTANCE_SECONDS = re.compile(
    rb"^appliance_instance_seconds(?:_total)? ([0-9.eE+-]+)", re.MULTILINE
)


GO_ON = "repeat the command (with --resume where --json has runs already)"


class Watcher(Protocol):
    """Who is told while a run goes on."""

    def began(self, point: Point, loop: OpenLoop, *, num_items: int) -> None:
        """A run is about to start."""

    def ended(self, outcome: Outcome) -> None:
        """One request is over."""


class Run(msgspec.Struct, frozen=True):
    """One run: every outcome, and the scores of those that count."""

    outcomes: Sequence[Outcome]
    summary: Summary


async def run_point(
    pool: Pool,
    target: Target,
    *,
    offer: Offer,
    point: Point,
    settings: LoopSettings,
    policy: str,
    watcher: Watcher,
) -> Run:
    """Offer the workload at one rate to the server behind `pool`, and score it. Raises `BenchError`
    where the server is gone: requests that nobody took say nothing of how it serves."""
    items, span = items_of(offer, point)
    requests = Requests(
        items,
        prompts=target.prompts(_salt(point)),
        settings=target.settings,
        head=target.address.head(target.settings.route.path),
    )
    outcomes: list[Outcome] = []

    def ended(asked: Asked) -> None:
        outcome = outcome_of(asked, start=loop.start, natural=settings.natural)
        outcomes.append(outcome)
        watcher.ended(outcome)

    loop = OpenLoop(items, requests=requests, pool=pool, settings=settings, on_end=ended)
    await _must_be_there(pool, target, point)
    before = await instance_seconds(pool, target)
    watcher.began(point, loop, num_items=len(items))
    with quiet_collector():
        await loop.run()
    await _must_be_there(pool, target, point)
    after = await instance_seconds(pool, target)
    if before is not None and after is not None and after < before:
        raise BenchError(
            f"{point.words}: the server has started again during the run, which is not kept. Look "
            f"into its log, then {GO_ON}"
        )
    outcomes.sort(key=lambda outcome: outcome.index)
    summary = summarise(
        outcomes,
        policy=policy,
        load=point.load,
        span=span,
        instance_seconds=0.0 if before is None or after is None else after - before,
        workload=offer.spec.name,
        arrivals="trace" if offer.is_timed else offer.arrivals,
        seed=point.seed,
        note=error_note(outcomes),
    )
    return Run(outcomes, summary)


async def _must_be_there(pool: Pool, target: Target, point: Point) -> None:
    why = await why_silent(pool, target.address)
    if why:
        raise BenchError(
            f"{point.words}: the server cannot be reached any more ({why}); the run is not kept. "
            f"Look into the server's log, start it again, then {GO_ON}"
        )


def error_note(outcomes: Sequence[Outcome]) -> str:
    """Errors of all requests by kind, the most frequent first; empty without any."""
    kinds = Counter(outcome.error for outcome in outcomes if outcome.error)
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())


async def instance_seconds(pool: Pool, target: Target) -> float | None:
    """What the server's workers have cost so far, where its metrics tell."""
    try:
        status, raw = await fetch(pool, target.address, "/metrics")
    except BenchError:
        return None  # not every server has them
    found = INSTANCE_SECONDS.search(raw) if status == 200 else None
    return float(found[1]) if found else None


async def policy_of(pool: Pool, target: Target) -> str:
    """The name of the server's policy where it tells one, else "server"."""
    try:
        status, raw = await fetch(pool, target.address, "/admin/state")
        document = msgspec.json.decode(raw) if status == 200 else {}
    except (BenchError, msgspec.DecodeError):
        return "server"
    policy = document.get("policy") if isinstance(document, dict) else None
    return policy if isinstance(policy, str) and policy else "server"


def _salt(point: Point) -> str:
    """Prompts of no run begin like those of another: what is cached is this run's own."""
    return f"{point.seed}/{os.urandom(8).hex()}"


def only_new(document_runs: Sequence[Summary], summary: Summary) -> tuple[Summary, ...]:
    """The runs with this one, which takes the place of a void one of the same point."""
    key = (summary.policy, summary.load, summary.seed)
    kept = [run for run in document_runs if (run.policy, run.load, run.seed) != key]
    return (*kept, summary)
