"""Bricks that policies are made of: answers to a slot that several algorithms share."""

from collections.abc import Sequence

from appliance.core.slots import Grant
from appliance.core.types import Phase, RequestId
from appliance.core.view import LocalView, SeqView


def fill_fcfs(view: LocalView, budget_tokens: int, now: float) -> list[Grant]:
    """Every decode first, then prefill chunks with what is left: running prefills, then the queue.

    Neither waits for the other: a decode never stands behind a prompt, and a prompt gets the rest
    of every step. First come, first served within each (after Agrawal et al., Sarathi-Serve, OSDI
    2024, section 4)."""
    del now
    stale = view.stale
    left = budget_tokens
    grants: list[Grant] = []
    prefills: list[SeqView] = []
    for seq in view.running:
        if stale and seq.id in stale:
            continue
        if seq.phase is Phase.PREFILL:
            prefills.append(seq)
            continue
        num_tokens = min(left, seq.num_known - seq.num_computed)
        if num_tokens <= 0:
            break
        grants.append(Grant(id=seq.id, num_tokens=num_tokens))
        left -= num_tokens
    free_slots = view.max_num_seqs - (len(view.running) - len(stale))
    if left and free_slots > 0:
        prefills.extend(view.waiting[:free_slots])
    for seq in prefills:
        if left <= 0:
            break
        num_tokens = min(left, seq.num_known - seq.num_computed)
        grants.append(Grant(id=seq.id, num_tokens=num_tokens))
        left -= num_tokens
    return grants


def victim_latest(view: LocalView, candidates: Sequence[SeqView], now: float) -> RequestId:
    """The victim that was admitted last has the least to lose and the longest to wait anyway.

    `candidates` come in the order of admission."""
    del view, now
    return candidates[-1].id
