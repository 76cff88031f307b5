"""Device profiles: how long a step lasts on a device that is not here. Pure numbers.

A profile answers from four counts of a step: tokens computed, sequences sampled, pairs of (computed
token, token it attends to), and tokens whose KV is read or written. They are enough for both forms:

* `Roofline`: the longer of arithmetic and memory traffic, plus a fixed overhead for launches. These
  are labelled estimates, made from a device's measured or published rates.
* `Fitted`: a base and one coefficient per count, fitted to the steps of a real engine.

`fixed-20ms` and the like are no device at all: every step lasts that long whatever it computes, to
load the control plane at a known rate.

A paced worker keeps one fingerprint per token instead of KV state, so the pool of an 80-GB card has
some megabytes.
"""

import re
from collections.abc import Mapping
from math import exp
from statistics import NormalDist

from appliance.core.types import Record

KV_SLOT_BYTES = 8
"""Bytes that a paced worker keeps per token."""
DEFAULT_PROFILE = "h200-8b"
_PAGE_BYTES = 4096
_FIXED = re.compile(r"fixed-(\d+(?:\.\d+)?)ms")
_FIXED_KV_TOKENS = 1 << 21


class AnswerLength(Record, frozen=True, kw_only=True):
    """Log-normal lengths of answers, in tokens."""

    median: float
    sigma: float
    longest: int

    def at(self, quantile: float) -> int:
        """The length below which this share (between 0 and 1, exclusive) of the answers stays."""
        length = self.median * exp(self.sigma * NormalDist().inv_cdf(quantile))
        return max(1, min(self.longest, round(length)))


class Device(Record, frozen=True, kw_only=True):
    """What every profile says of a device with a model on it."""

    name: str
    note: str
    """Where the numbers come from, for the start-up plan."""
    kv_tokens: int
    """Tokens whose KV fits beside the weights."""
    answers: AnswerLength


class Roofline(Device, frozen=True, kw_only=True):
    """max(arithmetic / rate, bytes / bandwidth) + overhead."""

    flops_per_token: float
    """Of all layers, without attention and output projection."""
    flops_per_sample: float
    """Of the output projection."""
    flops_per_pair: float
    """Of attention, for one pair of tokens over all layers."""
    flops_per_second: float
    """What large matrix products reach."""
    weight_bytes: float
    """Read once in each step."""
    kv_bytes: float
    """Per token."""
    bytes_per_second: float
    overhead: float
    """Launches, sampling, and what the roof leaves out; seconds."""

    def step_seconds(
        self, *, num_tokens: int, num_samples: int, num_pairs: int, num_kv_tokens: int
    ) -> float:
        """Duration of a step with these counts (see the module's text)."""
        flops = (
            self.flops_per_token * num_tokens
            + self.flops_per_sample * num_samples
            + self.flops_per_pair * num_pairs
        )
        traffic = self.weight_bytes + self.kv_bytes * num_kv_tokens
        return max(flops / self.flops_per_second, traffic / self.bytes_per_second) + self.overhead


class Fitted(Device, frozen=True, kw_only=True):
    """base + one coefficient per count, in seconds."""

    base: float
    per_token: float
    per_sample: float
    per_pair: float
    per_kv_token: float

    def step_seconds(
        self, *, num_tokens: int, num_samples: int, num_pairs: int, num_kv_tokens: int
    ) -> float:
        """Duration of a step with these counts (see the module's text)."""
        return (
            self.base
            + self.per_token * num_tokens
            + self.per_sample * num_samples
            + self.per_pair * num_pairs
            + self.per_kv_token * num_kv_tokens
        )


Profile = Roofline | Fitted


def _hopper_8b(name: str, note: str, *, bytes_per_second: float, memory_bytes: float) -> Roofline:
    """An 8B model in bf16 (36 layers of 4096, 32 query and 8 KV heads of 128, feed-forward 12288,
    vocabulary 151936) on one card; 790 TFLOP/s of dense bf16, of which serving reaches 60 %."""
    layers, hidden, heads, kv_heads, head_dim, ff, vocab = 36, 4096, 32, 8, 128, 12288, 151936
    per_layer = hidden * head_dim * (2 * heads + 2 * kv_heads) + 3 * hidden * ff
    head = vocab * hidden
    kv_bytes = 2.0 * layers * kv_heads * head_dim * 2
    weights_in_memory = 2.0 * (layers * per_layer + 2 * head)
    activations = 4e9
    return Roofline(
        name=name,
        note=note,
        kv_tokens=int((0.9 * memory_bytes - weights_in_memory - activations) / kv_bytes),
        answers=AnswerLength(median=180.0, sigma=0.8, longest=4096),
        flops_per_token=2.0 * layers * per_layer,
        flops_per_sample=2.0 * head,
        flops_per_pair=4.0 * layers * heads * head_dim,
        flops_per_second=790e12 * 0.6,
        weight_bytes=2.0 * (layers * per_layer + head),
        kv_bytes=kv_bytes,
        bytes_per_second=bytes_per_second,
        overhead=0.9e-3,
    )


def _table() -> dict[str, Profile]:
    profiles: list[Profile] = [
        _hopper_8b(
            "h200-8b",
            "estimate: roofline of an 8B model in bf16 on an H200 at 4.3 TB/s",
            bytes_per_second=4.3e12,
            memory_bytes=139 * 2.0**30,
        ),
        _hopper_8b(
            "h100-8b",
            "estimate: roofline of an 8B model in bf16 on an H100 at 90 % of 3.35 TB/s",
            bytes_per_second=0.9 * 3.35e12,
            memory_bytes=79 * 2.0**30,
        ),
        Fitted(
            name="cpu",
            note="fitted to the bundled model in float32 on one core (tools/fit_cpu_profile.py)",
            kv_tokens=65536,
            answers=AnswerLength(median=24.0, sigma=0.6, longest=512),
            base=1.9e-3,
            per_token=2.9e-5,
            per_sample=2.7e-5,  # 1.5e-5 in the engine, the rest in the step loop
            per_pair=7.5e-8,
            per_kv_token=3.8e-7,
        ),
    ]
    return {profile.name: profile for profile in profiles}


PROFILES: Mapping[str, Profile] = _table()


def device_profile(name: str) -> Profile:
    """The profile of that name. Raises `ValueError` listing the known ones."""
    if name in PROFILES:
        return PROFILES[name]
    if (match := _FIXED.fullmatch(name)) is not None and float(match[1]) > 0:
        return _fixed(name, milliseconds=float(match[1]))
    known = ", ".join(sorted(PROFILES))
    raise ValueError(f"unknown device profile {name!r}; use one of: {known}, or fixed-20ms")


def _fixed(name: str, *, milliseconds: float) -> Fitted:
    return Fitted(
        name=name,
        note=f"synthetic: every step lasts {milliseconds:g} ms, whatever is in it",
        kv_tokens=_FIXED_KV_TOKENS,
        answers=AnswerLength(median=180.0, sigma=0.8, longest=4096),
        base=milliseconds / 1000,
        per_token=0.0,
        per_sample=0.0,
        per_pair=0.0,
        per_kv_token=0.0,
    )


def paced_kv_slab_bytes(*, num_blocks: int, block_tokens: int) -> int:
    """Size of a paced worker's KV slab: `num_blocks` usable blocks and one scratch block, in whole
    pages."""
    size = (num_blocks + 1) * block_tokens * KV_SLOT_BYTES
    return -(-size // _PAGE_BYTES) * _PAGE_BYTES
