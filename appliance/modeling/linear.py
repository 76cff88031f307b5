"""Matrix products whose rows do not notice each other.

A float32 row must come out bit for bit the same whatever the number of rows beside it (R12), but
BLAS libraries pick kernels by the number of rows M: MKL's products with M below 4 differ from the
rest in the last bits, oneDNN's at M = 1 for deep weights. Nothing documents this, so it is
*probed*: for each weight shape, every M of a fixed ladder is compared with one reference M, and
only those that give equal bits are allowed. A step is padded up to the next allowed M, and no
product runs with an M that was not probed; more rows than the largest allowed M are multiplied in
slices.

Two paths exist. *packed*: oneDNN with the weight re-ordered once (a private operation of torch that
its compiler uses; faster at all M above 3). *plain*: `F.linear`. The choice must be the same in
every worker of a node, or a sequence that moves would change its bits; so it depends on probed
equality only, never on a stopwatch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional

Product = Callable[[torch.Tensor], torch.Tensor]

REFERENCE_ROWS = 64
"""All weights are compared at this M, so the sets of allowed M always share an element."""
MAX_PROBE_FLOPS = 2_000_000_000
"""An M beyond REFERENCE_ROWS is probed only up to this many operations: start-up stays short."""
TOLERANCE = 1e-5
"""Largest difference, relative to the largest output, between packed and plain products in
float32."""


def row_ladder(max_rows: int) -> tuple[int, ...]:
    """The row counts a step may be padded to: 1, 2, 4, 8, then four per octave up to `max_rows`."""
    ladder = [1, 2, 4, 8, 12]
    step = 4
    while ladder[-1] < max(max_rows, REFERENCE_ROWS):
        if ladder[-1] >= 8 * step:
            step *= 2
        ladder.append(ladder[-1] + step)
    return tuple(ladder)


@dataclass(frozen=True)
class Path:
    """How weights of one shape are multiplied. `rows` are the allowed M, ascending; empty: no M is
    proven, any is used and nothing is promised."""

    name: str
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Linear:
    """`y [M, N] = x [M, K] W^T + b` for M as given by `padded_rows(rows, ...)`: allowed, or a
    multiple of the largest allowed M plus one that is allowed. Empty `rows`: any M, no promise."""

    product: Product
    rows: tuple[int, ...]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        limit = self.rows[-1] if self.rows else x.shape[0]
        if x.shape[0] <= limit:
            return self.product(x)
        return torch.cat([self.product(part) for part in x.split(limit)])


def padded_rows(rows: Sequence[int], count: int) -> int:
    """The smallest number of rows >= `count` that `Linear` accepts, given the allowed M."""
    if not rows:
        return count
    whole, rest = divmod(count, rows[-1])
    if not rest:
        return count
    return whole * rows[-1] + next(allowed for allowed in rows if allowed >= rest)


@dataclass
class LinearFactory:
    """Builds products for weights; probes once per shape and keeps the findings.

    Not `invariant` (bfloat16): nothing is promised, and only the packed path's correctness is
    checked.
    """

    invariant: bool = True
    paths: dict[tuple[int, int, bool, int], Path] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def build(self, weight: torch.Tensor, bias: torch.Tensor | None, *, max_rows: int) -> Linear:
        """The product for `weight [N, K]` and `bias [N]`; `max_rows` bounds the M worth probing."""
        key = (weight.shape[0], weight.shape[1], bias is not None, max_rows)
        packed = _packed(weight, bias)
        plain = _plain(weight, bias)
        if key not in self.paths:
            self.paths[key] = self._choose(packed, plain, weight=weight, max_rows=max_rows)
        path = self.paths[key]
        product = packed if path.name == "packed" and packed is not None else plain
        return Linear(product=product, rows=path.rows)

    def _choose(
        self, packed: Product | None, plain: Product, *, weight: torch.Tensor, max_rows: int
    ) -> Path:
        name = f"{tuple(weight.shape)}"
        candidates = [("plain", plain)]
        if packed is not None and self._agree(packed, plain, weight):
            candidates.insert(0, ("packed", packed))
        else:
            self.notes.append(f"weights {name}: packed product unavailable or off, using F.linear")
        if not self.invariant:
            return Path(candidates[0][0], ())
        for kind, product in candidates:
            if rows := probe_rows(product, weight, max_rows=max_rows):
                return Path(kind, rows)
            self.notes.append(f"weights {name}: the {kind} product's rows depend on their position")
        self.notes.append(
            f"weights {name}: no row-invariant product; token identity is not promised"
        )
        return Path(candidates[0][0], ())

    def _agree(self, packed: Product, plain: Product, weight: torch.Tensor) -> bool:
        x = _sample(5, weight)
        want, got = plain(x).float(), packed(x).float()
        tolerance = TOLERANCE if weight.dtype == torch.float32 else 2e-2
        return bool((want - got).abs().max() <= tolerance * want.abs().max().clamp(min=1e-30))


def probe_rows(product: Product, weight: torch.Tensor, *, max_rows: int) -> tuple[int, ...]:
    """The M of the ladder whose rows equal, bit for bit, those computed REFERENCE_ROWS at a time.

    Empty when even at that M a row's bits depend on where it stands."""
    n, k = weight.shape
    affordable = max(REFERENCE_ROWS, MAX_PROBE_FLOPS // (2 * n * k))
    ladder = [m for m in row_ladder(max_rows) if m <= affordable]
    offset = 3
    x = _sample(-(-(ladder[-1] + offset) // REFERENCE_ROWS) * REFERENCE_ROWS, weight)
    want = torch.cat([product(part) for part in x.split(REFERENCE_ROWS)])
    rolled = product(x[:REFERENCE_ROWS].roll(offset, 0))
    if not torch.equal(rolled, want[:REFERENCE_ROWS].roll(offset, 0)):
        return ()
    window = slice(offset, None)
    return tuple(
        m for m in ladder if torch.equal(product(x[window][:m].contiguous()), want[window][:m])
    )


def _sample(rows: int, weight: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(20)
    return torch.randn(rows, weight.shape[1], generator=generator).to(weight.dtype)


def _plain(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    def product(x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, weight, bias)

    return product


def _packed(weight: torch.Tensor, bias: torch.Tensor | None) -> Product | None:
    """The oneDNN product over a re-ordered private copy of the weight; None where torch has
    none."""
    try:
        reorder = torch.ops.mkldnn._reorder_linear_weight
        pointwise = torch.ops.mkldnn._linear_pointwise.default
        copy = reorder(weight)
    except (AttributeError, RuntimeError):
        return None

    def product(x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = pointwise(x, copy, bias, "none", [], "")
        return out

    return product
