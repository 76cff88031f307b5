"""The engine that runs a model: block tables, the forward pass, a token for each sampling row.

Prompt chunks and decode rows of a step are computed in one forward pass; only rows that sample
reach the output projection. The engine keeps per sequence its known token ids and its row of the
block table and decides nothing.
"""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from appliance.core.model_shape import (
    DType,
    ModelShape,
    UnsupportedModel,
    kv_slab_bytes,
    parse_config,
    parse_dtype,
)
from appliance.core.payload import SequenceState
from appliance.core.start import WorkerStart
from appliance.core.types import CacheGroupSpec, RequestId, SeqWork, StepPlan
from appliance.worker.adjustments import SampleRow
from appliance.worker.attention_plan import TILE
from appliance.worker.engine import EngineError, EngineInfo, SampledToken
from appliance.worker.forward import BlockTables, EngineSequence, Forward, Live
from appliance.worker.grammar import BitMask, GrammarFailed, Grammars
from appliance.worker.kv_pool import KvPool, map_kv
from appliance.worker.native.build import NativeUnavailable, check_threads, ensure_built
from appliance.worker.native.forward import NativeForward
from appliance.worker.sampler import NonFiniteLogits, sample
from appliance.worker.torch_forward import TorchForward
from appliance.worker.weight_slab import WeightRequest, open_weights
from appliance.worker.weight_sources import no_fault

log = logging.getLogger(__name__)


class TorchEngine:
    """Implements `appliance.worker.engine.Engine` on CPU."""

    def __init__(
        self,
        forward: Forward,
        pool: KvPool,
        *,
        max_model_len: int,
        max_sequences: int,
        info: EngineInfo,
        grammars: Grammars,
    ) -> None:
        """`forward` works on `pool`; `max_sequences` is a step's usual bound, more is fine."""
        self._forward = forward
        self._pool = pool
        self._info = info
        self._grammars = grammars
        self._sequences: dict[RequestId, EngineSequence] = {}
        width = -(-(-(-max_model_len // TILE) * TILE) // pool.block_tokens)
        self._tables = BlockTables.empty(slots=max_sequences, width=width, scratch=pool.scratch)

    @classmethod
    def open(
        cls,
        start: WorkerStart,
        *,
        weights_fd: int,
        kv_fd: int,
        source_fds: Sequence[int] = (),
        reach: Callable[[str], None] = no_fault,
    ) -> "TorchEngine":
        """Map the slabs (filling the weights as `start.weights` and `start.load_weights` say, from
        `source_fds` among others), choose kernels, touch the pool.

        Raises `UnsupportedModel`, `WeightError` or `ValueError`; the message names cause and fix.
        """
        torch.set_num_threads(start.threads)
        model_dir, bounds = Path(start.model_dir), start.batcher
        shape, dtype = read_shape(model_dir), parse_dtype(start.dtype)
        check_lengths(shape, max_model_len=bounds.max_model_len)
        wanted = WeightRequest(
            model_dir=model_dir,
            shape=shape,
            dtype=dtype,
            plan=start.weights,
            load=start.load_weights,
            seed=start.worker << 32 | start.epoch,
            reach=reach,
        )
        weights = open_weights((weights_fd, *source_fds), wanted)
        weights.touch()
        pool = open_pool(
            kv_fd, shape, dtype, num_blocks=start.num_blocks, block_tokens=start.block_tokens
        )
        with torch.inference_mode():
            pool.touch()
        forward = open_forward(start, shape, weights.tensors, pool=pool)
        group = CacheGroupSpec(num_blocks=start.num_blocks, block_tokens=start.block_tokens)
        info = EngineInfo(
            groups=(group,),
            vocab_size=shape.vocab_size,
            max_positions=shape.max_positions,
            weights_source=weights.source,
            weights_seconds=weights.seconds,
            weights_bytes=weights.num_bytes,
            weights_notes=weights.notes,
            weights_fingerprint=weights.fingerprint,
            notes=forward.notes,
        )
        return cls(
            forward,
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
        self._sequences[request_id] = EngineSequence(state, self._grammars)

    def drop(self, request_id: RequestId) -> None:
        """See `Engine.drop`."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None and sequence.slot >= 0:
            self._tables.give_back(sequence.slot)

    def execute(self, plan: StepPlan) -> Sequence[SampledToken]:
        """See `Engine.execute`."""
        known = self._sequences
        live = [(work, known[work.id]) for work in plan.work if work.id in known]
        if not live:
            return []
        self._take_blocks(live)
        computed = self._forward.compute(live, self._tables)
        sampling = [pair for pair in live if pair[0].samples]
        if not sampling:
            return []
        if computed.best is not None and all(sequence.is_plain for _, sequence in sampling):
            return _best(computed.best, sampling)
        with torch.inference_mode():
            return _sample(computed.logits, sampling)

    def _take_blocks(self, live: Live) -> None:
        """Bring the block tables up to date and clear blocks that start a new life."""
        new: list[int] = []
        size = self._pool.block_tokens
        for work, sequence in live:
            blocks = work.new_blocks[0] if work.new_blocks else ()
            if blocks or work.fresh or sequence.slot < 0:
                new += self._take_new(work, sequence, blocks)
            elif work.start + work.num_tokens > min(sequence.num_blocks * size, sequence.num_known):
                raise _disagree(work, sequence, size=size)
        if new:
            self._pool.clear(new)

    def _take_new(
        self, work: SeqWork, sequence: EngineSequence, blocks: Sequence[int]
    ) -> Sequence[int]:
        """Enter a sequence's new blocks; returns those that hold nothing yet."""
        size = self._pool.block_tokens
        if sequence.slot < 0:
            sequence.slot = self._tables.take()
        row = self._tables.rows[sequence.slot]
        if work.fresh:
            row[: sequence.num_blocks] = self._pool.scratch
            sequence.num_blocks = 0
        begin, end = sequence.num_blocks, sequence.num_blocks + len(blocks)
        sequence.num_blocks = end
        if work.start + work.num_tokens > min(end * size, sequence.num_known) or end > len(row):
            raise _disagree(work, sequence, size=size)
        row[begin:end] = blocks
        return blocks[max(begin, -(-work.start // size)) - begin :]


def open_forward(
    start: WorkerStart, shape: ModelShape, weights: dict[str, torch.Tensor], *, pool: KvPool
) -> Forward:
    """The forward pass that `start.native` asks for: "auto" takes the native kernels where they can
    be had, "off" never, "required" raises `ValueError` where they cannot."""
    bounds, dtype = start.batcher, parse_dtype(start.dtype)
    why = "engine.native is off"
    if start.native != "off":
        try:
            check_threads(start.threads)
            return NativeForward(
                ensure_built(),
                shape,
                weights,
                pool=pool,
                dtype=dtype,
                max_positions=bounds.max_model_len,
                max_rows=bounds.max_batch_tokens,
                max_sampled=bounds.max_num_seqs,
            )
        except NativeUnavailable as error:
            why = f"no native kernels: {error}"
            if start.native == "required":
                raise ValueError(f"engine.native is required, but {why}") from error
            log.warning("the slower torch kernels are used: %s", why)
    forward = TorchForward.open(
        shape,
        weights,
        pool,
        dtype=dtype,
        threads=start.threads,
        max_positions=bounds.max_model_len,
        max_rows=bounds.max_batch_tokens,
        max_sampled=bounds.max_num_seqs,
    )
    forward.notes += (why,)
    return forward


def _disagree(work: SeqWork, sequence: EngineSequence, *, size: int) -> EngineError:
    return EngineError(
        f"step plan and engine disagree about request {work.id}: tokens {work.start} "
        f"+ {work.num_tokens} of {sequence.num_known} known, {sequence.num_blocks} blocks of "
        f"{size}; restart the worker"
    )


def _not_finite(ids: Sequence[RequestId]) -> EngineError:
    return EngineError(
        f"logits of request {', '.join(map(str, ids))} are not finite; check the checkpoint "
        "or use dtype float32"
    )


def _best(best: Sequence[int], live: Live) -> list[SampledToken]:
    """The tokens of the largest logits."""
    if min(best) < 0:
        pairs = zip(live, best, strict=True)
        raise _not_finite([work.id for (work, _), token in pairs if token < 0])
    for (_, sequence), token in zip(live, best, strict=True):
        sequence.append(token)
    return [
        SampledToken(id=work.id, token=token) for (work, _), token in zip(live, best, strict=True)
    ]


def _sample(logits: torch.Tensor, live: Live) -> list[SampledToken]:
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
        raise _not_finite([live[i][0].id for i in error.rows]) from error
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


def _look(sequence: EngineSequence) -> BitMask | GrammarFailed | None:
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
