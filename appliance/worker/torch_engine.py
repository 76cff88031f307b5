"""The engine that runs a model: flattens a plan into token rows, runs the decoder, draws tokens.

Prompt chunks and decode rows of a step are computed in one forward pass; only rows that sample
reach the output projection. The engine keeps per sequence its known token ids and its row of the
block table and decides nothing.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from appliance.core.model_shape import (
    DType,
    ModelShape,
    UnsupportedModel,
    kv_slab_bytes,
    parse_config,
    parse_dtype,
)
from appliance.core.payload import Sampling, SequenceState
from appliance.core.start import WorkerStart
from appliance.core.types import CacheGroupSpec, RequestId, SeqWork, StepPlan
from appliance.modeling.decoder import Decoder
from appliance.modeling.linear import LinearFactory
from appliance.worker.adjustments import SampleRow, TokenCounts
from appliance.worker.attention import PagedAttention
from appliance.worker.attention_plan import TILE, StepBatch
from appliance.worker.engine import EngineError, EngineInfo, SampledToken
from appliance.worker.grammar import BitMask, Grammar, GrammarFailed, Grammars
from appliance.worker.kv_pool import KvPool, map_kv
from appliance.worker.sampler import NonFiniteLogits, sample
from appliance.worker.weight_slab import open_weights


class _Sequence:
    """Known ids of one sequence, what follows from them, and its row in the block tables."""

    __slots__ = (
        "counts", "grammar", "num_blocks", "num_known", "num_prompt", "sampling", "slot", "tokens",
    )  # fmt: skip

    def __init__(self, state: SequenceState, grammars: Grammars) -> None:
        known = np.frombuffer(state.prompt + state.emitted, dtype="<i4")
        self.tokens = np.empty(len(known) + 64, np.int64)
        self.tokens[: len(known)] = known
        self.num_known = len(known)
        self.num_prompt = len(state.prompt) // 4
        self.sampling: Sampling = state.sampling
        self.slot = -1
        self.num_blocks = 0
        emitted = known[self.num_prompt :].tolist()
        self.counts: TokenCounts | None = None
        if TokenCounts.wanted(self.sampling):
            self.counts = TokenCounts(known[: self.num_prompt].tolist(), emitted)
        self.grammar: Grammar | None = None
        if self.sampling.grammar:
            self.grammar = grammars.open(
                self.sampling.grammar, ends=self.sampling.eos_token_ids, emitted=emitted
            )

    def append(self, token: int) -> None:
        """Add a known token. Raises nothing: what a grammar thinks of it shows when it is asked."""
        if self.counts is not None:
            self.counts.push(token)
        if self.grammar is not None:
            self.grammar.push(token)
        if self.num_known == len(self.tokens):
            self.tokens = np.concatenate([self.tokens, np.empty_like(self.tokens)])
        self.tokens[self.num_known] = token
        self.num_known += 1


@dataclass
class _BlockTables:
    """Block ids of all sequences that have any: `[slots, width]`, padded with the scratch block."""

    rows: npt.NDArray[np.int64]
    scratch: int
    unused: list[int]

    @classmethod
    def empty(cls, *, slots: int, width: int, scratch: int) -> "_BlockTables":
        rows = np.full((slots, width), scratch, np.int64)
        return cls(rows, scratch, list(range(slots)))

    def take(self) -> int:
        """A cleared row's number; the table doubles when all are in use."""
        if not self.unused:
            have = len(self.rows)
            self.rows = np.concatenate([self.rows, np.full_like(self.rows, self.scratch)])
            self.unused = list(range(have, 2 * have))
        return self.unused.pop()

    def give_back(self, slot: int) -> None:
        self.rows[slot] = self.scratch
        self.unused.append(slot)


class TorchEngine:
    """Implements `appliance.worker.engine.Engine` on CPU."""

    def __init__(
        self,
        decoder: Decoder,
        attention: PagedAttention,
        pool: KvPool,
        *,
        max_model_len: int,
        max_sequences: int,
        info: EngineInfo,
        grammars: Grammars,
    ) -> None:
        """`attention` works on `pool`; `max_sequences` is a step's usual bound, more is fine."""
        self._decoder = decoder
        self._attention = attention
        self._pool = pool
        self._info = info
        self._grammars = grammars
        self._sequences: dict[RequestId, _Sequence] = {}
        width = -(-max_model_len // TILE) * (TILE // pool.block_tokens)
        self._tables = _BlockTables.empty(slots=max_sequences, width=width, scratch=pool.scratch)

    @classmethod
    def open(cls, start: WorkerStart, *, weights_fd: int, kv_fd: int) -> "TorchEngine":
        """Map the slabs (filling the weights if `start.load_weights`), choose kernels, touch the
        pool.

        Raises `UnsupportedModel`, `WeightError` or `ValueError`; the message names cause and fix.
        """
        torch.set_num_threads(start.threads)
        model_dir, bounds = Path(start.model_dir), start.batcher
        shape, dtype = read_shape(model_dir), parse_dtype(start.dtype)
        check_lengths(shape, max_model_len=bounds.max_model_len)
        load = "if_needed" if start.load_weights else "never"
        weights = open_weights(weights_fd, model_dir=model_dir, shape=shape, dtype=dtype, load=load)
        pool = open_pool(
            kv_fd, shape, dtype, num_blocks=start.num_blocks, block_tokens=start.block_tokens
        )
        factory = LinearFactory(invariant=dtype == "float32")
        with torch.inference_mode():
            pool.touch()
            attention = PagedAttention(pool, num_heads=shape.num_heads)
            decoder = Decoder(
                shape,
                weights.tensors,
                factory=factory,
                max_positions=bounds.max_model_len,
                max_rows=bounds.max_batch_tokens,
                max_sampled=bounds.max_num_seqs,
            )
        proven = decoder.invariant and attention.invariant and start.threads == 1
        group = CacheGroupSpec(num_blocks=start.num_blocks, block_tokens=start.block_tokens)
        info = EngineInfo(
            groups=(group,),
            vocab_size=shape.vocab_size,
            max_positions=shape.max_positions,
            weights_source=weights.source,
            notes=_notes(factory, proven=proven, threads=start.threads),
        )
        return cls(
            decoder,
            attention,
            pool,
            max_model_len=bounds.max_model_len,
            max_sequences=bounds.max_num_seqs,
            info=info,
            grammars=Grammars(model_dir / "tokenizer.json", vocab_size=shape.vocab_size),
        )

    @property
    def info(self) -> EngineInfo:
        """What the engine can hold and which kernels it chose."""
        return self._info

    @property
    def pool(self) -> KvPool:
        """The worker's KV pool."""
        return self._pool

    def add(self, request_id: RequestId, state: SequenceState) -> None:
        """See `Engine.add`."""
        self.drop(request_id)
        self._sequences[request_id] = _Sequence(state, self._grammars)

    def drop(self, request_id: RequestId) -> None:
        """See `Engine.drop`."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None and sequence.slot >= 0:
            self._tables.give_back(sequence.slot)

    def execute(self, plan: StepPlan) -> Sequence[SampledToken]:
        """See `Engine.execute`."""
        live = [
            (work, self._sequences[work.id]) for work in plan.work if work.id in self._sequences
        ]
        if not live:
            return []
        with torch.inference_mode():
            self._take_blocks(live)
            hidden = self._forward(live)
            ends = np.cumsum([work.num_tokens for work, _ in live]) - 1
            sampled = [i for i, (work, _) in enumerate(live) if work.samples]
            if not sampled:
                return []
            logits = self._decoder.logits(hidden, torch.from_numpy(ends[sampled]))
            return self._sample(logits, [live[i] for i in sampled])

    def _take_blocks(self, live: Sequence[tuple[SeqWork, _Sequence]]) -> None:
        """Bring the block tables up to date and clear blocks that start a new life."""
        new: list[int] = []
        size = self._pool.block_tokens
        for work, sequence in live:
            if sequence.slot < 0:
                sequence.slot = self._tables.take()
            row = self._tables.rows[sequence.slot]
            if work.fresh:
                row[: sequence.num_blocks] = self._pool.scratch
                sequence.num_blocks = 0
            blocks = work.new_blocks[0] if work.new_blocks else ()
            end = sequence.num_blocks + len(blocks)
            if work.start + work.num_tokens > min(end * size, sequence.num_known) or end > len(row):
                raise EngineError(
                    f"step plan and engine disagree about request {work.id}: tokens {work.start} "
                    f"+ {work.num_tokens} of {sequence.num_known} known, {end} blocks of {size}; "
                    "restart the worker"
                )
            row[sequence.num_blocks : end] = blocks
            first_new = max(sequence.num_blocks, -(-work.start // size))
            new += blocks[first_new - sequence.num_blocks :]
            sequence.num_blocks = end
        self._pool.clear(new)

    def _forward(self, live: Sequence[tuple[SeqWork, _Sequence]]) -> torch.Tensor:
        starts = np.array([work.start for work, _ in live], np.int64)
        counts = np.array([work.num_tokens for work, _ in live], np.int64)
        tiles = int(((starts + counts - 1) // TILE).max()) + 1
        slots = np.array([sequence.slot for _, sequence in live])
        tables = self._tables.rows[slots, : tiles * (TILE // self._pool.block_tokens)]
        batch = StepBatch(
            starts=starts,
            counts=counts,
            tables=tables,
            num_rows=self._decoder.padded_rows(int(counts.sum())),
        )
        ids = np.zeros(batch.num_rows, np.int64)
        positions = np.zeros(batch.num_rows, np.int64)
        pieces = [s.tokens[w.start : w.start + w.num_tokens] for w, s in live]
        np.concatenate(pieces, out=ids[: batch.num_tokens])
        positions[: batch.num_tokens] = batch.positions()
        self._attention.prepare(batch)
        return self._decoder.hidden(
            torch.from_numpy(ids), torch.from_numpy(positions), attention=self._attention
        )

    def _sample(
        self, logits: torch.Tensor, live: Sequence[tuple[SeqWork, _Sequence]]
    ) -> list[SampledToken]:
        masks = [_look(sequence) for _, sequence in live]
        rows = [
            SampleRow(
                s.sampling,
                position=s.num_known,
                num_emitted=s.num_known - s.num_prompt,
                counts=s.counts,
                allowed=None if isinstance(mask, GrammarFailed) else mask,
            )
            for (_, s), mask in zip(live, masks, strict=True)
        ]
        try:
            drawn = sample(logits, rows)
        except NonFiniteLogits as error:
            names = ", ".join(str(live[i][0].id) for i in error.rows)
            raise EngineError(
                f"logits of request {names} are not finite; check the checkpoint "
                "or use dtype float32"
            ) from error
        for (_, sequence), (token, _) in zip(live, drawn, strict=True):
            sequence.append(token)
        return [
            SampledToken(
                id=work.id,
                token=token,
                logprobs=logprobs,
                failed=str(mask) if isinstance(mask, GrammarFailed) else "",
            )
            for (work, _), (token, logprobs), mask in zip(live, drawn, masks, strict=True)
        ]


def _look(sequence: _Sequence) -> BitMask | GrammarFailed | None:
    """What the sequence's grammar allows next, or why it cannot say; None without a grammar."""
    if sequence.grammar is None:
        return None
    try:
        return sequence.grammar.look()
    except GrammarFailed as failure:
        return failure


def read_shape(model_dir: Path) -> ModelShape:
    """The shape of the model in a Hugging Face directory. Raises `UnsupportedModel`."""
    generation = model_dir / "generation_config.json"
    try:
        config = _read_json(model_dir / "config.json")
        return parse_config(
            config, generation_config=_read_json(generation) if generation.is_file() else None
        )
    except FileNotFoundError as error:
        raise UnsupportedModel(
            f"{model_dir} has no config.json; give a Hugging Face model directory"
        ) from error


def check_lengths(shape: ModelShape, *, max_model_len: int) -> None:
    """Refuse a context that the model was not made for."""
    if max_model_len > shape.max_positions:
        raise UnsupportedModel(
            f"max_model_len={max_model_len} is above the model's max_position_embeddings="
            f"{shape.max_positions}; set max_model_len to at most that"
        )


def open_pool(
    fd: int, shape: ModelShape, dtype: DType, *, num_blocks: int, block_tokens: int
) -> KvPool:
    """Map the KV slab behind `fd`."""
    size = kv_slab_bytes(shape, dtype, num_blocks=num_blocks, block_tokens=block_tokens)
    return KvPool(
        map_kv(fd, size), shape=shape, dtype=dtype, num_blocks=num_blocks, block_tokens=block_tokens
    )


def _read_json(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def _notes(factory: LinearFactory, *, proven: bool, threads: int) -> tuple[str, ...]:
    """What an operator should read about the chosen kernels."""
    paths = "+".join(sorted({path.name for path in factory.paths.values()}))
    promise = "row-invariant" if proven else "not row-invariant"
    return (f"products {paths}, {promise} at {threads} thread(s)", *factory.notes)
