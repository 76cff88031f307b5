"""The step loop of a worker: inbox, plan, execute, text, books, one frame; and again.

One thread does all of it. Between two steps it reads what has arrived without waiting; with nothing
to compute it sleeps until a frame, a wake-up of the Batcher, or the end. Up to `depth + 1` plans
are outstanding and the oldest is executed first, so what the loop knows of a sequence may be a
little ahead of what the Batcher has committed: results of a sequence that is no longer live are
dropped, and the engine forgets a sequence only when no outstanding plan touches it.

The whole outcome of a step leaves in one frame: `StepReported`, what else the Batcher has to say,
and ids and ready text in columns. What other workers say and what is copied from them is the
business of `appliance.worker.moves`; the loop gives it its turns.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import msgspec

from appliance.core.batcher import Batcher
from appliance.core.messages import (
    Abort,
    Aborted,
    Assign,
    Command,
    KvPulled,
    Pull,
    Refused,
    Released,
    Report,
    StepReported,
)
from appliance.core.payload import SequenceState, StepOutputs, TokenLogprobs
from appliance.core.start import WorkerStart
from appliance.core.types import (
    ErrorKind,
    FinishReason,
    Request,
    RequestId,
    SeqResult,
    StepPlan,
    StepResult,
)
from appliance.worker.channel import Channel, Progress
from appliance.worker.engine import Engine, SampledToken
from appliance.worker.fault_actions import FaultPoints
from appliance.worker.moves import Moves, Ties
from appliance.worker.sequence_state import BlockNames, ServedSequence, check_state
from appliance.worker.text import TokenText

log = logging.getLogger(__name__)

_LEAST_SLEEP = 0.001


def _nothing() -> None:
    """Default of a hook."""


class StepLoop:
    """Serves one worker's sequences until the node ends the conversation.

    `run` and `listen_until` belong to one thread. Errors of engine, Batcher, channel pass."""

    def __init__(
        self,
        start: WorkerStart,
        *,
        channel: Channel,
        engine: Engine,
        batcher: Batcher,
        tokens: TokenText,
        faults: FaultPoints,
        progress: Progress,
        ties: Ties | None = None,
        on_idle: Callable[[], None] = _nothing,
        took: Callable[[], float] | None = None,
        after_step: Callable[[], None] = _nothing,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`ties` are those to peers, if there may be any. `on_idle` is called before the loop
        sleeps with nothing to compute; `took` says how long the last step lasted by the device's
        own clock (None: the time between two looks at `clock`); `after_step` is called when the
        books of a step are closed (checks of the laws)."""
        self._start = start
        self._channel = channel
        self._engine = engine
        self._batcher = batcher
        self._tokens = tokens
        self._faults = faults
        self._progress = progress
        self._on_idle = on_idle
        self._took = took
        self._after_step = after_step
        self._clock = clock
        self._sequences: dict[RequestId, ServedSequence] = {}
        self._plans: deque[StepPlan] = deque()
        """Outstanding, oldest first."""
        self._over: set[RequestId] = set()
        """Of `_sequences`, those that are no longer live and wait for an outstanding plan."""
        self._began: float | None = None
        """When the present step took over from the one before; None: the worker was idle."""
        self._moves = Moves(
            start.worker,
            ties,
            host=self,
            batcher=batcher,
            engine=engine,
            faults=faults,
            clock=clock,
        )
        self._decode_state = msgspec.msgpack.Decoder(SequenceState).decode
        self._encode_outputs = msgspec.msgpack.Encoder().encode

    def run(self) -> None:
        """Serve until the node closes its side. Raises `NodeGone` if it dies."""
        while True:
            self._listen()
            if self._channel.ended:
                return
            self._plan_ahead()
            if self._plans:
                self._step()
            else:
                self._sleep()

    def listen_until(self, due: float) -> None:
        """Wait for a moment on the clock and obey what arrives meanwhile. For an engine that has
        its results before they are due."""
        while (rest := due - self._clock()) > 0:
            if self._channel.ended:
                time.sleep(rest)
            elif self._channel.wait(rest, self._moves.fds):
                self._listen()

    # --- what the moves need --------------------------------------------------------------------

    @property
    def sequences(self) -> Mapping[RequestId, ServedSequence]:
        """All that are known to the engine and live, or in an outstanding plan."""
        return self._sequences

    def begin(self, request_id: RequestId, served: ServedSequence) -> None:
        """This sequence has come from another worker; the engine knows it."""
        self._sequences[request_id] = served
        self._over.discard(request_id)
        log.debug("request has arrived", extra={"request": request_id})

    def tell(self, reports: Sequence[Report]) -> None:
        """Send reports that no step carries, and do what follows from them."""
        together: list[Report] = []
        for report in reports:
            self._moves.before(report)
            if isinstance(report, KvPulled):  # alone, so that the node can let it wait
                if together:
                    self._channel.send(together)
                    together = []
                self._channel.send([report])
                self._faults.reach("move.after_pulled")
            else:
                together.append(report)
        if together:
            self._channel.send(together)
        self._follow(reports)

    def _follow(self, reports: Sequence[Report]) -> None:
        """These were sent: forget what has left, and let the moves go on."""
        for report in reports:
            if isinstance(report, Released | Aborted):
                self._retire(report.request_id)
        if self._over:
            self._forget_over()
        self._moves.flush()

    # --- commands -------------------------------------------------------------------------------

    def _listen(self) -> None:
        """Obey everything that has arrived, from the node and from peers."""
        if frames := self._channel.receive():
            self._moves.hear_node()
            reports: list[Report] = []
            for commands, payload in frames:
                for command in commands:
                    reports += self._obey(command, payload)
            self.tell(reports)
        self._moves.hear()
        due = self._batcher.next_wakeup()
        if due is not None and due <= (now := self._clock()):
            self.tell(self._batcher.wake(now))

    def _obey(self, command: Command, payload: bytes) -> Sequence[Report]:
        match command:
            case Assign():
                return self._assign(command, payload)
            case Pull():
                return self._pull(command, payload)
            case Abort(request_id=request_id):
                reports = self._batcher.handle(command, self._clock())
                log.debug("request is aborted", extra={"request": request_id})
                self._retire(request_id)
                self._forget_over()
                return reports
            case _:
                return self._moves.obey(command)

    def _assign(self, command: Assign, payload: bytes) -> Sequence[Report]:
        try:
            state, request, names = self._read(command.request, payload, command.emitted_tokens)
        except (msgspec.MsgspecError, ValueError) as error:
            return [self._misfit(command, error)]
        command = msgspec.structs.replace(command, request=request)
        reports = self._batcher.handle(command, self._clock())
        if self._batcher.is_live(request.id):
            served = ServedSequence(
                state, names, tokens=self._tokens, keep_prompt=self._faults.wants_tokens
            )
            self._sequences[request.id] = served
            self._over.discard(request.id)
            self._engine.add(request.id, state)
            log.debug(
                "request is assigned",
                extra={"request": request.id, "prompt_tokens": request.prompt_tokens},
            )
            self._faults.reach("worker.assign", served.prompt_ids)
        return reports

    def _pull(self, command: Pull, payload: bytes) -> Sequence[Report]:
        try:
            state, request, names = self._read(command.request, payload, command.emitted_tokens)
        except (msgspec.MsgspecError, ValueError) as error:
            return [self._misfit(command, error)]
        served = ServedSequence(
            state, names, tokens=self._tokens, keep_prompt=self._faults.wants_tokens
        )
        return self._moves.pull(msgspec.structs.replace(command, request=request), state, served)

    def _read(
        self, request: Request, payload: bytes, emitted: int
    ) -> tuple[SequenceState, Request, BlockNames | None]:
        """The state of a sequence, its request with the names of all full blocks, and who names the
        next ones. Raises `MsgspecError`, `ValueError`."""
        state = self._decode_state(payload)
        block_tokens = self._start.block_tokens
        check_state(state, request, emitted=emitted, block_tokens=block_tokens)
        if not self._start.batcher.enable_prefix_cache:
            return state, request, None
        names = BlockNames(
            state, request.prefix_hashes, block_tokens=block_tokens, key=self._start.hash_key
        )
        return state, msgspec.structs.replace(request, prefix_hashes=names.names), names

    def _misfit(self, command: Assign | Pull, error: Exception) -> Refused:
        reason = f"the state of the sequence does not fit its request: {error}"
        log.error("request is refused", extra={"request": command.request.id, "reason": reason})
        return Refused(
            worker=self._start.worker,
            command=type(command).__name__,
            kind=ErrorKind.INTERNAL,
            reason=reason,
            request_id=command.request.id,
        )

    # --- steps ----------------------------------------------------------------------------------

    def _plan_ahead(self) -> None:
        plans = self._plans
        while len(plans) <= self._start.batcher.depth:
            plan = self._batcher.next_step(self._clock())
            if plan is None:
                return
            plans.append(plan)

    def _sleep(self) -> None:
        """Nothing can be computed now."""
        self._on_idle()
        self._began = self._progress.began = None
        wakeup = self._batcher.next_wakeup()
        seconds = None if wakeup is None else max(wakeup - self._clock(), _LEAST_SLEEP)
        self._channel.wait(seconds, self._moves.fds)

    def _step(self) -> None:
        """Execute the oldest plan and tell the node what came of it."""
        plan = self._plans[0]
        touched = self._prompt_ids(plan)
        began = self._clock() if self._began is None else self._began
        self._progress.began = began
        self._faults.reach("worker.before_step", touched)
        self._moves.write_index()
        sampled = self._engine.execute(plan)
        self._faults.reach("worker.after_step", touched)
        self._began = now = self._clock()
        self._plans.popleft()
        failures = self._give_up(sampled, now)
        outputs, results = self._text_of(sampled)
        elapsed = now - began if self._took is None else self._took()
        result = StepResult(step=plan.step, results=tuple(results), elapsed=elapsed)
        reports = self._batcher.finish_step(result, now)
        self._close(reports, outputs)
        reports[1:1] = failures
        self._progress.step = plan.step
        self._progress.began = now
        self._faults.reach("worker.before_send", touched)
        for report in reports:
            self._moves.before(report)
        self._channel.send(reports, self._encode_outputs(outputs))
        self._follow(reports)
        self._after_step()

    def _give_up(self, sampled: Sequence[SampledToken], now: float) -> list[Report]:
        """Refuse for good the sequences that cannot go on; afterwards they are no longer live."""
        reports: list[Report] = []
        for item in sampled:
            if item.failed and self._batcher.is_live(item.id):
                worker = self._start.worker
                log.error("answer failed", extra={"request": item.id, "reason": item.failed})
                refused = Refused(
                    worker=worker,
                    command="Assign",
                    kind=ErrorKind.GRAMMAR,
                    reason=f"the answer cannot follow its grammar to the end: {item.failed}",
                    request_id=item.id,
                )
                given_up = self._batcher.handle(Abort(worker=worker, request_id=item.id), now)
                reports += [refused, *given_up]
                self._retire(item.id)
        return reports

    def _text_of(self, sampled: Sequence[SampledToken]) -> tuple[StepOutputs, list[SeqResult]]:
        """Text and block names of what was sampled for live sequences."""
        is_live, sequences = self._batcher.is_live, self._sequences
        ids: list[RequestId] = []
        tokens: list[list[int]] = []
        texts: list[str] = []
        logprobs: list[list[TokenLogprobs] | None] = []
        results: list[SeqResult] = []
        any_logprobs = False
        for item in sampled:
            id_, token = item.id, item.token
            if not is_live(id_):
                continue
            sequence = sequences[id_]
            sequence.emitted.append(token)
            text, stopped = sequence.text.push(token)
            ids.append(id_)
            tokens.append([token])
            texts.append(text)
            if item.logprobs is None:
                logprobs.append(None)
            else:
                logprobs.append([item.logprobs])
                any_logprobs = True
            results.append(
                SeqResult(
                    id=id_,
                    num_tokens=1,
                    stopped=FinishReason.STOP if stopped else None,
                    hashes=() if sequence.names is None else sequence.names.push(token),
                )
            )
        outputs = StepOutputs(
            ids=ids, tokens=tokens, texts=texts, logprobs=logprobs if any_logprobs else None
        )
        return outputs, results

    def _close(self, reports: Sequence[Report], outputs: StepOutputs) -> None:
        """Give out the text of what has ended for length, and forget all that is over."""
        step = reports[0]
        if not isinstance(step, StepReported) or step.ids != tuple(outputs.ids):
            raise RuntimeError(f"the Batcher's report is not that of {outputs.ids}: {step}")
        for finished in step.finished:
            if finished.reason is FinishReason.LENGTH:
                place = outputs.ids.index(finished.id)
                outputs.texts[place] += self._sequences[finished.id].text.flush()
            self._retire(finished.id)
        if self._over:
            self._forget_over()

    def _retire(self, request_id: RequestId) -> None:
        if request_id in self._sequences and not self._batcher.is_live(request_id):
            self._over.add(request_id)

    def _forget_over(self) -> None:
        """Drop what is over and in no outstanding plan."""
        held = {work.id for plan in self._plans for work in plan.work} if self._plans else ()
        for request_id in [id_ for id_ in self._over if id_ not in held]:
            self._over.discard(request_id)
            del self._sequences[request_id]
            self._engine.drop(request_id)

    def _prompt_ids(self, plan: StepPlan) -> frozenset[int]:
        if not self._faults.wants_tokens:
            return frozenset()
        served = (self._sequences.get(work.id) for work in plan.work)
        return frozenset().union(*(each.prompt_ids for each in served if each is not None))
