"""The forward pass shared by all families: embeddings, layers, logits.

One step is a flat list of tokens of many sequences; which token belongs to whom is known only to
the attention back end. Everything here works row by row, and every operation was chosen so that a
row's bits do not depend on the other rows: products through `linear`, norms as per-row reductions,
nonlinear functions over views whose innermost dimension is one row (torch's vectorised kernels
treat the tail of that dimension differently, so it must not move with the batch).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch.nn import functional

from appliance.core.model_shape import ModelShape
from appliance.modeling import rotary
from appliance.modeling.linear import Linear, LinearFactory, padded_rows


class Attention(Protocol):
    """Keeps the KV state of a step's tokens and attends to that of their sequences."""

    def __call__(self, layer: int, heads: torch.Tensor) -> torch.Tensor:
        """`heads [M, heads + 2 kv_heads, head_dim]` (rotated q and k, then v) -> `[M, heads
        head_dim]`.

        Rows past the step's tokens are padding: no KV is kept for them, any finite value is
        returned."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Weights of one layer, ready to be multiplied with."""

    attn_norm: torch.Tensor
    qkv: Linear
    qk_norm: torch.Tensor | None
    """`[heads + kv_heads, head_dim]`: the scale of each query and key head."""
    output: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear


class Decoder:
    """A decoder-only transformer over flat token rows. Not thread-safe; call under inference
    mode."""

    def __init__(
        self,
        shape: ModelShape,
        weights: Mapping[str, torch.Tensor],
        *,
        factory: LinearFactory,
        max_positions: int,
        max_rows: int,
        max_sampled: int,
    ) -> None:
        """`max_rows` and `max_sampled` bound the usual rows of a step and of its logits (more work
        too)."""
        self.shape = shape
        self.embed = weights["embed"]
        layers = [
            _layer(shape, weights, prefix=f"layers.{i}.", factory=factory, max_rows=max_rows)
            for i in range(shape.num_layers)
        ]
        self.rows = _common_rows(layers)
        self.layers = [_restricted(layer, self.rows) for layer in layers]
        self.norm = weights["norm"]
        table = self.embed if shape.tied else weights["lm_head"]
        self.lm_head = factory.build(table, None, max_rows=max_sampled)
        self.cos, self.sin = rotary.tables(
            shape, max_positions=max_positions, dtype=self.embed.dtype
        )

    @property
    def invariant(self) -> bool:
        """Whether the bits of a row were proven not to depend on the other rows of its products."""
        return bool(self.rows and self.lm_head.rows)

    def padded_rows(self, count: int) -> int:
        """How many rows `hidden` must be given for `count` tokens."""
        return padded_rows(self.rows, count)

    def hidden(
        self, ids: torch.Tensor, positions: torch.Tensor, *, attention: Attention
    ) -> torch.Tensor:
        """Final hidden states `[M, hidden]` of `ids [M]` at `positions [M]` (int64); M as
        `padded_rows`."""
        cos = self.cos.index_select(0, positions)
        sin = self.sin.index_select(0, positions)
        x = self.embed.index_select(0, ids)
        for index, layer in enumerate(self.layers):
            heads = self._heads(layer, x, cos=cos, sin=sin)
            x = x + layer.output(attention(index, heads))
            x = x + self._feed_forward(layer, x)
        return x

    def logits(self, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Float32 logits `[R, vocab]` of the chosen `rows [R]` of `hidden`."""
        missing = padded_rows(self.lm_head.rows, rows.shape[0]) - rows.shape[0]
        x = hidden.index_select(0, functional.pad(rows, (0, missing)))
        x = functional.rms_norm(x, (self.shape.hidden,), self.norm, self.shape.norm_eps)
        return self.lm_head(x)[: rows.shape[0]].float()

    def _heads(
        self, layer: Layer, x: torch.Tensor, *, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        shape = self.shape
        normed = functional.rms_norm(x, (shape.hidden,), layer.attn_norm, shape.norm_eps)
        num_rotated = shape.num_heads + shape.num_kv_heads
        heads = layer.qkv(normed).view(-1, num_rotated + shape.num_kv_heads, shape.head_dim)
        rotated = heads[:, :num_rotated]
        if layer.qk_norm is not None:
            rotated.copy_(
                functional.rms_norm(rotated, (shape.head_dim,), None, shape.norm_eps)
                * layer.qk_norm
            )
        swapped = rotated.roll(shape.head_dim // 2, -1).mul_(sin)
        rotated.mul_(cos).add_(swapped)
        return heads

    def _feed_forward(self, layer: Layer, x: torch.Tensor) -> torch.Tensor:
        shape = self.shape
        normed = functional.rms_norm(x, (shape.hidden,), layer.mlp_norm, shape.norm_eps)
        return layer.down(_gated(*layer.gate_up(normed).split(shape.ff, -1)))


def _gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up`, both views into rows of one product; `gate` is overwritten.

    In float32 as `gate * up / (1 + 2 ** (-gate log2 e))`: torch's exp2 is several times faster on
    CPU than its silu, and on a view with gaps it treats every row alike."""
    if gate.dtype != torch.float32:
        return functional.silu(gate).mul_(up)
    product = gate * up
    return product.div_(gate.mul_(-math.log2(math.e)).exp2_().add_(1))


def _layer(
    shape: ModelShape,
    weights: Mapping[str, torch.Tensor],
    *,
    prefix: str,
    factory: LinearFactory,
    max_rows: int,
) -> Layer:
    def linear(name: str) -> Linear:
        return factory.build(
            weights[prefix + name], weights.get(f"{prefix}{name}_bias"), max_rows=max_rows
        )

    qk_norm = None
    if shape.qk_norm:
        parts = [weights[prefix + "q_norm"]] * shape.num_heads
        parts += [weights[prefix + "k_norm"]] * shape.num_kv_heads
        qk_norm = torch.stack(parts)
    return Layer(
        attn_norm=weights[prefix + "attn_norm"],
        qkv=linear("qkv"),
        qk_norm=qk_norm,
        output=linear("o"),
        mlp_norm=weights[prefix + "mlp_norm"],
        gate_up=linear("gate_up"),
        down=linear("down"),
    )


def _common_rows(layers: Sequence[Layer]) -> tuple[int, ...]:
    """The M that every product of the layers allows; empty when one of them promises nothing."""
    allowed = {linear.rows for x in layers for linear in (x.qkv, x.output, x.gate_up, x.down)}
    return tuple(sorted(set.intersection(*map(set, allowed))))


def _restricted(layer: Layer, rows: tuple[int, ...]) -> Layer:
    """The layer with all products held to the same M, so that a step is padded once."""
    return replace(
        layer,
        qkv=replace(layer.qkv, rows=rows),
        output=replace(layer.output, rows=rows),
        gate_up=replace(layer.gate_up, rows=rows),
        down=replace(layer.down, rows=rows),
    )
