"""What the node counts: plain numbers, read when somebody asks.

Counters only grow. Tokens are *computed* tokens and go on over the lives of a worker: a prefix
taken from the cache is not in them, a prompt recomputed after a preemption is in them twice.
"""

from collections import Counter
from collections.abc import Callable

from appliance.core.messages import Heartbeat, StepReported
from appliance.core.types import ErrorKind, WorkerId

StepObserver = Callable[[WorkerId, float, int], None]
"""(worker, seconds of the step, sequences that emitted), once per step."""
MAX_REASONS = 200
"""Pairs of class and reason that demotions are counted by; those that come later are "other"."""


class WorkerStats:
    """One worker over all its lives."""

    def __init__(self) -> None:
        self.prefill_tokens = 0
        self.decode_tokens = 0
        self.steps = 0
        self.busy_seconds = 0.0
        """Sum of the durations of its steps."""
        self.starts = 0
        self.deaths = 0
        self.preemptions = 0
        self.flips = 0
        """Changes of its role while it ran."""
        self.weights_source = ""
        self.weights_seconds = 0.0
        self.last_cause = ""
        """Why its last incarnation ended."""
        self.moved_at = 0.0
        """When it last made progress: a step done, or nothing to do."""
        self.in_step: float | None = None
        """How long the step under way had lasted at the last heartbeat."""

    def stepped(self, report: StepReported, now: float) -> None:
        """Count a finished step."""
        self.prefill_tokens += report.prefill_tokens
        self.decode_tokens += report.decode_tokens
        self.steps += 1
        self.busy_seconds += report.elapsed
        self.moved_at = now
        self.in_step = None

    def beat(self, report: Heartbeat) -> None:
        """Take over what a heartbeat says."""
        self.in_step = report.in_step

    def born(self, now: float) -> None:
        """A new incarnation serves."""
        self.moved_at = now
        self.in_step = None


class NodeStats:
    """The whole node. `observe_step` may be set by whoever keeps histograms."""

    def __init__(self, workers: tuple[WorkerId, ...]) -> None:
        """More workers may come later."""
        self.workers = {worker: WorkerStats() for worker in workers}
        self.submitted = 0
        """API requests that were accepted."""
        self.sequences = 0
        """Answers begun (`n` of them per request)."""
        self.rejected: Counter[str] = Counter()
        """Requests turned away, by error kind."""
        self.ended: Counter[str] = Counter()
        """Answers ended, by finish reason or error kind."""
        self.refused: Counter[tuple[str, str]] = Counter()
        """Answers that were asked for and not begun, by class and error kind: turned away at the
        door, or given up in the queue because their budget could not be met."""
        self.failed: Counter[tuple[str, str]] = Counter()
        """Other answers that ended without being complete, by class and error kind."""
        self.demoted: Counter[tuple[str, str]] = Counter()
        """Answers whose budget could not be met any more, by class and reason."""
        self.prompt_tokens = 0
        """Of ended answers."""
        self.cached_tokens = 0
        """Prompt tokens of ended answers that came from a prefix cache."""
        self.emitted_tokens = 0
        self.replaced = 0
        """Answers that went on at another worker or another life of theirs."""
        self.observe_step: StepObserver | None = None

    def turned_away(self, slo_class: str, reason: str, *, num_answers: int) -> None:
        """Count a request that was refused before the scheduler heard of it."""
        self.rejected[reason] += 1
        self.refused[slo_class, reason] += num_answers

    def ended_badly(self, slo_class: str, kind: ErrorKind) -> None:
        """Count an accepted answer that ended with an error."""
        counter = self.refused if kind is ErrorKind.BUDGET else self.failed
        counter[slo_class, kind.value] += 1

    def degraded(self, slo_class: str, reason: str) -> None:
        """Count an answer that is served after others. Reasons are told apart by what they begin
        with, and there may be only so many."""
        key = slo_class, reason.partition(":")[0]
        if key not in self.demoted and len(self.demoted) >= MAX_REASONS:
            key = slo_class, "other"
        self.demoted[key] += 1

    def worker(self, worker: WorkerId) -> WorkerStats:
        """The counters of this worker, from its first mention on."""
        stats = self.workers.get(worker)
        if stats is None:
            stats = self.workers[worker] = WorkerStats()
        return stats
