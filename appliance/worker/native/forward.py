"""The forward pass in C: one call per step, on the weights and the pool where they lie.

Nothing is packed or copied but vectors (norms, biases), which become float32. The structures here
mirror those of `forward.c`, field by field.
"""

import ctypes
import struct
from collections.abc import Mapping

import torch

from appliance.core.model_shape import DType, ModelShape
from appliance.modeling import rotary
from appliance.worker.engine import EngineError
from appliance.worker.forward import BlockTables, Computed, Live
from appliance.worker.kv_pool import KvPool
from appliance.worker.native.build import Library, NativeUnavailable


class _Shape(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in (
            "halves", "layers", "hidden", "heads", "kv_heads", "head_dim", "ff", "vocab",
            "positions", "blocks", "block_tokens", "block_bytes",
        )),
        ("pool", ctypes.c_void_p),
    ]  # fmt: skip


_LAYER = (
    "attn_norm", "qkv_bias", "q_norm", "k_norm", "o_bias", "mlp_norm", "qkv", "o", "gate_up",
    "down",
)  # fmt: skip
"""Tensors of a layer, as `weight_tensors` names them."""


class _Layer(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in _LAYER]


class _Model(ctypes.Structure):
    _fields_ = [
        ("shape", _Shape),
        ("norm_eps", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in (
            "embed", "lm_head", "norm", "cos", "sin", "layers",
        )),
    ]  # fmt: skip


class NativeForward:
    """Implements `appliance.worker.forward.Forward`. Lives as long as its process: the buffers of
    C are never freed."""

    def __init__(
        self,
        library: Library,
        shape: ModelShape,
        weights: Mapping[str, torch.Tensor],
        *,
        pool: KvPool,
        dtype: DType,
        max_positions: int,
        max_rows: int,
        max_sampled: int,
    ) -> None:
        """`weights` in `dtype`. `max_rows` and `max_sampled` bound the usual step, more is fine.

        Raises `NativeUnavailable` when the library cannot be loaded, `MemoryError`."""
        code = _load(library)
        self._kept: list[object] = [weights, pool]
        model = self._model(shape, weights, pool, dtype=dtype, max_positions=max_positions)
        self._engine = code.appliance_open(ctypes.byref(model), max_rows, max_positions)
        if not self._engine:
            raise MemoryError("out of memory for the buffers of the native kernels")
        self._step = code.appliance_step
        self._vocab_size = shape.vocab_size
        self._room(max_sampled)
        lanes, pairs = code.appliance_lanes(), code.appliance_pairs()
        kind = "float32" if dtype == "float32" else "bfloat16 in pairs" if pairs else "bfloat16"
        built = "built now" if library.fresh else "found in the cache"
        self.notes: tuple[str, ...] = (
            f"native kernels ({kind}, vectors of {lanes}, {library.compiler}, {built}), "
            "row-invariant at 1 thread(s)",
        )

    def compute(self, live: Live, tables: BlockTables) -> Computed:
        """See `Forward.compute`."""
        fields: list[int] = []
        base, pitch, sampled = tables.address, tables.rows.strides[0], 0
        for work, sequence in live:
            samples = work.samples
            sampled += samples
            fields += (
                sequence.address,
                base + sequence.slot * pitch,
                work.start,
                work.num_tokens,
                samples,
            )
        if sampled > len(self._best):
            self._room(sampled)
        packed = struct.pack(f"{len(fields)}q", *fields)
        failed = self._step(self._engine, packed, len(live), self._logits_at, self._best)
        if failed > 0:
            raise EngineError(
                f"request {live[failed - 1][0].id} has a token, position or block out of bounds; "
                "restart the worker"
            )
        if failed:
            raise EngineError("out of memory in a step; lower [batch] max_batch_tokens")
        return Computed(self._logits[:sampled], self._best[:sampled])

    def _room(self, sampled: int) -> None:
        self._logits = torch.zeros(sampled, self._vocab_size)
        self._logits_at = self._logits.data_ptr()
        self._best = (ctypes.c_int64 * sampled)()

    def _model(
        self,
        shape: ModelShape,
        weights: Mapping[str, torch.Tensor],
        pool: KvPool,
        *,
        dtype: DType,
        max_positions: int,
    ) -> _Model:
        cos, sin = rotary.tables(shape, max_positions=max_positions, dtype=torch.float32)
        layers = (_Layer * shape.num_layers)()
        for index in range(shape.num_layers):
            prefix = f"layers.{index}."
            for name in _LAYER:
                setattr(layers[index], name, self._pointer(weights.get(prefix + name)))
        self._kept.append(layers)
        return _Model(
            shape=_Shape(
                halves=int(dtype == "bfloat16"),
                layers=shape.num_layers,
                hidden=shape.hidden,
                heads=shape.num_heads,
                kv_heads=shape.num_kv_heads,
                head_dim=shape.head_dim,
                ff=shape.ff,
                vocab=shape.vocab_size,
                positions=max_positions,
                blocks=pool.num_blocks,
                block_tokens=pool.block_tokens,
                block_bytes=pool.block_bytes,
                pool=pool.blocks.data_ptr(),
            ),
            norm_eps=shape.norm_eps,
            embed=self._pointer(weights["embed"]),
            lm_head=self._pointer(weights["embed" if shape.tied else "lm_head"]),
            norm=self._pointer(weights["norm"]),
            cos=self._pointer(cos.flatten(1)),
            sin=self._pointer(sin.flatten(1)),
            layers=ctypes.cast(layers, ctypes.c_void_p),
        )

    def _pointer(self, tensor: torch.Tensor | None) -> int | None:
        """Where a matrix lies, or a float32 copy of a vector; both are kept alive."""
        if tensor is None:
            return None
        kept = tensor.float() if tensor.dim() == 1 else tensor
        self._kept.append(kept)
        return kept.data_ptr()


def _load(library: Library) -> ctypes.CDLL:
    try:
        code = ctypes.CDLL(str(library.path))
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        code.appliance_open.argtypes = [pointer, integer, integer]
        code.appliance_open.restype = pointer
        code.appliance_step.argtypes = [pointer, ctypes.c_char_p, integer, pointer, pointer]
        code.appliance_step.restype = integer
        for name in ("appliance_lanes", "appliance_pairs"):
            getattr(code, name).restype = integer
    except (OSError, AttributeError) as error:
        raise NativeUnavailable(f"the built kernels cannot be loaded: {error}") from error
    return code
