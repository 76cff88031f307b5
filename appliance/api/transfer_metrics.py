"""Metrics of KV that goes from worker to worker: how moves end, what went by which path, links.

Every transfer is counted with the path that it took, so that a slower one than expected shows.
"""

from collections.abc import Iterator

from prometheus_client.core import Metric

from appliance.api.families import counter, gauge
from appliance.live.moves import Moves, source_name

_PAIR = ["kind", "path", "source", "target"]


def transfer_metrics(moves: Moves) -> Iterator[Metric]:
    """All families."""
    yield counter(
        "kv_moves",
        "Sequences whose KV was to go to another worker, by how that ended.",
        ["kind", "outcome"],
        [([kind, outcome], count) for (kind, outcome), count in sorted(moves.outcomes.items())],
    )
    yield gauge("kv_moves_under_way", "Moves now.", [], [([], len(moves.under_way))])
    yield counter(
        "kv_leases_expired",
        "Leases that ended because nobody had taken the KV in time.",
        [],
        [([], moves.expired_leases)],
    )
    yield counter(
        "kv_prefix_pulls",
        "Cached prefixes to be fetched from a peer or from host memory, by how much of them came.",
        ["outcome"],
        [([outcome], count) for outcome, count in sorted(moves.prefixes.items())],
    )
    counts = [
        ([kind, path, source_name(source), str(target)], count)
        for kind, path, source, target, count in moves.counts()
    ]
    yield counter(
        "kv_transfers", "Transfers that succeeded.", _PAIR, [(key, c.num) for key, c in counts]
    )
    yield counter(
        "kv_transfer_bytes", "Their bytes.", _PAIR, [(key, c.num_bytes) for key, c in counts]
    )
    yield counter(
        "kv_transfer_seconds",
        "Their time; of a move from the stop of its source.",
        _PAIR,
        [(key, c.seconds) for key, c in counts],
    )
    yield gauge(
        "kv_link_bytes_per_second",
        "Speed of a link when it was probed.",
        ["path", "source", "target"],
        [
            ([link.path, str(link.peer), str(link.worker)], link.bytes_per_second)
            for _, link in sorted(moves.links.items())
        ],
    )
