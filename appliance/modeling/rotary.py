"""Rotary position embeddings as two tables.

A head `x [D]` at position p becomes `x * cos[p] + swap(x) * sin[p]`, where `swap` exchanges the
halves and the table's first half of `sin` carries the minus sign. Source: Su et al. 2021 in the
half-split layout of the Hugging Face checkpoints; "llama3" stretching as in Llama 3.1's reference.
"""

import math

import torch

from appliance.core.model_shape import Llama3Scaling, ModelShape


def tables(
    shape: ModelShape, *, max_positions: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """`cos, sin [max_positions, 1, head_dim]`, computed in float32."""
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.int64).float() / shape.head_dim
    frequencies = 1.0 / (shape.rope_theta**exponents)
    if shape.rope_scaling is not None:
        frequencies = _llama3(frequencies, shape.rope_scaling)
    angles = torch.outer(torch.arange(max_positions).float(), frequencies)
    cos = torch.cat([angles.cos(), angles.cos()], -1).to(dtype)
    sin = torch.cat([-angles.sin(), angles.sin()], -1).to(dtype)
    return cos.unsqueeze(1), sin.unsqueeze(1)


def _llama3(frequencies: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    """Long waves are slowed by `factor`, short ones kept, those between blended."""
    wavelengths = 2 * math.pi / frequencies
    longest_kept = scaling.original_max_positions / scaling.high_freq_factor
    shortest_slowed = scaling.original_max_positions / scaling.low_freq_factor
    slowed = frequencies / scaling.factor
    blend = (scaling.original_max_positions / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - blend) * slowed + blend * frequencies
    between = torch.where(wavelengths > shortest_slowed, slowed, blended)
    return torch.where(wavelengths < longest_kept, frequencies, between)
