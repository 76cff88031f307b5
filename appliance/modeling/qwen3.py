"""Qwen3: Llama's layers with an RMSNorm over each head of the queries and of the keys."""

from collections.abc import Iterator

from appliance.core.model_shape import ModelShape
from appliance.modeling import llama
from appliance.modeling.sources import Source, whole


def sources(shape: ModelShape) -> Iterator[Source]:
    """Every checkpoint tensor of a Qwen3 model and its place in the slab."""
    yield from llama.sources(shape)
    for layer in range(shape.num_layers):
        name, target = f"model.layers.{layer}.self_attn.", f"layers.{layer}."
        yield whole(name + "q_norm.weight", target + "q_norm", shape.head_dim)
        yield whole(name + "k_norm.weight", target + "k_norm", shape.head_dim)
