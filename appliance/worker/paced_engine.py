"""An engine whose steps last as long as a device profile says; all else is real.

Processes, sockets, plans, block tables, frames and pools are those of the product; only the
arithmetic is missing. In its place every computed token leaves a *mark* in its KV slot: a 64-bit
sum over the whole prefix up to that token,

    mark(i) = origin(adapter, salt) + sum over j <= i of mix(token j) * P^j      (mod 2^64, P odd),

and the marks are read back through the block table before they are built upon. So a wrong table, a
wrong copy or a false prefix hit is an error, not a guess.

Tokens are a function of (prompt, seed, position) alone; at temperature 0 the seed plays no part. An
answer ends at a length drawn from the prompt, which nothing but this engine knows. Under a grammar
they are drawn from what it allows, and the answer ends where it may from that length on. There are
no logits: filters, penalties and biases change nothing.

Steps that follow each other begin when the one before was due, not when the host got round to them:
the host's work disappears inside the step as it does behind a real device, and the rate is that of
the profile however the host is scheduled.
"""

import mmap
import os
import time
from array import array
from collections.abc import Callable, Sequence
from math import log
from pathlib import Path

import numpy as np

from appliance.core.payload import SequenceState, TokenLogprobs
from appliance.core.profiles import (
    KV_SLOT_BYTES,
    Profile,
    device_profile,
    paced_kv_slab_bytes,
)
from appliance.core.start import WorkerStart
from appliance.core.types import CacheGroupSpec, RequestId, SeqWork, StepPlan
from appliance.worker.engine import EngineError, EngineInfo, SampledToken
from appliance.worker.grammar import Grammar, GrammarFailed, Grammars
from appliance.worker.pacing import BASE, MASK, MixTable, Pacer, Script, Words, digest, mix
from appliance.worker.text import TokenText


class _Sequence:
    """One sequence: marks of its known tokens, its block table, its script."""

    __slots__ = ("emitted", "grammar", "logprobs", "marks", "script", "table")

    def __init__(
        self,
        marks: "array[int]",
        script: Script,
        *,
        emitted: int,
        logprobs: int | None,
        grammar: Grammar | None,
    ) -> None:
        self.marks = marks
        self.script = script
        self.emitted = emitted
        self.logprobs = logprobs
        self.grammar = grammar
        self.table: list[int] = []


class PacedEngine:
    """See the module's text. `open` is how a worker gets one."""

    def __init__(
        self,
        buffer: memoryview,
        *,
        profile: Profile,
        tokens: TokenText,
        num_blocks: int,
        block_tokens: int,
        max_positions: int,
        tokenizer: Path | None = None,
        validate: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`buffer` is the KV slab, writable, at least `paced_kv_slab_bytes`; `tokenizer` the file
        that grammars are read with. `validate` reads all marks of a sequence back in each step, not
        only the last one. Raises `ValueError`."""
        needed = paced_kv_slab_bytes(num_blocks=num_blocks, block_tokens=block_tokens)
        if buffer.nbytes < needed:
            raise ValueError(
                f"the KV slab has {buffer.nbytes} bytes, {num_blocks} blocks need {needed}"
            )
        self.memory = buffer
        """The KV blocks."""
        self._slots = buffer[: needed // KV_SLOT_BYTES * KV_SLOT_BYTES].cast("B").cast("Q")
        self._profile = profile
        self._vocabulary = tokens.printable_ids()
        if not self._vocabulary:
            raise ValueError("the tokenizer has no printable token to answer with")
        self._printable = frozenset(self._vocabulary)
        self._grammars = Grammars(tokenizer or Path("tokenizer.json"), vocab_size=tokens.num_tokens)
        self._block_tokens = block_tokens
        self._validate = validate
        self._pacer = Pacer(clock=clock)
        self._took = 0.0
        self._sequences: dict[RequestId, _Sequence] = {}
        powers = np.full(max_positions + 1, BASE, dtype=np.uint64)
        powers[0] = 1
        self._powers: Words = np.cumprod(powers)
        self._power = self._powers.tolist()
        self._mixed = MixTable()
        group = CacheGroupSpec(num_blocks=num_blocks, block_tokens=block_tokens)
        self._info = EngineInfo(
            groups=(group,),
            vocab_size=tokens.num_tokens,
            max_positions=max_positions,
            weights_source="none",
            notes=(f"paced by profile {profile.name} ({profile.note})",),
        )
        self._wait_until: Callable[[float], None] = lambda due: _sleep_until(due, clock)

    @classmethod
    def open(cls, start: WorkerStart, *, weights_fd: int | None, kv_fd: int) -> "PacedEngine":
        """Map the KV slab; there are no weights. Raises `ValueError`, `FileNotFoundError`."""
        del weights_fd
        size = os.fstat(kv_fd).st_size
        return cls(
            memoryview(mmap.mmap(kv_fd, size)),
            profile=device_profile(start.profile),
            tokens=TokenText.load(start.model_dir),
            num_blocks=start.num_blocks,
            block_tokens=start.block_tokens,
            max_positions=start.batcher.max_model_len,
            tokenizer=Path(start.model_dir) / "tokenizer.json",
            validate=start.validate,
        )

    @property
    def info(self) -> EngineInfo:
        return self._info

    def wait_with(self, wait_until: Callable[[float], None]) -> None:
        """How to spend the time until a step is due, instead of sleeping."""
        self._wait_until = wait_until

    def rest(self) -> None:
        """Nothing is to be computed: the time until the next plan is the device's own."""
        self._pacer.rest()

    def add(self, request_id: RequestId, state: SequenceState) -> None:
        ids = np.frombuffer(state.prompt + state.emitted, dtype="<i4").astype(np.uint64)
        if len(ids) >= len(self._powers):
            raise EngineError(
                f"request {request_id} has {len(ids)} tokens, more than "
                f"{len(self._powers) - 1}; raise [model] max_model_len"
            )
        origin = np.uint64(digest((state.adapter or "").encode(), state.salt.encode()))
        marks = np.cumsum(mix(ids) * self._powers[: len(ids)]) + origin
        script = Script(
            state.prompt, state.sampling, vocabulary=self._vocabulary, profile=self._profile
        )
        grammar, sampling = None, state.sampling
        if sampling.grammar:
            grammar = self._grammars.open(
                sampling.grammar, ends=sampling.eos_token_ids, emitted=array("i", state.emitted)
            )
        self._sequences[request_id] = _Sequence(
            array("Q", marks.tobytes()),
            script,
            emitted=len(state.emitted) // 4,
            logprobs=sampling.logprobs,
            grammar=grammar,
        )

    def drop(self, request_id: RequestId) -> None:
        self._sequences.pop(request_id, None)

    def execute(self, plan: StepPlan) -> Sequence[SampledToken]:
        begun = self._pacer.begin()
        sampled: list[SampledToken] = []
        num_tokens = num_pairs = num_kv_tokens = 0
        for work in plan.work:
            sequence = self._sequences.get(work.id)
            if sequence is None:
                continue
            start, count = work.start, work.num_tokens
            self._extend_table(sequence, work)
            self._check(sequence, work)
            self._write(sequence, work)
            num_tokens += count
            num_pairs += count * start + count * (count + 1) // 2
            num_kv_tokens += start + count
            if work.samples:
                sampled.append(self._sample(sequence, work))
        seconds = self._profile.step_seconds(
            num_tokens=num_tokens,
            num_samples=len(sampled),
            num_pairs=num_pairs,
            num_kv_tokens=num_kv_tokens,
        )
        self._took = seconds
        self._wait_until(self._pacer.due(begun, seconds))
        return sampled

    def took(self) -> float:
        """Seconds of the last step on the device: those of the profile, however late the host was
        to notice its end."""
        return self._took

    def _extend_table(self, sequence: _Sequence, work: SeqWork) -> None:
        if work.fresh:
            sequence.table = list(work.new_blocks[0])
        elif work.new_blocks[0]:
            sequence.table.extend(work.new_blocks[0])

    def _check(self, sequence: _Sequence, work: SeqWork) -> None:
        """Read back what this work builds on: the last mark, or all of a prefix taken over."""
        end = work.start
        if end + work.num_tokens > len(sequence.marks):
            self._fail(work, "the plan computes a token that nobody knows")
        if (end + work.num_tokens - 1) // self._block_tokens >= len(sequence.table):
            self._fail(work, "the block table is too short for the plan")
        if end == 0:
            return
        if work.fresh or self._validate:
            self._check_range(sequence, work, end)
            return
        block, offset = divmod(end - 1, self._block_tokens)
        slot = sequence.table[block] * self._block_tokens + offset
        if self._slots[slot] != sequence.marks[end - 1]:
            self._fail(work, f"the KV of token {end - 1} is not its own")

    def _check_range(self, sequence: _Sequence, work: SeqWork, end: int) -> None:
        size = self._block_tokens
        known = memoryview(sequence.marks)
        for index in range(-(-end // size)):
            first = sequence.table[index] * size
            count = min(size, end - index * size)
            held = self._slots[first : first + count]
            if held != known[index * size : index * size + count]:
                self._fail(work, f"the KV in block {sequence.table[index]} is not its own")

    def _write(self, sequence: _Sequence, work: SeqWork) -> None:
        size, marks = self._block_tokens, sequence.marks
        position, end = work.start, work.start + work.num_tokens
        if work.num_tokens == 1:
            block, offset = divmod(position, size)
            self._slots[sequence.table[block] * size + offset] = marks[position]
            return
        known = memoryview(marks)
        while position < end:
            block, offset = divmod(position, size)
            count = min(size - offset, end - position)
            slot = sequence.table[block] * size + offset
            self._slots[slot : slot + count] = known[position : position + count]
            position += count

    def _sample(self, sequence: _Sequence, work: SeqWork) -> SampledToken:
        place = len(sequence.marks)
        if work.start + work.num_tokens != place:
            self._fail(work, "the plan samples before the last known token")
        token, failed = self._next(sequence)
        sequence.emitted += 1
        if place < len(self._powers):
            step = self._mixed[token] * self._power[place]
            sequence.marks.append((sequence.marks[-1] + step) & MASK)
        if sequence.logprobs is None:
            return SampledToken(id=work.id, token=token, failed=failed)
        return SampledToken(
            id=work.id,
            token=token,
            logprobs=self._uniform(token, sequence.logprobs),
            failed=failed,
        )

    def _next(self, sequence: _Sequence) -> tuple[int, str]:
        """The next token, or why there is none (any token then)."""
        grammar, place = sequence.grammar, sequence.emitted
        if grammar is None:
            return sequence.script.token(place), ""
        try:
            mask = grammar.look()
        except GrammarFailed as failure:
            return self._vocabulary[0], str(failure)
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
        allowed: list[int] = bits.nonzero()[0].tolist()
        ends = [token for token in allowed if token in grammar.ends]
        others = [token for token in allowed if token not in grammar.ends]
        shown = [token for token in others if token in self._printable]
        token = sequence.script.choose(place, shown or others, ends)
        grammar.push(token)
        return token, ""

    def _uniform(self, token: int, num_top: int) -> TokenLogprobs:
        """Every printable token is as likely as the others; the chosen one is named first."""
        logprob = -log(len(self._vocabulary))
        others = (other for other in self._vocabulary if other != token)
        top = [token, *others][:num_top] if num_top else []
        return TokenLogprobs(
            logprob=logprob, top_ids=tuple(top), top_logprobs=(logprob,) * len(top)
        )

    def _fail(self, work: SeqWork, what: str) -> None:
        raise EngineError(
            f"{what} (request {work.id}, tokens {work.start} to "
            f"{work.start + work.num_tokens}); restart the worker, and with "
            "[kv] prefix_cache = false if it comes back"
        )


def _sleep_until(due: float, clock: Callable[[], float]) -> None:
    if (rest := due - clock()) > 0:
        time.sleep(rest)
