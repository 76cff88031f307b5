"""What work costs on this node, learnt from what its workers report.

How long a step lasts is the matter of `appliance.core.step_model` (one model for all workers of the
node), how long answers are of `appliance.core.answer_lengths`. Beside them stand means, each an
exponential average::

    seconds of a step           per worker, of all its steps
    seconds of a decode step    of steps that computed no prefill
    tokens of an answer         of answers that ended
    seconds of a copy           beside its bytes over the speed of the link

They answer how much work waits at a worker (placement), how long the backlog lasts (`Retry-After`),
what a role would have to do (`appliance.policy.role_control`), and whether cached blocks are
cheaper copied than computed. A prompt costs what it adds to steps that are long anyway; a sequence
in decode costs its share of the steps of a full batch. Before anything was observed the model
answers with its priors, so that an order between workers always exists."""

from collections.abc import Iterable

from appliance.core.answer_lengths import AnswerLengths
from appliance.core.messages import PrefixPulled, StepReported
from appliance.core.step_model import StepCoefficients, StepModel
from appliance.core.types import WorkerId
from appliance.core.view import WorkerView

SLOWLY = 0.2
"""Weight of an observation that makes copies look dear, beside one that makes them look cheap."""


class CostModel:
    """Seconds of prefill, of decode and of a backlog. State: the means above; `observe` alone
    changes them, so equal reports give equal answers."""

    def __init__(
        self,
        *,
        decode_step_seconds: float = 0.02,
        answer_tokens: float = 64.0,
        copy_overhead_seconds: float = 1e-3,
        memory: float = 0.1,
        steps: StepCoefficients | None = None,
    ) -> None:
        """The priors, and the weight of the newest observation in each mean (0 < memory <= 1).
        `steps`: what a profile found."""
        self.steps = StepModel(steps)
        """How long a step lasts, learnt from all workers of the node."""
        self.lengths = AnswerLengths()
        """How long answers are, by class; whoever ends an answer tells it."""
        self._decode_step = decode_step_seconds
        self._answer = answer_tokens
        self._copy_overhead = copy_overhead_seconds
        self._memory = memory
        self._of_worker: dict[WorkerId, float] = {}

    def observe(self, report: StepReported) -> None:
        """Learn from one step."""
        weight = self._memory
        elapsed = report.elapsed
        self.steps.observe(
            prefill_tokens=report.prefill_tokens,
            prefill_pairs=report.prefill_pairs,
            decodes=report.decode_tokens,
            context_tokens=report.context_tokens,
            elapsed=elapsed,
        )
        mean = self._of_worker.get(report.worker)
        self._of_worker[report.worker] = (
            elapsed if mean is None else mean + weight * (elapsed - mean)
        )
        if report.decode_tokens and not report.prefill_tokens:
            self._decode_step += weight * (elapsed - self._decode_step)
        for end in report.finished:
            self._answer += weight * (end.emitted_tokens - self._answer)

    def observe_copy(self, report: PrefixPulled, bytes_per_second: float) -> None:
        """Learn from one copy of cached blocks over a link of that speed: slowly from slow ones,
        since a burst of them would end all copying, and with it all learning."""
        if report.num_bytes:
            beside = max(0.0, report.seconds - report.num_bytes / bytes_per_second)
            weight = self._memory if beside < self._copy_overhead else SLOWLY * self._memory
            self._copy_overhead += weight * (beside - self._copy_overhead)

    def copy_seconds(self, num_bytes: int, bytes_per_second: float) -> float:
        """Copying cached blocks from a peer."""
        return self._copy_overhead + num_bytes / bytes_per_second

    @property
    def decode_step_seconds(self) -> float:
        """A step that computes no prefill."""
        return self._decode_step

    @property
    def answer_tokens(self) -> float:
        """Length of an answer."""
        return self._answer

    def step_seconds(self, worker: WorkerId) -> float:
        """Mean of the worker's recent steps; 0 before the first."""
        return self._of_worker.get(worker, 0.0)

    @property
    def tail(self) -> float:
        """Factor from the expected to the tail duration of a step."""
        return self.steps.tail

    def prefill_seconds(self, num_tokens: int, *, prefix_tokens: int = 0) -> float:
        """Computing the KV of that many tokens, which come after `prefix_tokens` others: what it
        adds to steps that are long anyway."""
        return self.steps.added_seconds(num_tokens, prefix_tokens=prefix_tokens)

    def decode_seconds(self, max_num_seqs: int) -> float:
        """A whole answer's share of the steps of a full batch."""
        return self._answer * self._decode_step / max(1, max_num_seqs)

    def work_seconds(self, worker: WorkerView, new_tokens: int) -> float:
        """Work at this worker if it also got a sequence with `new_tokens` to prefill."""
        prefill = self.prefill_seconds(worker.pending_tokens + new_tokens)
        here = worker.assigned + worker.incoming
        return prefill + (here + 1) * self.decode_seconds(worker.max_num_seqs)

    def backlog_seconds(
        self, workers: Iterable[WorkerView], *, num_waiting: int, waiting_tokens: int
    ) -> float:
        """Until what is assigned and what waits is done, spread evenly over `workers` (those that
        serve; with none the waiting work counts as one worker's)."""
        serving = list(workers)
        seqs = max((worker.max_num_seqs for worker in serving), default=1)
        total = self.prefill_seconds(waiting_tokens) + num_waiting * self.decode_seconds(seqs)
        for worker in serving:
            total += self.prefill_seconds(worker.pending_tokens)
            total += (worker.assigned + worker.incoming) * self.decode_seconds(worker.max_num_seqs)
        return total / max(1, len(serving))
