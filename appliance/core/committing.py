"""Committer: applies the result of a finished step to the sequences that were in it.

Results are the only place where tokens begin to count. A result of a sequence that is over is
dropped; one of a preempted sequence counts, since its blocks were still its own when the step
ran. A stale sequence moves on when it leaves the last planned step: back to the queue, or out.
"""

from collections.abc import Sequence

from appliance.core.messages import Aborted, Preempted, Report, SeqFinished
from appliance.core.sequence import OVER, LiveSequence, Queues, SeqState
from appliance.core.types import (
    FinishReason,
    Phase,
    RequestId,
    SeqResult,
    StepPlan,
    StepResult,
    WorkerId,
)


class ProtocolError(Exception):
    """The shell or the node broke the contract: the worker cannot know any more what is true."""


class StepTally:
    """What one finished step adds up to."""

    __slots__ = (
        "context_tokens",
        "counts",
        "decode_tokens",
        "finished",
        "gone",
        "ids",
        "prefill_pairs",
        "prefill_tokens",
        "several",
    )

    def __init__(self) -> None:
        self.ids: list[RequestId] = []
        self.counts: list[int] = []
        """Tokens of each of `ids`."""
        self.several = False
        """Some count is not 1."""
        self.finished: list[SeqFinished] = []
        self.gone = False
        """Somebody left `running`."""
        self.prefill_tokens = 0
        self.prefill_pairs = 0
        """Of a computed prompt token and a token it attends to, itself too."""
        self.decode_tokens = 0
        self.context_tokens = 0
        """Of the sequences in decode, those computed now included."""


class Committer:
    """Commits steps over `queues`; what no step report carries goes to `reports`."""

    def __init__(self, worker: WorkerId, queues: Queues, *, reports: list[Report]) -> None:
        self._worker = worker
        self._queues = queues
        self._ledger = queues.ledger
        self._reports = reports

    def commit(
        self, plan: StepPlan, seqs: Sequence[LiveSequence], *, result: StepResult, now: float
    ) -> StepTally:
        """Apply the result of `plan`, whose work items belong to `seqs`, and learn from how long it
        took. Raises `ProtocolError`."""
        tally = StepTally()
        results, position = result.results, 0
        for work, seq in zip(plan.work, seqs, strict=True):
            num_tokens = work.num_tokens
            seq.num_outstanding -= 1
            over = seq.state in OVER
            if work.phase is Phase.PREFILL:
                tally.prefill_tokens += num_tokens
                tally.prefill_pairs += num_tokens * work.start + num_tokens * (num_tokens + 1) // 2
                if not over:
                    self._queues.backlog_tokens -= num_tokens
            else:
                tally.decode_tokens += num_tokens
                tally.context_tokens += work.start + num_tokens
            seq.num_done += num_tokens
            if seq.num_done >= seq.mark and not over:
                self._complete_blocks(seq)
            if work.samples:
                if position < len(results) and results[position].id == seq.id:
                    if not over:
                        self._emit(seq, results[position], tally, now)
                    position += 1
                elif not over:
                    raise ProtocolError(f"step {result.step} lacks a token of {seq.story()}")
            if not seq.num_outstanding and seq.id in self._queues.stale:
                self._let_go(seq, tally)
        if position != len(results):
            raise ProtocolError(
                f"step {result.step} has a result of request {results[position].id} out of turn"
            )
        self._queues.steps.observe(
            prefill_tokens=tally.prefill_tokens,
            prefill_pairs=tally.prefill_pairs,
            decodes=tally.decode_tokens,
            context_tokens=tally.context_tokens,
            elapsed=result.elapsed,
        )
        if tally.gone:
            self._queues.running[:] = [seq for seq in self._queues.running if seq.table is not None]
        return tally

    def _complete_blocks(self, seq: LiveSequence) -> None:
        """Some block's last token was computed: make it findable, drop what left a window, let the
        siblings go when the whole prompt is there."""
        size = self._ledger.block_tokens
        complete = seq.num_done // size
        seq.mark = (complete + 1) * size
        if seq.table is None:
            raise ProtocolError(f"a step was finished without blocks: {seq.story()}")
        self._ledger.register(seq.table, seq.hashes, complete)
        self._ledger.slide(seq.table, seq.num_done)
        if seq.followers and complete >= seq.num_shared:
            self._queues.free_followers(seq)

    def _emit(self, seq: LiveSequence, result: SeqResult, tally: StepTally, now: float) -> None:
        """Count the new tokens of a live sequence, and end it if they are its last."""
        count = result.num_tokens
        if count != 1:
            count = self._accept_several(seq, result)
            tally.several = True
        if result.hashes:
            seq.hashes.extend(result.hashes)
        if seq.first_token_at is None:
            seq.first_token_at = now
        seq.num_emitted += count
        tally.ids.append(seq.id)
        tally.counts.append(count)
        reason = result.stopped if count == result.num_tokens else None
        if reason is None and seq.request.prompt_tokens + seq.num_emitted >= seq.limit:
            reason = FinishReason.LENGTH
        if reason is not None:
            self._queues.end(seq, SeqState.ENDED)
            tally.finished.append(
                SeqFinished(
                    id=seq.id,
                    reason=reason,
                    emitted_tokens=seq.num_emitted,
                    cached_tokens=seq.cached_tokens or 0,
                )
            )

    def _accept_several(self, seq: LiveSequence, result: SeqResult) -> int:
        """Several tokens from one work item: at most up to the limit, the rest is cut off."""
        if result.num_tokens < 1 or seq.num_outstanding:
            raise ProtocolError(
                f"{result.num_tokens} tokens at once need at least one and depth 0: {seq.story()}"
            )
        allowed = seq.limit - seq.request.prompt_tokens - seq.num_emitted
        count = min(result.num_tokens, allowed)
        seq.num_known += count - 1
        return count

    def _let_go(self, seq: LiveSequence, tally: StepTally) -> None:
        """A stale sequence has left the last planned step: back to the queue, or gone. (One that
        goes to another worker is the exporter's.)"""
        if seq.state is SeqState.STOPPING:
            return
        tally.gone = True
        if seq.state is SeqState.PREEMPTED:
            lost = self._queues.requeue(seq)
            self._reports.append(
                Preempted(worker=self._worker, request_id=seq.id, lost_tokens=lost)
            )
            return
        self._queues.forget_over(seq)
        if seq.answer_abort:
            self._reports.append(Aborted(worker=self._worker, request_id=seq.id))
