"""The table of model families: how each names its tensors. What differs in the forward pass are
switches of `ModelShape` (biases, head norms, rope scaling, tied embeddings)."""

from collections.abc import Mapping

from appliance.core.model_shape import Family
from appliance.modeling import llama, mistral, qwen2, qwen3
from appliance.modeling.sources import Sources

SOURCES: Mapping[Family, Sources] = {
    "llama": llama.sources,
    "mistral": mistral.sources,
    "qwen2": qwen2.sources,
    "qwen3": qwen3.sources,
}
