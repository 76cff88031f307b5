"""What the node shows of itself: the state document, its links, and the verdict on its health."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from appliance.core.lifecycle import WorkerState
from appliance.core.messages import HOST_TIER, LinkUp
from appliance.core.types import WorkerId
from appliance.core.view import WorkerView
from appliance.live.moves import MoveSeen
from appliance.live.records import Health

if TYPE_CHECKING:
    from appliance.live.node import Node

LINKED = frozenset(
    {WorkerState.READY, WorkerState.DRAINING, WorkerState.FLIPPING, WorkerState.PARKED}
)
"""States of workers whose processes are up."""
OUT_OF_SERVICE = frozenset({WorkerState.QUARANTINED, WorkerState.PARKED})


def state_document(node: "Node", now: float) -> dict[str, Any]:
    """Workers, queue and totals; times in seconds. Token counts are of computed tokens and go on
    over the lives of a worker."""
    view, stats, info = node.dispatcher.view, node.stats, node.info
    return {
        "workers": [_worker(node, worker, now) for worker in view.workers.values()],
        "links": [_link(link) for _, link in sorted(node.moves.links.items())],
        "moves": [_move(move, now) for move in node.moves.under_way.values()],
        "transfers": _transfers(node),
        "queue": {"waiting": view.num_waiting, "tokens": view.waiting_tokens},
        "spares": view.num_spares,
        "totals": {
            "live": node.dispatcher.num_live,
            "submitted": stats.submitted,
            "sequences": stats.sequences,
            "rejected": dict(stats.rejected),
            "ended": dict(stats.ended),
            "prompt_tokens": stats.prompt_tokens,
            "cached_tokens": stats.cached_tokens,
            "emitted_tokens": stats.emitted_tokens,
            "replaced": stats.replaced,
            "instance_seconds": node.dispatcher.instance_seconds(now),
            "trials": node.dispatcher.num_trials,
            "acquitted": node.dispatcher.num_acquitted,
        },
        "model": info.model,
        "policy": info.policy,
        "version": info.version,
        "draining": node.dispatcher.is_draining,
        "uptime": now - node.started_at,
    }


def missing_links(node: "Node") -> list[tuple[WorkerId, WorkerId]]:
    """(source, target) of every two workers in service between which no link is known; several
    after a start that is not complete."""
    up = [view.id for view in node.dispatcher.view.workers.values() if view.state in LINKED]
    return [(one, to) for one in up for to in up if one != to and (to, one) not in node.moves.links]


def _link(link: LinkUp) -> dict[str, Any]:
    return {
        "source": link.peer,
        "target": link.worker,
        "path": link.path,
        "bytes_per_second": link.bytes_per_second,
    }


def _move(move: MoveSeen, now: float) -> dict[str, Any]:
    return {
        "id": move.id,
        "kind": move.kind,
        "request": move.request_id,
        "source": move.source,
        "target": move.target,
        "stopped": move.stopped,
        "age": now - move.begun,
    }


def _transfers(node: "Node") -> dict[str, Any]:
    """How moves ended, and what went where by which path; a source of null is the target's own host
    memory."""
    moves = node.moves
    return {
        "moves": [
            {"kind": kind, "outcome": outcome, "count": count}
            for (kind, outcome), count in sorted(moves.outcomes.items())
        ],
        "prefixes": dict(moves.prefixes),
        "expired_leases": moves.expired_leases,
        "paths": [
            {
                "kind": kind,
                "path": path,
                "source": None if source == HOST_TIER else source,
                "target": target,
                "count": count.num,
                "bytes": count.num_bytes,
                "seconds": count.seconds,
            }
            for kind, path, source, target, count in moves.counts()
        ],
    }


def why_none(node: "Node") -> str:
    """The last death of each worker, and what helps when the kernel killed them."""
    causes = [
        f"worker {each} ({'+'.join(node.specs[each].devices)}): {node.dispatcher.last_cause(each)}"
        for each, view in node.dispatcher.view.workers.items()
        if view.state is not WorkerState.PARKED
    ]
    if any("SIGKILL" in cause for cause in causes):
        causes.append(
            "SIGKILL is what the kernel's out-of-memory killer sends (see dmesg): "
            "set kv.memory lower or use fewer workers (--devices)"
        )
    return "; ".join(causes)


def _worker(node: "Node", view: WorkerView, now: float) -> dict[str, Any]:
    spec = node.specs[view.id]
    life = node.workers.living.get(view.id)
    stats = node.stats.worker(view.id)
    load = view.load
    return {
        "id": view.id,
        "device": "+".join(spec.devices),
        "role": view.role.value,
        "state": view.state.value,
        "pid": None if life is None else life.pid,
        "blocks": {
            "total": load.blocks_total,
            "free": load.blocks_free,
            "cached": load.blocks_cached,
            "held": load.blocks_held,
            "leased": load.blocks_leased,
        },
        "host_tier_blocks": view.tier_blocks,
        "tokens": {"prefill": stats.prefill_tokens, "decode": stats.decode_tokens},
        "queued": load.queued,
        "running": load.running,
        "assigned": view.assigned,
        "steps": stats.steps,
        "step_seconds": view.step_seconds,
        "preemptions": stats.preemptions,
        "flips": stats.flips,
        "epoch": node.dispatcher.epoch(view.id),
        "deaths": stats.deaths,
        "last_cause": node.dispatcher.last_cause(view.id),
        "weights": {"source": stats.weights_source, "seconds": stats.weights_seconds},
        "age": now - view.as_of if view.as_of else None,
    }


def health(node: "Node", now: float) -> Health:
    """Idle is healthy, a long step with a heartbeat is healthy. Not healthy are: a scheduler that
    failed, workers that are all quarantined or have been away for long, and a worker that has
    work and does not move."""
    if node.broken:
        return Health(ok=False, reason=node.broken)
    workers = node.dispatcher.view.workers
    lost = [each for each in workers.values() if each.state is WorkerState.QUARANTINED]
    if lost and all(each.state in OUT_OF_SERVICE for each in workers.values()):
        causes = "; ".join(f"worker {w.id}: {node.dispatcher.last_cause(w.id)}" for w in lost)
        return Health(ok=False, reason=f"every worker is quarantined or parked ({causes})")
    if all(each.state is WorkerState.PARKED for each in workers.values()):
        return Health(ok=True, reason="every worker is parked")
    limit = node.settings.watch.kill_seconds
    if node.unready_since is not None and now - node.unready_since > limit:
        away = now - node.unready_since
        return Health(ok=False, reason=f"no worker has been ready for {away:.0f} s")
    stalled = stalls(node, workers, now)
    if stalled:
        return Health(ok=False, reason="; ".join(stalled))
    busy = sum(worker.assigned > 0 for worker in workers.values())
    return Health(ok=True, reason=f"{busy} of {len(workers)} workers have work" if busy else "idle")


def stalls(node: "Node", workers: Mapping[Any, WorkerView], now: float) -> list[str]:
    """Words for every ready worker that has work and makes no progress."""
    limit = node.settings.stall_seconds
    found = []
    for worker in workers.values():
        if worker.state is not WorkerState.READY or worker.assigned == 0:
            continue
        stats = node.stats.worker(worker.id)
        silence = node.workers.silence(worker.id, now)
        name = f"worker {worker.id} has work"
        if silence > limit:
            found.append(f"{name} and has given no sign of life for {silence:.1f} s")
        elif stats.in_step is not None and stats.in_step > node.settings.watch.kill_seconds:
            found.append(f"{name} and has been in one step for {stats.in_step:.0f} s")
        elif stats.in_step is None and now - stats.moved_at > limit:
            found.append(f"{name} and has made no step for {now - stats.moved_at:.1f} s")
    return found
