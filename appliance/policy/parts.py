"""Bricks that policies are made of: answers to a slot of the Batcher that several algorithms share.

All of them fill a step in the same way: every decode first, then prefill chunks with what is left
(after Agrawal et al., Sarathi-Serve, OSDI 2024, section 4). They differ in the order of the prompts
and in how much of a step these get.
"""

import heapq
from collections.abc import Callable, Sequence
from typing import Any

from appliance.core.slots import BatchSlots, FillSlot, Grant, VictimSlot
from appliance.core.types import Phase, RequestId
from appliance.core.view import LocalView, SeqView

Urgency = Callable[[SeqView], Any]
"""What sorts sequences, the most urgent first; two of them compare."""

OLDEST_SHARE = 16
"""Before a waiting prompt overtakes those that run, the oldest of these gets one part in so many of
the step: whatever becomes of the waiting one, the step is not empty."""


def fill_fcfs(view: LocalView, budget_tokens: int, now: float) -> list[Grant]:
    """Running prefills, then the queue. Neither waits for the decodes nor these for them: a decode
    never stands behind a prompt, and a prompt gets the rest of every step. First come, first served
    within each."""
    del now
    grants, prefills, left = _decodes(view, budget_tokens)
    if left:
        prefills.extend(view.waiting[: free_slots(view)])
        _spend(left, prefills, grants)
    return grants


def fill_chunked(*, chunk: int) -> FillSlot:
    """As `fill_fcfs`, with at most `chunk` (>= 1) tokens of prompts in a step."""

    def fill(view: LocalView, budget_tokens: int, now: float) -> list[Grant]:
        del now
        grants, prefills, left = _decodes(view, budget_tokens)
        if left:
            prefills.extend(view.waiting[: free_slots(view)])
            _spend(min(left, chunk), prefills, grants)
        return grants

    return fill


def fill_reserving(view: LocalView, budget_tokens: int, now: float) -> list[Grant]:
    """As `fill_fcfs`, but the first of the queue begins only when the longest answer that it may
    get fits beside the longest ones of all that run: nothing is ever preempted. Reads `max_tokens`.
    What moved here from another worker came without being asked."""
    del now
    grants, prefills, left = _decodes(view, budget_tokens)
    if left and view.waiting:
        free = view.total_blocks - sum(_peak_blocks(seq, view) for seq in view.running)
        for seq in view.waiting[: free_slots(view)]:
            free -= _peak_blocks(seq, view)
            if free < 0:  # never with nobody else here: no peak is more than the pool
                break
            prefills.append(seq)
    _spend(left, prefills, grants)
    return grants


def fill_urgent(urgency: Urgency, *, chunk: int = 0) -> FillSlot:
    """The most urgent prompts first, whether they run or wait; a waiting one overtakes those that
    run only if it surely fits into memory beside them. With `chunk`, at most so many tokens of
    prompts in a step."""

    def fill(view: LocalView, budget_tokens: int, now: float) -> list[Grant]:
        del now
        grants, prefills, left = _decodes(view, budget_tokens)
        if not left:
            return grants
        left = min(left, chunk) if chunk else left
        waiting: Sequence[SeqView] = view.waiting
        if len(waiting) > 1:
            waiting = sorted(waiting, key=urgency)
        waiting = waiting[: free_slots(view)]
        if not prefills or not waiting:
            prefills.sort(key=urgency)
            _spend(left, [*prefills, *waiting], grants)
            return grants
        oldest = prefills[0]
        prefills.sort(key=urgency)
        sure = num_sure(view, waiting, prefills)
        first = list(heapq.merge(prefills, waiting[:sure], key=urgency))
        if sure and urgency(waiting[0]) < urgency(prefills[0]):
            first.remove(oldest)
            share = min(left, max(1, budget_tokens // OLDEST_SHARE))
            left -= share - _spend(share, [oldest], grants)
        _spend(left, [*first, *waiting[sure:]], grants)
        return grants

    return fill


def victim_latest(view: LocalView, candidates: Sequence[SeqView], now: float) -> RequestId:
    """The victim that was admitted last has the least to lose and the longest to wait anyway.

    `candidates` come in the order of admission."""
    del view, now
    return candidates[-1].id


def victim_least_urgent(urgency: Urgency) -> VictimSlot:
    """The least urgent, and of equal ones the one that was admitted last."""

    def victim(view: LocalView, candidates: Sequence[SeqView], now: float) -> RequestId:
        del view, now
        return max(reversed(candidates), key=urgency).id

    return victim


def urgent_batch(urgency: Urgency, *, chunk: int = 0) -> BatchSlots:
    """The Batcher's slots of a policy that is an order of urgency and nothing else."""
    return BatchSlots(victim=victim_least_urgent(urgency), fill=fill_urgent(urgency, chunk=chunk))


def fcfs_batch() -> BatchSlots:
    """The Batcher's slots of a policy that has nothing to say there."""
    return BatchSlots(victim=victim_latest, fill=fill_fcfs)


def _decodes(view: LocalView, budget_tokens: int) -> tuple[list[Grant], list[SeqView], int]:
    """A grant for every sequence in decode while the budget lasts, the running prefills in the
    order of admission, and what is left."""
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
    return grants, prefills, left


def _spend(left: int, prefills: Sequence[SeqView], grants: list[Grant]) -> int:
    """Grant what is left to these in their order; returns what is still left then."""
    for seq in prefills:
        if left <= 0:
            break
        num_tokens = min(left, seq.num_known - seq.num_computed)
        grants.append(Grant(id=seq.id, num_tokens=num_tokens))
        left -= num_tokens
    return left


def free_slots(view: LocalView) -> int:
    """Sequences that may begin."""
    return max(0, view.max_num_seqs - (len(view.running) - len(view.stale)))


def num_sure(view: LocalView, waiting: Sequence[SeqView], prefills: Sequence[SeqView]) -> int:
    """How many of `waiting`, in their order, fit for certain beside what runs: as if none of their
    blocks were cached, and with a block to grow for everyone."""
    size = view.block_tokens
    room = view.free_blocks - len(view.running)
    for seq in prefills:
        room -= -(-seq.num_known // size) - seq.num_computed // size
    for index, seq in enumerate(waiting):
        room -= -(-seq.num_known // size) + 1
        if room < 0:
            return index
    return len(waiting)


def _peak_blocks(seq: SeqView, view: LocalView) -> int:
    """Blocks of the longest answer; no answer is longer than the pool."""
    request = seq.request
    longest = -(-(request.prompt_tokens + request.max_tokens) // view.block_tokens)
    return min(view.total_blocks, longest)
