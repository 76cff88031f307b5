"""GET /metrics: the node's state and this surface's counts in the Prometheus text format.

One registry per application and nothing in the package's globals, so two nodes in one process do
not meet. Everything is read at scrape time; between two scrapes no metric object is touched.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from aiohttp import web
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from appliance.api.families import counter, gauge, histogram
from appliance.api.limits import Account
from appliance.api.observe import ApiStats
from appliance.api.slo_metrics import BudgetMetrics
from appliance.api.transfer_metrics import transfer_metrics
from appliance.core.lifecycle import WorkerState
from appliance.core.types import Role
from appliance.live.holding import Holding
from appliance.live.node import Node

BLOCK_KINDS = ("total", "free", "cached", "held", "leased")


class Metrics:
    """The registry of one application."""

    def __init__(self, node: Node, stats: ApiStats, accounts: Mapping[str, Account]) -> None:
        """Also begins to listen to the node's steps and moves."""
        node.stats.observe_step = stats.step
        node.moves.observe = stats.moved
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Surface(stats))
        self._registry.register(BudgetMetrics(stats, node.stats, node.dispatcher.view.cost.steps))
        self._registry.register(_Engine(node))
        if accounts:
            self._registry.register(_Keys(accounts))
        ProcessCollector(namespace="appliance", registry=self._registry)

    def render(self) -> bytes:
        """The exposition text."""
        return generate_latest(self._registry)


METRICS = web.AppKey("metrics", Metrics)


async def handle(request: web.Request) -> web.Response:
    """All metrics."""
    return web.Response(
        body=request.app[METRICS].render(), headers={"Content-Type": CONTENT_TYPE_LATEST}
    )


class _Surface(Collector):
    """What the HTTP surface keeps."""

    def __init__(self, stats: ApiStats) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """All families."""
        stats = self._stats
        yield counter(
            "http_responses",
            "HTTP answers by route and status.",
            ["route", "status"],
            [([route, str(status)], n) for (route, status), n in sorted(stats.responses.items())],
        )
        yield from self._latencies()
        yield histogram(
            "kv_move_seconds",
            "From the stop of a sequence at one worker to its going on at another.",
            ["kind", "path"],
            [(list(key), times) for key, times in sorted(stats.move_seconds.items())],
        )
        alone = (
            ("step_seconds", "Duration of one forward step.", stats.step_seconds),
            ("step_sequences", "Sequences that got a token in one step.", stats.step_sequences),
            ("loop_lag_seconds", "How late the event loop wakes a sleeper.", stats.loop_lag),
        )
        for name, words, each in alone:
            yield histogram(name, words, [], [([], each)])

    def _latencies(self) -> Iterator[Metric]:
        words = {
            "time_to_first_token_seconds": "Arrival of the request to its first token.",
            "inter_token_latency_seconds": "Gap between two consecutive tokens of an answer.",
            "request_time_per_output_token_seconds": "Mean gap of an answer after its first token.",
            "e2e_request_latency_seconds": "Arrival of the request to the end of an answer.",
        }
        classes = sorted(self._stats.classes.items())
        columns = [(latency.ttft, latency.itl, latency.tpot, latency.e2e) for _, latency in classes]
        for index, (name, text) in enumerate(words.items()):
            series = [
                ([label], row[index]) for (label, _), row in zip(classes, columns, strict=True)
            ]
            yield histogram(name, text, ["slo_class"], series)


class _Keys(Collector):
    """What each key has used."""

    def __init__(self, accounts: Mapping[str, Account]) -> None:
        self._accounts = accounts

    def collect(self) -> Iterator[Metric]:
        """All families."""
        accounts = sorted(self._accounts.items())
        yield counter(
            "key_requests",
            "Requests of a key that were let in.",
            ["key"],
            [([name], account.requests) for name, account in accounts],
        )
        yield counter(
            "key_tokens",
            "Tokens charged to a key.",
            ["key", "kind"],
            [
                ([name, kind], count)
                for name, account in accounts
                for kind, count in (
                    ("prompt", account.prompt_tokens),
                    ("generated", account.generated_tokens),
                )
            ],
        )
        yield counter(
            "key_requests_refused",
            "Requests of a key that one of its limits turned away.",
            ["key", "limit"],
            [
                ([name, limit], count)
                for name, account in accounts
                for limit, count in sorted(account.refused.items())
            ],
        )


class _Engine(Collector):
    """What the node says of itself and its workers."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def collect(self) -> Iterator[Metric]:
        """All families."""
        info, state = self._node.info, self._node.state()
        yield gauge(
            "build_info",
            "Version, model and policy.",
            ["version", "model", "policy"],
            [([info.version, info.model, info.policy], 1)],
        )
        yield from self._counters()
        yield from _holding(self._node.holding)
        yield from self._queues(state)
        yield from _worker_gauges(state["workers"])
        yield from transfer_metrics(self._node.moves)
        yield from self._worker_counters()

    def _counters(self) -> Iterator[Metric]:
        stats, node = self._node.stats, self._node.dispatcher
        yield counter(
            "requests",
            "Answers by outcome: a finish reason or the code of an error.",
            ["outcome"],
            [([outcome], count) for outcome, count in sorted(stats.ended.items())],
        )
        yield counter(
            "requests_rejected",
            "Requests turned away by reason.",
            ["reason"],
            [([reason], count) for reason, count in sorted(stats.rejected.items())],
        )
        totals = (
            ("prompt_tokens", "Prompt tokens of ended answers.", stats.prompt_tokens),
            ("cached_prompt_tokens", "Those of them found in a cache.", stats.cached_tokens),
            ("generation_tokens", "Tokens of ended answers.", stats.emitted_tokens),
            ("requests_replaced", "Answers that went on elsewhere.", stats.replaced),
            ("request_trials", "Suspects of worker deaths that were tried.", node.num_trials),
            ("request_acquittals", "Those of them that were acquitted.", node.num_acquitted),
            ("instance_seconds", "Seconds of unparked workers.", self._node.instance_seconds),
        )
        for name, words, value in totals:
            yield counter(name, words, [], [([], value)])

    def _queues(self, state: dict[str, Any]) -> Iterator[Metric]:
        workers = state["workers"]
        running = sum(worker["running"] for worker in workers)
        queued = sum(worker["queued"] for worker in workers) + state["queue"]["waiting"]
        yield gauge("num_requests_running", "Sequences in a batch.", [], [([], running)])
        yield gauge(
            "num_requests_waiting",
            "Sequences not in a batch, at the node and at its workers.",
            [],
            [([], queued)],
        )

    def _worker_counters(self) -> Iterator[Metric]:
        workers = [(str(key), worker) for key, worker in sorted(self._node.stats.workers.items())]
        yield counter(
            "worker_tokens",
            "Computed tokens by phase.",
            ["worker", "phase"],
            [
                ([name, phase], count)
                for name, worker in workers
                for phase, count in (
                    ("prefill", worker.prefill_tokens),
                    ("decode", worker.decode_tokens),
                )
            ],
        )
        single: dict[str, tuple[str, list[float]]] = {
            "worker_steps": ("Forward steps.", [worker.steps for _, worker in workers]),
            "worker_busy_seconds": (
                "Time in steps.",
                [worker.busy_seconds for _, worker in workers],
            ),
            "worker_restarts": (
                "Starts after the first.",
                [max(0, worker.starts - 1) for _, worker in workers],
            ),
            "worker_deaths": ("Unwanted ends.", [worker.deaths for _, worker in workers]),
            "worker_flips": (
                "Changes of its role while it ran.",
                [worker.flips for _, worker in workers],
            ),
            "worker_preemptions": (
                "Sequences that lost their blocks to others.",
                [worker.preemptions for _, worker in workers],
            ),
        }
        for metric, (words, values) in single.items():
            series = [([workers[i][0]], float(value)) for i, value in enumerate(values)]
            yield counter(metric, words, ["worker"], series)


def _holding(holding: Holding) -> Iterator[Metric]:
    yield gauge(
        "loop_busy_ratio",
        "Share of the event loop's time in use, lately.",
        [],
        [([], holding.busy)],
    )
    yield gauge(
        "stream_hold_seconds",
        "How long a token may wait now to leave with others; 0 while the load is normal.",
        [],
        [([], holding.seconds)],
    )
    totals = (
        ("stream_hold_active_seconds", "Time with a hold.", holding.held_seconds),
        ("stream_pushes", "Deliveries of tokens to answers.", holding.num_pushes),
        (
            "stream_joined_tokens",
            "Tokens delivered together with an earlier one of their answer.",
            holding.num_joined,
        ),
    )
    for name, words, value in totals:
        yield counter(name, words, [], [([], value)])


def _worker_gauges(workers: Sequence[dict[str, Any]]) -> Iterator[Metric]:
    yield gauge(
        "worker_state",
        "1 for the state a worker is in.",
        ["worker", "state"],
        [
            ([str(worker["id"]), state.value], float(worker["state"] == state.value))
            for worker in workers
            for state in WorkerState
        ],
    )
    yield gauge(
        "worker_role",
        "1 for the role a worker has.",
        ["worker", "role"],
        [
            ([str(worker["id"]), role.value], float(worker["role"] == role.value))
            for worker in workers
            for role in Role
        ],
    )
    yield gauge(
        "kv_blocks",
        "KV blocks of a worker by kind; free counts cached ones too.",
        ["worker", "kind"],
        [
            ([str(worker["id"]), kind], worker["blocks"][kind])
            for worker in workers
            for kind in BLOCK_KINDS
        ],
    )
