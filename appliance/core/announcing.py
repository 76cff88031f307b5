"""What the node hears of a worker's cache: a hint for placement, not a promise."""

from appliance.core.blocks import BlockLedger
from appliance.core.messages import CacheChanged, Report
from appliance.core.types import WorkerId


def cache_changes(worker: WorkerId, ledger: BlockLedger) -> list[Report]:
    """What can be found by content since the last call and what no longer can, in the pool and in
    the host tier; empty when nothing has changed."""
    added, removed = ledger.drain_changes()
    tier = ledger.tier
    tier_added, tier_removed = ((), ()) if tier is None else tier.drain_changes()
    if not (added or removed or tier_added or tier_removed):
        return []
    return [
        CacheChanged(
            worker=worker,
            added=added,
            removed=removed,
            tier_added=tier_added,
            tier_removed=tier_removed,
        )
    ]
