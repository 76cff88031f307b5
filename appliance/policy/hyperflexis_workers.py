"""HyperFlexis: what can be expected of each worker, worked out again only where something changed.

A worker computes its prompts one after the other in the order of urgency, at the rate that its
decodes leave. So a newcomer waits for the step under way, and for the tokens of those that are more
urgent; those that are less urgent wait for the newcomer."""

from bisect import bisect_right
from collections.abc import Callable, Mapping

from appliance.core.lifecycle import WorkerState
from appliance.core.types import Request, Role, WorkerId
from appliance.core.view import NodeView, WorkerView
from appliance.policy.hyperflexis_budget import HyperflexisSettings, Pace, pace

FORGET = 0.5
"""Seconds after which paces are worked out anew, since the step model learns."""


class Estimate:
    """One worker. `keys` are the urgencies of its prompts in their order, `sums[i]` the tokens of
    the first i of them that are still to be computed, `dues` when each is due."""

    __slots__ = (
        "blocks_free",
        "dues",
        "is_full",
        "is_idle",
        "is_underfull",
        "keys",
        "limit",
        "next_decode",
        "num_late",
        "pace",
        "remaining",
        "residual_until",
        "sums",
        "view",
    )

    def __init__(self, view: WorkerView, now_pace: Pace) -> None:
        self.view = view
        self.pace = now_pace
        self.limit = now_pace.chunk
        """Tokens of more urgent prompts beyond which it gets none."""
        self.is_full = view.assigned + view.incoming >= view.max_num_seqs
        self.is_idle = not view.assigned and not view.incoming
        self.next_decode = 0.0
        """Seconds of a step of all that decodes there and one more; 0 where budgets per token do
        not count."""
        self.is_underfull = False
        """Whatever it got would be begun soon."""
        self.keys: list[float] = []
        self.sums: list[int] = [0]
        self.dues: list[float] = []
        self.remaining = 0
        """Prompt tokens to compute, best effort included."""
        self.num_late = 0
        """Prompts of best effort there."""
        self.blocks_free = 0
        """After what is there has been given its prompt and its next tokens."""
        self.residual_until = 0.0
        """When the step under way is expected to end."""

    def is_open(self, key: float) -> bool:
        """Whether it may get one that is as urgent as that."""
        return not self.is_full and self.sums[bisect_right(self.keys, key)] < self.limit

    def bears(self, tokens: int, tpot: float | None) -> bool:
        """Whether its memory and its decodes bear one more of so many tokens with that budget per
        token; an idle worker bears all."""
        if self.is_idle:
            return True
        view, seconds = self.view, self.next_decode
        if -(-tokens // view.block_tokens) > self.blocks_free:
            return False
        tight = view.tightest_tpot
        return (tight is None or seconds <= tight) and (tpot is None or seconds <= tpot)

    def ahead(self, key: float) -> int:
        """Tokens of those that are as urgent, or more."""
        return self.sums[bisect_right(self.keys, key)]

    def residual(self, now: float) -> float:
        """Seconds until a newcomer can begin."""
        return max(0.0, self.residual_until - now)

    def harms(self, key: float, tokens: int, now: float) -> bool:
        """Whether a newcomer with so many tokens would make one that waits behind it late, which
        would not be so otherwise."""
        index = bisect_right(self.keys, key)
        start, rate = now + self.residual(now), self.pace.rate
        for place in range(index, len(self.keys)):
            done = start + self.sums[place + 1] / rate
            due = self.dues[place]
            if done <= due < done + tokens / rate:
                return True
        return False


class Workers:
    """Estimates of all workers."""

    def __init__(
        self,
        settings: HyperflexisSettings,
        urgency: Callable[[Request, int, float], tuple[float, float]],
    ) -> None:
        """`urgency` gives (key, due) of a request with so many tokens at that rate."""
        self._settings = settings
        self._urgency = urgency
        self.estimates: dict[WorkerId, Estimate] = {}
        self.able: dict[WorkerId, Estimate] = {}
        """Of those that get prompts now."""
        self._seen: Mapping[WorkerId, WorkerView] = {}
        self._paces: dict[tuple[int, int, float | None, int], Pace] = {}
        self._paces_until = 0.0
        self.rate = 1.0
        """Prompt tokens per second of those that are meant for prompts, together."""
        self.serial = 1.0
        """Of one of them, on average."""
        self.step = 0.0
        """Seconds of a full step of one of them, on average."""

    def refresh(self, view: NodeView, now: float) -> None:
        """Work the estimates of changed workers out again."""
        if now >= self._paces_until:
            self._paces.clear()
            self._paces_until = now + FORGET
        changed = False
        estimates = self.estimates
        workers = view.workers
        if workers is self._seen:
            return
        self._seen = workers
        for id_, worker in workers.items():
            known = estimates.get(id_)
            if known is None or known.view is not worker:
                estimates[id_] = self._estimate(view, worker)
                changed = True
        if changed:
            self._sum_up()

    def _sum_up(self) -> None:
        ready = {
            id_: each
            for id_, each in self.estimates.items()
            if each.view.state is WorkerState.READY and not each.view.reserved
        }
        meant = {
            id_: each
            for id_, each in ready.items()
            if (each.view.next_role or each.view.role) is not Role.DECODE
        }
        self.able = meant or ready  # as the mechanism does it
        count = len(self.able)
        self.rate = sum(each.pace.rate for each in self.able.values())
        if count:
            self.serial = self.rate / count
            self.step = sum(each.pace.step for each in self.able.values()) / count

    def begun(self) -> list[tuple[float, int]]:
        """(due, tokens to compute) of every prompt at a worker that can be in time."""
        rows: list[tuple[float, int]] = []
        for each in self.estimates.values():
            sums = each.sums
            rows += [(due, sums[i + 1] - sums[i]) for i, due in enumerate(each.dues)]
        return rows

    def pace_of(self, view: NodeView, worker: WorkerView) -> Pace:
        """Its pace beside what decodes there and one more; numbers alike are looked up."""
        decodes = (worker.decodes + 2) >> 1 << 1 if worker.decodes else 0
        context = (worker.context_tokens + 4096) >> 12 << 12 if decodes else 0
        tight = worker.tightest_tpot if worker.role is not Role.PREFILL else None
        key = (decodes, context, tight, worker.max_batch_tokens)
        known = self._paces.get(key)
        if known is None:
            known = self._paces[key] = pace(
                view.cost.steps,
                decodes=decodes,
                context_tokens=context,
                tpot=tight,
                most=worker.max_batch_tokens or 1,
                settings=self._settings,
            )
        return known

    def _estimate(self, view: NodeView, worker: WorkerView) -> Estimate:
        estimate = Estimate(worker, self.pace_of(view, worker))
        load, size = worker.load, worker.block_tokens
        remaining, here = load.backlog_tokens, 0
        rows: list[tuple[float, float, int]] = []
        prompts = view.prompts(worker.id)
        for prompt in prompts:
            here += prompt.tokens
            if not prompt.heard:
                remaining += prompt.tokens
            key, due = self._urgency(prompt.request, prompt.tokens, self.serial)
            is_patient = not prompt.request.slo.bounds_start  # demoted by nobody: nothing is missed
            if prompt.demoted or (is_patient and due <= worker.as_of):
                estimate.num_late += 1
                continue
            rows.append((key, due, prompt.tokens))
        remaining = min(remaining, here)
        rows.sort()
        done = here - remaining  # the most urgent were computed first
        total = 0
        for key, due, tokens in rows:
            part = min(done, tokens)
            done -= part
            total += tokens - part
            estimate.keys.append(key)
            estimate.dues.append(due)
            estimate.sums.append(total)
        estimate.remaining = remaining
        estimate.limit = int(self._settings.ahead_steps * estimate.pace.chunk)
        estimate.is_underfull = remaining < estimate.limit and not estimate.is_full
        if self._settings.budget and worker.role is not Role.PREFILL:
            estimate.next_decode = estimate.pace.decode
        growth = worker.decodes * view.cost.answer_tokens * 0.5
        free = load.blocks_free - worker.promised_blocks
        estimate.blocks_free = free - int((remaining + growth) // size)
        if worker.assigned and (prompts or worker.decodes):
            estimate.residual_until = worker.as_of + min(
                estimate.pace.step, 2.0 * (worker.step_seconds or estimate.pace.step)
            )
        return estimate
