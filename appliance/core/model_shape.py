"""What a model is, in numbers: read from a Hugging Face `config.json`, without torch.

`ModelShape` answers the questions that are asked before any tensor exists: may this checkpoint be
served at all, how large are its weights, how large is a token's KV state. Whatever would change the
computation and is not built is refused by name (`UnsupportedModel`): a checkpoint is served exactly
or not at all.

The weight slab is one flat buffer: a header of `slab_header_bytes`, then every tensor of
`weight_tensors` in that order, each at a multiple of `TENSOR_ALIGNMENT`. The projections are stored
fused (`qkv`, `gate_up`), because that is how they are multiplied.
"""

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any, Literal

from appliance.core.types import Record

Family = Literal["llama", "mistral", "qwen2", "qwen3"]
DType = Literal["float32", "bfloat16"]

DTYPE_BYTES: Mapping[DType, int] = {"float32": 4, "bfloat16": 2}
ARCHITECTURES: Mapping[str, Family] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
FAMILIES: tuple[Family, ...] = ("llama", "mistral", "qwen2", "qwen3")
TENSOR_ALIGNMENT = 64
PAGE_BYTES = 4096
SUM_CHUNK_BYTES = 1 << 18
"""Bytes of the weight slab under one checksum."""


class UnsupportedModel(ValueError):
    """The checkpoint asks for something that is not built. The message names the field and the
    fix."""


class Llama3Scaling(Record, frozen=True, kw_only=True):
    """Frequency-dependent stretching of rotary embeddings, as Llama 3.1 defines it ("llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


class KvGroupShape(Record, frozen=True, kw_only=True):
    """One cache group of a model: how its KV state grows. All families built so far have one."""

    name: str = "kv"
    kind: str = "paged"
    num_layers: int
    bytes_per_token: int


class WeightSpec(Record, frozen=True, kw_only=True):
    """One tensor of the weight slab."""

    name: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return prod(self.shape)


class SlabLayout(Record, frozen=True, kw_only=True):
    """Byte offsets in a weight slab::

    header | tensors | one checksum (4 bytes) for each chunk of the tensors | padding to a page
    """

    header: int
    """Where the tensors begin."""
    sums: int
    """Where they end and the checksums begin."""

    @property
    def num_chunks(self) -> int:
        """Chunks of `SUM_CHUNK_BYTES`; the last may be shorter."""
        return -(-(self.sums - self.header) // SUM_CHUNK_BYTES)

    @property
    def total(self) -> int:
        """Size of the slab."""
        return _align(self.sums + 4 * self.num_chunks, PAGE_BYTES)

    def chunk(self, index: int) -> slice:
        """The bytes of a chunk."""
        begin = self.header + index * SUM_CHUNK_BYTES
        return slice(begin, min(begin + SUM_CHUNK_BYTES, self.sums))


class ModelShape(Record, frozen=True, kw_only=True):
    """The dimensions and switches of one decoder-only transformer. Counts unless said otherwise."""

    family: Family
    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ff: int
    vocab_size: int
    max_positions: int
    rope_theta: float
    rope_scaling: Llama3Scaling | None
    norm_eps: float
    tied: bool
    """The output projection is the embedding table."""
    qkv_bias: bool
    output_bias: bool
    qk_norm: bool
    eos_ids: tuple[int, ...]

    @property
    def num_parameters(self) -> int:
        """Parameters of the checkpoint; a tied table counts once."""
        return sum(spec.num_elements for spec in weight_tensors(self))

    def weight_bytes(self, dtype: DType) -> int:
        """Bytes of all tensors, without alignment and header."""
        return self.num_parameters * DTYPE_BYTES[dtype]

    def packed_bytes(self, dtype: DType) -> int:
        """Bytes of the private copy of every matrix that a CPU worker keeps in its kernel's layout
        (estimate: the layout may pad a little). The slab itself is shared by all workers."""
        matrices = sum(s.num_elements for s in weight_tensors(self) if is_matrix(s))
        if self.tied:
            matrices += self.vocab_size * self.hidden
        return matrices * DTYPE_BYTES[dtype]

    def kv_groups(self, dtype: DType) -> tuple[KvGroupShape, ...]:
        """The cache groups and what a token costs in each."""
        per_token = 2 * self.num_layers * self.num_kv_heads * self.head_dim * DTYPE_BYTES[dtype]
        return (KvGroupShape(num_layers=self.num_layers, bytes_per_token=per_token),)

    def kv_block_bytes(self, dtype: DType, *, block_tokens: int) -> int:
        """Bytes of one KV block over all layers (one contiguous chunk of the pool)."""
        return sum(group.bytes_per_token for group in self.kv_groups(dtype)) * block_tokens


def kv_slab_bytes(shape: ModelShape, dtype: DType, *, num_blocks: int, block_tokens: int) -> int:
    """Bytes of a worker's KV slab: `num_blocks` usable blocks and one scratch block, whole
    pages."""
    return _align(
        (num_blocks + 1) * shape.kv_block_bytes(dtype, block_tokens=block_tokens), PAGE_BYTES
    )


def is_matrix(spec: WeightSpec) -> bool:
    """Whether the tensor is multiplied with (the embedding table is only looked up in)."""
    return len(spec.shape) == 2 and spec.name != "embed"


def weight_tensors(shape: ModelShape) -> tuple[WeightSpec, ...]:
    """All tensors of the slab in slab order.

    Per layer: `attn_norm [hidden]`, `qkv [(heads + 2 kv_heads) head_dim, hidden]` (rows q, k, v),
    `o [hidden, heads head_dim]`, `mlp_norm`, `gate_up [2 ff, hidden]` (rows gate, up),
    `down [hidden, ff]`, and where the family has them `qkv_bias`, `q_norm`, `k_norm`, `o_bias`.
    """
    return tuple(_tensors(shape))


def slab_offsets(shape: ModelShape, dtype: DType) -> dict[str, int]:
    """Byte offset of every tensor in the slab."""
    offsets: dict[str, int] = {}
    cursor = slab_header_bytes(shape)
    for spec in weight_tensors(shape):
        offsets[spec.name] = cursor
        cursor = _align(cursor + spec.num_elements * DTYPE_BYTES[dtype], TENSOR_ALIGNMENT)
    return offsets


def slab_header_bytes(shape: ModelShape) -> int:
    """Bytes kept for the manifest at the head of the slab (whole pages)."""
    return _align(4096 + 160 * len(weight_tensors(shape)), PAGE_BYTES)


def slab_layout(shape: ModelShape, dtype: DType) -> SlabLayout:
    """Where things stand in the weight slab."""
    last = weight_tensors(shape)[-1]
    end = slab_offsets(shape, dtype)[last.name] + last.num_elements * DTYPE_BYTES[dtype]
    return SlabLayout(header=slab_header_bytes(shape), sums=_align(end, PAGE_BYTES))


def slab_bytes(shape: ModelShape, dtype: DType) -> int:
    """Bytes of the weight slab, header and checksums included, whole pages."""
    return slab_layout(shape, dtype).total


def parse_dtype(name: str) -> DType:
    """The dtype of that name; `UnsupportedModel` otherwise."""
    match name:
        case "float32" | "bfloat16":
            return name
    raise UnsupportedModel(f"dtype {name!r} is not built; use float32 or bfloat16")


def parse_config(
    config: Mapping[str, Any], *, generation_config: Mapping[str, Any] | None = None
) -> ModelShape:
    """Read a `config.json` (old and new key style) and, if given, `generation_config.json` for the
    ids that end an answer. Raises `UnsupportedModel`, naming the field, for all that is not
    built."""
    family = _family(config)
    _refuse(config, family)
    hidden = _count(config, "hidden_size")
    num_heads = _count(config, "num_attention_heads")
    num_kv_heads = _count(config, "num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise UnsupportedModel(
            f"num_attention_heads={num_heads} is not a multiple of "
            f"num_key_value_heads={num_kv_heads}"
        )
    max_positions = _count(config, "max_position_embeddings")
    theta, scaling = _rope(config)
    _refuse_window(config, family, max_positions=max_positions)
    attention_bias = family == "qwen2" or bool(config.get("attention_bias", False))
    return ModelShape(
        family=family,
        num_layers=_count(config, "num_hidden_layers"),
        hidden=hidden,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_head_dim(config, family, default=hidden // num_heads),
        ff=_count(config, "intermediate_size"),
        vocab_size=_count(config, "vocab_size"),
        max_positions=max_positions,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=_number(config, "rms_norm_eps", default=1e-6),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias,
        output_bias=attention_bias and family != "qwen2",
        qk_norm=family == "qwen3",
        eos_ids=_eos_ids(config, generation_config or {}),
    )


def _align(size: int, step: int) -> int:
    return -(-size // step) * step


def _tensors(shape: ModelShape) -> Iterator[WeightSpec]:
    query_rows = shape.num_heads * shape.head_dim
    qkv_rows = query_rows + 2 * shape.num_kv_heads * shape.head_dim

    def spec(name: str, *dims: int) -> WeightSpec:
        return WeightSpec(name=name, shape=dims)

    yield spec("embed", shape.vocab_size, shape.hidden)
    for layer in range(shape.num_layers):
        prefix = f"layers.{layer}."
        yield spec(prefix + "attn_norm", shape.hidden)
        yield spec(prefix + "qkv", qkv_rows, shape.hidden)
        if shape.qkv_bias:
            yield spec(prefix + "qkv_bias", qkv_rows)
        if shape.qk_norm:
            yield spec(prefix + "q_norm", shape.head_dim)
            yield spec(prefix + "k_norm", shape.head_dim)
        yield spec(prefix + "o", shape.hidden, query_rows)
        if shape.output_bias:
            yield spec(prefix + "o_bias", shape.hidden)
        yield spec(prefix + "mlp_norm", shape.hidden)
        yield spec(prefix + "gate_up", 2 * shape.ff, shape.hidden)
        yield spec(prefix + "down", shape.hidden, shape.ff)
    yield spec("norm", shape.hidden)
    if not shape.tied:
        yield spec("lm_head", shape.vocab_size, shape.hidden)


def _family(config: Mapping[str, Any]) -> Family:
    architectures = config.get("architectures") or []
    known = ", ".join(ARCHITECTURES)
    if architectures:
        name = architectures[0]
        if name not in ARCHITECTURES:
            raise UnsupportedModel(f"architectures: {name!r} is not built; known: {known}")
        return ARCHITECTURES[name]
    model_type = config.get("model_type")
    for family in FAMILIES:
        if model_type == family:
            return family
    raise UnsupportedModel(f"model_type: {model_type!r} is not built; known: {', '.join(FAMILIES)}")


def _refuse(config: Mapping[str, Any], family: Family) -> None:
    """Refuse switches that change the computation and are not built."""
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            method = config[key].get("quant_method", "unknown")
            raise UnsupportedModel(
                f"{key}: quantised checkpoints ({method}) are not built; "
                "use the float32 or bfloat16 original"
            )
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedModel(f"hidden_act: {activation!r} is not built; known: silu")
    if config.get("mlp_bias"):
        raise UnsupportedModel("mlp_bias: biases in the feed-forward layers are not built")
    if family == "mistral" and config.get("attention_bias"):
        raise UnsupportedModel(
            "attention_bias: Mistral has none; the checkpoint is not plain Mistral"
        )


def _refuse_window(config: Mapping[str, Any], family: Family, *, max_positions: int) -> None:
    """Refuse a sliding window that some position would notice."""
    kinds = set(config.get("layer_types") or ())
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise UnsupportedModel(
            f"layer_types: {sorted(unknown)} are not built; known: full_attention"
        )
    window = config.get("sliding_window")
    if "sliding_attention" in kinds or (
        family in ("qwen2", "qwen3") and config.get("use_sliding_window")
    ):
        used = window is None or window < max_positions
    else:
        used = family == "mistral" and window is not None and window < max_positions
    if used:
        raise UnsupportedModel(
            f"sliding_window: {window} is below max_position_embeddings={max_positions} and "
            "sliding-window attention is not built; serve a checkpoint without it"
        )


def _head_dim(config: Mapping[str, Any], family: Family, *, default: int) -> int:
    if config.get("head_dim") is None:
        head_dim = 128 if family == "qwen3" else default
    else:
        head_dim = _count(config, "head_dim")
    if head_dim % 2:
        raise UnsupportedModel(f"head_dim: {head_dim} is odd; rotary embeddings need an even one")
    return head_dim


def _rope(config: Mapping[str, Any]) -> tuple[float, Llama3Scaling | None]:
    """Theta and scaling from `rope_parameters` (new) or `rope_theta` + `rope_scaling` (old)."""
    new = config.get("rope_parameters") or {}
    if any(isinstance(value, Mapping) for value in new.values()):
        raise UnsupportedModel("rope_parameters: per-layer-type rotary embeddings are not built")
    rope: Mapping[str, Any] = {**(config.get("rope_scaling") or {}), **new}
    theta = _number(rope if "rope_theta" in rope else config, "rope_theta", default=10000.0)
    factor = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if factor not in (None, 1, 1.0):
        raise UnsupportedModel(f"partial_rotary_factor: {factor} is not built; known: 1")
    kind = rope.get("rope_type", rope.get("type", "default"))
    match kind:
        case "default" | None:
            return theta, None
        case "llama3":
            return theta, Llama3Scaling(
                factor=_number(rope, "factor"),
                low_freq_factor=_number(rope, "low_freq_factor"),
                high_freq_factor=_number(rope, "high_freq_factor"),
                original_max_positions=_count(rope, "original_max_position_embeddings"),
            )
    raise UnsupportedModel(f"rope_type: {kind!r} is not built; known: default, llama3")


def _eos_ids(config: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    """All ids that end an answer, without repetition, in the order of the files."""
    found: list[int] = []
    for source in (generation, config):
        value = source.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for token in ids:
            if not isinstance(token, int):
                raise UnsupportedModel(f"eos_token_id: {value!r} is not an id or a list of ids")
            if token not in found:
                found.append(token)
    return tuple(found)


def _count(config: Mapping[str, Any], key: str, *, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UnsupportedModel(
            f"{key}: expected a positive integer in config.json, found {value!r}"
        )
    return value


def _number(config: Mapping[str, Any], key: str, *, default: float | None = None) -> float:
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise UnsupportedModel(f"{key}: expected a positive number in config.json, found {value!r}")
    return float(value)
