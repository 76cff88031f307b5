"""What one report costs the node-level scheduler.

Eight workers run 64 sequences each and report step after step, while 1,000 requests wait. Two
kinds of reports are timed apart: those in which nobody finished (nothing to decide), and those in
which one sequence finished (a waiting request is placed: a decision). The requests are of five
classes with different budgets, prompts and lengths. `--journal` adds the journal's record;
`--policy` takes policies as `appliance simulate` does, or "all". `--cpu` counts the processor time
of the thread: on a machine with other work, wall time measures that too.

    python -m tools.bench_dispatcher [--rounds N] [--journal] [--cpu] [--policy NAME[,NAME]|all]
"""

import argparse
import gc
import time
from collections.abc import Callable, Sequence

from appliance.core.dispatcher import Dispatcher, DispatcherConfig
from appliance.core.journal import Journal, JournalHeader
from appliance.core.messages import (
    Arrived,
    Assign,
    Output,
    SeqFinished,
    StepReported,
    Woke,
    WorkerUp,
)
from appliance.core.types import (
    CacheGroupSpec,
    FinishReason,
    Request,
    RequestId,
    Slo,
    WorkerId,
    WorkerLoad,
    WorkerSpec,
)
from appliance.policy import POLICIES
from appliance.policy.choice import PolicyChoice, parse_choice, parse_choices

NUM_WORKERS = 8
NUM_SEQS = 64
NUM_WAITING = 1000
BLOCKS = 8192
SLOS = (
    Slo(class_name="completion", ttft=0.5, tpot=0.05, weight=2.0),
    Slo(class_name="chat", ttft=1.0, tpot=0.05),
    Slo(class_name="reasoning", ttft=2.0, tpot=0.1),
    Slo(class_name="summary", e2e=30.0),
    Slo(class_name="batch", weight=0.2),
)


class Bench:
    """A node under load and the times of its calls in microseconds."""

    def __init__(
        self,
        choice: PolicyChoice,
        *,
        journal: bool,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        specs = [WorkerSpec(id=WorkerId(w), devices=("cpu",)) for w in range(NUM_WORKERS)]
        config = DispatcherConfig(max_model_len=8192, max_queue=10**6, max_queue_tokens=10**9)
        policy = choice.make()
        self.node = Dispatcher(config, workers=specs, policy=policy.dispatch)
        header = JournalHeader(config=config, workers=tuple(specs), policy=choice.name)
        self._journal = Journal(header) if journal else None
        self._clock = clock
        self.now = 0.0
        self._next_id = 0
        self._running: dict[WorkerId, list[RequestId]] = {spec.id: [] for spec in specs}
        self._steps = 0
        self._hear(Woke())
        group = CacheGroupSpec(num_blocks=BLOCKS, block_tokens=16)
        for spec in specs:
            up = WorkerUp(
                worker=spec.id, epoch=1, groups=(group,), max_num_seqs=60, max_batch_tokens=512
            )
            self._hear(up)
        while self.node.view.num_waiting < NUM_WAITING:
            self.arrive()

    def arrive(self) -> float:
        """One request more, with 64 blocks of prompt."""
        self._next_id += 1
        first = self._next_id * 1000
        draw = self._next_id * 2654435761 % 1000
        request = Request(
            id=RequestId(self._next_id),
            arrived=self.now,
            prompt_tokens=1030 + draw,
            max_tokens=100,
            slo=SLOS[draw % len(SLOS)],
            prefix_hashes=tuple(range(first, first + 64)),
        )
        return self._hear(Arrived(request=request))

    def step(self, worker: WorkerId, *, finish: bool) -> float:
        """One step of 64 sequences; with `finish` the oldest of them ends."""
        ids = self._running[worker]
        ended: tuple[SeqFinished, ...] = ()
        if finish:
            end = SeqFinished(
                id=ids[0], reason=FinishReason.STOP, emitted_tokens=50, cached_tokens=0
            )
            ended = (end,)
        self._steps += 1
        report = StepReported(
            worker=worker,
            step=self._steps,
            elapsed=0.02,
            prefill_tokens=0,
            decode_tokens=len(ids),
            ids=tuple(ids),
            load=WorkerLoad(
                blocks_total=BLOCKS,
                blocks_free=self._steps % BLOCKS,
                blocks_cached=0,
                blocks_held=BLOCKS - self._steps % BLOCKS,
                blocks_leased=0,
                queued=0,
                running=len(ids),
                backlog_tokens=0,
            ),
            finished=ended,
        )
        if finish:
            del ids[0]
        return self._hear(report)

    def _hear(self, message: Arrived | StepReported | WorkerUp | Woke) -> float:
        self.now += 0.0001
        begin = self._clock()
        outputs: Sequence[Output] = self.node.handle(message, self.now)
        if self._journal is not None:
            self._journal.record(self.now, "bench", message, outputs)
        seconds = self._clock() - begin
        for output in outputs:
            if isinstance(output, Assign):
                self._running[output.worker].append(output.request.id)
        return seconds * 1e6


def show(name: str, times: list[float]) -> None:
    """Mean, median, p99 and maximum of one kind of call."""
    times.sort()
    mean = sum(times) / len(times)
    p50, p99 = times[len(times) // 2], times[int(len(times) * 0.99)]
    print(
        f"{name:34} n={len(times):6}  mean {mean:7.1f}  p50 {p50:7.1f}  p99 {p99:7.1f}"
        f"  max {times[-1]:8.1f} us"
    )


def main() -> None:
    """Run the rounds and print one line per kind of call."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1000, help="steps per worker and kind")
    parser.add_argument("--journal", action="store_true", help="record each call as well")
    parser.add_argument("--cpu", action="store_true", help="processor time, not wall time")
    parser.add_argument("--policy", default="fcfs", help="names with commas between them, or all")
    options = parser.parse_args()
    choices = (
        [parse_choice(name) for name in POLICIES]
        if options.policy == "all"
        else parse_choices(options.policy)
    )
    for choice in choices:
        measure(
            choice,
            rounds=options.rounds,
            journal=options.journal,
            clock=time.thread_time if options.cpu else time.perf_counter,
        )


def measure(
    choice: PolicyChoice, *, rounds: int, journal: bool, clock: Callable[[], float]
) -> None:
    """One policy's lines."""
    bench = Bench(choice, journal=journal, clock=clock)
    plain: list[float] = []
    deciding: list[float] = []
    arrivals: list[float] = []
    gc.collect()
    gc.freeze()
    for turn in range(rounds):
        for index in range(NUM_WORKERS):
            worker = WorkerId(index)
            plain.append(bench.step(worker, finish=False))
            if turn % 4 == 0:
                deciding.append(bench.step(worker, finish=True))
                arrivals.append(bench.arrive())
    print(
        f"{choice.word}: {NUM_WORKERS} workers x {NUM_SEQS} sequences, "
        f"{bench.node.view.num_waiting} waiting{', journal on' if journal else ''}"
    )
    show("StepReported, nobody finished", plain)
    show("StepReported, one ends, one placed", deciding)
    show("Arrived, nobody willing", arrivals)


if __name__ == "__main__":
    main()
