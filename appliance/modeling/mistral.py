"""Mistral: Llama's layers. What set it apart, the sliding window, is refused when it is in use."""

from appliance.modeling.llama import sources

__all__ = ["sources"]
