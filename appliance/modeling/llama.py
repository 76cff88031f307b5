"""Llama: RMSNorm, rotary embeddings, grouped-query attention, SwiGLU. The plainest of the families.

The tensor names below are the common stock; the other families add to them.
"""

from collections.abc import Iterator

from appliance.core.model_shape import ModelShape
from appliance.modeling.sources import Source, stacked, whole


def sources(shape: ModelShape) -> Iterator[Source]:
    """Every checkpoint tensor of a Llama model and its place in the slab."""
    yield whole("model.embed_tokens.weight", "embed", shape.vocab_size, shape.hidden)
    for layer in range(shape.num_layers):
        yield from _layer(shape, name=f"model.layers.{layer}.", target=f"layers.{layer}.")
    yield whole("model.norm.weight", "norm", shape.hidden)
    if not shape.tied:
        yield whole("lm_head.weight", "lm_head", shape.vocab_size, shape.hidden)


def _layer(shape: ModelShape, *, name: str, target: str) -> Iterator[Source]:
    query_rows = shape.num_heads * shape.head_dim
    kv_rows = shape.num_kv_heads * shape.head_dim
    hidden = (shape.hidden,)
    yield whole(name + "input_layernorm.weight", target + "attn_norm", shape.hidden)
    yield from stacked(
        target + "qkv",
        (name + "self_attn.q_proj.weight", query_rows, hidden),
        (name + "self_attn.k_proj.weight", kv_rows, hidden),
        (name + "self_attn.v_proj.weight", kv_rows, hidden),
    )
    if shape.qkv_bias:
        yield from stacked(
            target + "qkv_bias",
            (name + "self_attn.q_proj.bias", query_rows, ()),
            (name + "self_attn.k_proj.bias", kv_rows, ()),
            (name + "self_attn.v_proj.bias", kv_rows, ()),
        )
    yield whole(name + "self_attn.o_proj.weight", target + "o", shape.hidden, query_rows)
    if shape.output_bias:
        yield whole(name + "self_attn.o_proj.bias", target + "o_bias", shape.hidden)
    yield whole(name + "post_attention_layernorm.weight", target + "mlp_norm", shape.hidden)
    yield from stacked(
        target + "gate_up",
        (name + "mlp.gate_proj.weight", shape.ff, hidden),
        (name + "mlp.up_proj.weight", shape.ff, hidden),
    )
    yield whole(name + "mlp.down_proj.weight", target + "down", shape.hidden, shape.ff)
