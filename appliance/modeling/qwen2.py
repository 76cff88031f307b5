"""Qwen2: Llama's layers with biases on the query, key and value projections and none on the output.

Whether biases exist is a fact of the shape (`qkv_bias`, `output_bias`), so the names are Llama's.
"""

from appliance.modeling.llama import sources

__all__ = ["sources"]
