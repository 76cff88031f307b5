"""Where in a checkpoint each part of a slab tensor comes from.

The slab holds fused projections (`appliance.core.model_shape.weight_tensors`); checkpoints hold
them one by one. A family file lists the `Source` of every part; the loader copies row ranges.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from appliance.core.model_shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Source:
    """Rows `row .. row + shape[0]` of slab tensor `target` are checkpoint tensor `name`."""

    name: str
    target: str
    row: int
    shape: tuple[int, ...]


Sources = Callable[[ModelShape], Iterator[Source]]


def whole(name: str, target: str, *shape: int) -> Source:
    """A tensor that is stored as it is."""
    return Source(name=name, target=target, row=0, shape=shape)


def stacked(target: str, *parts: tuple[str, int, tuple[int, ...]]) -> Iterator[Source]:
    """Tensors `(name, rows, rest of the shape)` laid one under the other."""
    row = 0
    for name, rows, rest in parts:
        yield Source(name=name, target=target, row=row, shape=(rows, *rest))
        row += rows
