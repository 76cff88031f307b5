"""How long prompts and answers are: shipped quantile tables, log-normal, or fixed.

A table keeps the joint distribution of a trace in a few hundred numbers. The quantile function of
the prompt is given at the probabilities `levels`; the prompts are cut into equally likely bins, and
each bin has the quantile function of *its* answers at the same kind of levels. Drawing u, v
uniformly: the prompt is the u-quantile, the answer the v-quantile of the bin that u falls into,
linear between the levels. Thus the correlation of prompt and answer survives.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from importlib.resources import files
from math import exp
from statistics import NormalDist

import msgspec

from appliance.core.types import Record
from appliance.workload.draws import Draws


class LengthTable(Record, frozen=True, kw_only=True):
    """Joint quantiles of one trace's lengths, in tokens, with its credit and licence."""

    name: str
    credit: str
    licence: str
    source: str
    rows: int
    prompt_mean: float
    output_mean: float
    prompt_levels: tuple[float, ...]
    prompt: tuple[int, ...]
    output_levels: tuple[float, ...]
    output: tuple[tuple[int, ...], ...]
    """One quantile function per prompt bin; the bins are equally likely, shortest prompts first."""

    def at(self, u: float, v: float) -> tuple[int, int]:
        """(prompt, output) tokens for two uniform numbers."""
        prompt = _interpolated(self.prompt_levels, self.prompt, u)
        row = self.output[min(int(u * len(self.output)), len(self.output) - 1)]
        return max(1, round(prompt)), max(1, round(_interpolated(self.output_levels, row, v)))


class LognormalLengths(Record, frozen=True, kw_only=True):
    """Independent log-normal lengths."""

    prompt_median: float
    prompt_sigma: float
    output_median: float
    output_sigma: float

    def at(self, u: float, v: float) -> tuple[int, int]:
        """(prompt, output) tokens for two uniform numbers."""
        normal = NormalDist()
        prompt = self.prompt_median * exp(self.prompt_sigma * normal.inv_cdf(u))
        output = self.output_median * exp(self.output_sigma * normal.inv_cdf(v))
        return max(1, round(prompt)), max(1, round(output))


class FixedLengths(Record, frozen=True, kw_only=True):
    """Every request alike."""

    prompt: int
    output: int

    def at(self, u: float, v: float) -> tuple[int, int]:  # noqa: ARG002 - one signature for all
        """(prompt, output) tokens, whatever is drawn."""
        return self.prompt, self.output


Lengths = LengthTable | LognormalLengths | FixedLengths


def length_tables() -> Mapping[str, LengthTable]:
    """The tables that come along, by name."""
    data = files("appliance.workload").joinpath("length_tables.json").read_bytes()
    return {table.name: table for table in msgspec.json.decode(data, type=list[LengthTable])}


def draw_lengths(lengths: Lengths, draws: Draws) -> tuple[int, int]:
    """(prompt, output) tokens of the next request of a class."""
    u = draws.uniform()
    return lengths.at(u, draws.uniform())


def fitted(prompt: int, output: int, *, scale: float, max_len: int) -> tuple[int, int]:
    """Lengths times `scale` (at least 1 each), then bounded to `max_len` together (0: no bound):
    the answer to at most half of it, the prompt to what is left."""
    prompt = max(1, round(prompt * scale))
    output = max(1, round(output * scale))
    if max_len and prompt + output > max_len:
        output = max(1, min(output, max_len // 2))
        prompt = max(1, min(prompt, max_len - output))
    return prompt, output


def _interpolated(levels: Sequence[float], values: Sequence[int], level: float) -> float:
    """The piecewise linear quantile function through (levels, values) at `level`."""
    right = min(max(bisect_right(levels, level), 1), len(levels) - 1)
    low, high = levels[right - 1], levels[right]
    share = (level - low) / (high - low)
    return values[right - 1] + share * (values[right] - values[right - 1])
