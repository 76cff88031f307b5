"""HyperFlexis inside a step: decodes first, and as many prompt tokens as their slack allows.

Token number k of an answer (0 is the first) is due at t1 + k S2, so a sequence that has g tokens
can wait `t1 + g S2 - now` for its next one: what earlier tokens saved may be spent, and an answer
that could end with any token is in time whenever it ends. The tightest of these slacks bounds the
step; a sequence that is behind does not stop prompts altogether, since it catches up when steps
last no more than `floor` of its budget.

Prompts go in the order of urgency, those that cannot be in time any more last; they get a small
share of every step all the same, the oldest first."""

import math
from collections.abc import Sequence

from appliance.core.slots import Grant
from appliance.core.types import Phase, RequestId
from appliance.core.view import LocalView, SeqView
from appliance.policy.hyperflexis_budget import (
    ANSWER_SHARE,
    LEAST_CHUNK,
    HyperflexisSettings,
    first_token_due,
)
from appliance.policy.parts import num_sure

OLDEST_SHARE = 16
"""Before waiting prompts overtake running ones, one of these gets one part in so many of the chunk:
whatever becomes of those that wait, the step is not empty."""
CATCH_UP = 128
"""Tokens within which an answer that is behind its schedule must be able to catch up; one that is
not does not hold up the prompts of others any more."""
PROBE = 512
"""Prompt tokens of the step that stands for all when seconds per token are wanted."""


class Decodes:
    """The sequences in decode, and how long they can wait."""

    __slots__ = ("context", "least", "seqs", "slacks", "tight")

    def __init__(self) -> None:
        self.seqs: list[SeqView] = []
        self.slacks: list[float] = []
        self.context = 0
        self.least = math.inf
        """The tightest slack."""
        self.tight = math.inf
        """The tightest budget per token."""


class HyperflexisStep:
    """The slots `fill` and `victim`. Remembers nothing, so one object can serve many Batchers."""

    def __init__(self, settings: HyperflexisSettings) -> None:
        self._settings = settings

    # --- the step -------------------------------------------------------------------------------

    def fill(self, view: LocalView, budget_tokens: int, now: float) -> Sequence[Grant]:
        """Decodes, then prompts up to the chunk that the tightest slack allows."""
        decodes, prompts = self._sort_out(view, now)
        waiting = view.waiting
        grants: list[Grant] = []
        left = budget_tokens
        for seq in self._stepped(view, decodes):
            num_tokens = min(left, seq.num_known - seq.num_computed)
            if num_tokens <= 0:
                break
            grants.append(Grant(id=seq.id, num_tokens=num_tokens))
            left -= num_tokens
        if left > 0 and (prompts or waiting):
            self._add_prompts(view, decodes, prompts, grants=grants, left=left, now=now)
        return grants

    def _sort_out(self, view: LocalView, now: float) -> tuple[Decodes, list[SeqView]]:
        stale = view.stale
        decodes = Decodes()
        prompts: list[SeqView] = []
        seqs, slacks, context = decodes.seqs, decodes.slacks, 0
        least = tight = math.inf
        each, target = self._settings.tpot == "each", self._settings.anchor == "target"
        fastest = view.steps.seconds(decodes=1, context_tokens=1)
        for seq in view.running:
            if stale and seq.id in stale:
                continue
            if seq.phase is Phase.PREFILL:
                prompts.append(seq)
                continue
            context += seq.num_computed
            slack, slo, first = math.inf, seq.slo, seq.first_token_at
            tpot = slo.tpot
            if tpot is not None and first is not None:
                arrived, ttft, before = seq.request.arrived, slo.ttft, seq.emitted_before
                # that its first token was late is known only where that was emitted
                if ttft is None or before or first <= arrived + ttft:
                    start = arrived + ttft if target and ttft is not None and not before else first
                    planned = seq.num_known - seq.request.prompt_tokens
                    slack = start + (planned - before) * tpot - now
                    if slack < 0.0 and _is_lost(-slack, tpot=tpot, step=fastest):
                        slack = math.inf
                    else:
                        slack = tpot if each else slack
                        least = min(least, slack)
                        tight = min(tight, tpot)
            seqs.append(seq)
            slacks.append(slack)
        decodes.context, decodes.least, decodes.tight = context, least, tight
        return decodes, prompts

    def _allowed(self, decodes: Decodes) -> float:
        """Seconds that the step may last; infinite if no decode says anything."""
        settings = self._settings
        if decodes.tight == math.inf:
            return math.inf
        return max(settings.headroom * decodes.least, settings.floor * decodes.tight)

    def _stepped(self, view: LocalView, decodes: Decodes) -> Sequence[SeqView]:
        """The decodes of this step: all, unless they alone are too long for the tightest; then
        those with the least slack."""
        settings, seqs = self._settings, decodes.seqs
        if not (settings.budget and settings.skip_loose) or decodes.tight == math.inf:
            return seqs
        allowed, steps = self._allowed(decodes), view.steps
        if steps.seconds(decodes=len(seqs), context_tokens=decodes.context) <= allowed:
            return seqs
        order = sorted(range(len(seqs)), key=decodes.slacks.__getitem__)
        chosen: list[SeqView] = []
        context = 0
        for index in order:
            more = context + seqs[index].num_computed
            seconds = steps.seconds(decodes=len(chosen) + 1, context_tokens=more)
            if chosen and seconds > allowed and decodes.slacks[index] > 2 * seconds:
                break
            chosen.append(seqs[index])
            context = more
        decodes.seqs, decodes.context = chosen, context
        return chosen

    def _add_prompts(
        self,
        view: LocalView,
        decodes: Decodes,
        running: list[SeqView],
        *,
        grants: list[Grant],
        left: int,
        now: float,
    ) -> None:
        settings, steps = self._settings, view.steps
        free = view.max_num_seqs - (len(view.running) - len(view.stale))
        num_decodes = len(decodes.seqs)
        token = 0.0
        if settings.priority:
            probe = steps.seconds(
                prefill_tokens=PROBE, decodes=num_decodes, context_tokens=decodes.context
            )
            token = probe / PROBE
        ordered, late = self._ordered(running, view.waiting[: max(0, free)], token=token, now=now)
        first = ordered[0] if ordered else late[0] if late else None
        if first is None:
            return
        if settings.budget and num_decodes:
            allowed = self._allowed(decodes)
            if allowed < math.inf:
                chunk = steps.tokens_within(
                    allowed,
                    prefix_tokens=first.num_computed,
                    decodes=num_decodes,
                    context_tokens=decodes.context,
                    most=left,
                )
                left = min(left, max(chunk, LEAST_CHUNK))
        here = {seq.id for seq in running}
        kept, sure, more, place = None, 0, 0, len(grants)
        if running and first.id not in here:
            if not num_sure(view, [first], running):  # those that are here do not wait for it
                ordered.sort(key=lambda seq: seq.id not in here)
            kept = running[0]  # the admission of those that wait may fail
            sure = min(max(1, left // OLDEST_SHARE), kept.num_known - kept.num_computed)
            left -= sure
        if late and ordered and late[0] is not kept:
            share = min(left, max(1, int(left * settings.lane_share)))
            left -= share
            share -= _grant(late[0], share, grants)
            left += share
            late = late[1:]
        for seq in (*ordered, *late):
            if left <= 0:
                break
            if seq is kept:
                more = min(left, seq.num_known - seq.num_computed - sure)
                left -= more
            else:
                left -= _grant(seq, left, grants)
        if kept is not None:
            grants.insert(place, Grant(id=kept.id, num_tokens=sure + more))

    def _ordered(
        self, running: Sequence[SeqView], waiting: Sequence[SeqView], *, token: float, now: float
    ) -> tuple[list[SeqView], list[SeqView]]:
        """Prompts by urgency, and those that cannot be in time, oldest first. `token`: seconds
        per prompt token."""
        settings = self._settings
        if not settings.priority:
            return [*running, *waiting], []
        keyed: list[tuple[float, float, int, SeqView]] = []
        late: list[tuple[float, int, SeqView]] = []
        by_due = settings.order == "deadline"
        for index, seq in enumerate((*running, *waiting)):
            due = self.due(seq)
            work = token * (seq.num_known - seq.num_computed)
            is_late = seq.num_emitted == 0 and now + settings.headroom * work > due
            if is_late and settings.late == "demote":
                late.append((seq.request.arrived, index, seq))
            else:
                keyed.append((due if by_due else due - work, due, index, seq))
        keyed.sort()
        late.sort()
        return [entry[3] for entry in keyed], [entry[2] for entry in late]

    def due(self, seq: SeqView) -> float:
        """When the next token of a sequence in prefill is due: its first one, or, if it goes on
        after a preemption or a move, as soon as possible."""
        request = seq.request
        if seq.num_emitted:
            return request.arrived
        slo = request.slo
        answer = ANSWER_SHARE * slo.e2e if slo.e2e is not None else 0.0
        return first_token_due(request, answer_seconds=answer, patience=self._settings.patience)

    # --- memory ---------------------------------------------------------------------------------

    def victim(self, view: LocalView, candidates: Sequence[SeqView], now: float) -> RequestId:
        """Best effort and late ones first, then the loosest, of equal ones the latest admitted."""
        del view

        def looseness(seq: SeqView) -> tuple[bool, float]:
            slo, first = seq.slo, seq.first_token_at
            if not slo.has_targets:
                return (True, math.inf)
            due = math.inf if slo.ttft is None else seq.request.arrived + slo.ttft
            missed = (now if first is None else first) > due
            return (missed, math.inf if slo.tpot is None else slo.tpot)

        if not self._settings.priority:
            return candidates[-1].id
        return max(reversed(candidates), key=looseness).id


def _is_lost(behind: float, *, tpot: float, step: float) -> bool:
    """Whether an answer that is so many seconds behind will not catch up, however short steps
    are."""
    return behind > CATCH_UP * max(0.0, tpot - step)


def _grant(seq: SeqView, most: int, grants: list[Grant]) -> int:
    """Grant it what it can use; the tokens granted."""
    num_tokens = min(most, seq.num_known - seq.num_computed)
    if num_tokens > 0:
        grants.append(Grant(id=seq.id, num_tokens=num_tokens))
    return max(0, num_tokens)
