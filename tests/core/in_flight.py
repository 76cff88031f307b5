"""Watches that no plan writes a block that an unfinished plan of another sequence touches.

Steps may overlap, so what is in a step cannot be taken back."""

from collections import deque
from collections.abc import Sequence

from appliance.core.types import CacheGroupSpec, StepPlan


class InFlight:
    """Told of every plan and of every finished step, in their order."""

    def __init__(self, groups: Sequence[CacheGroupSpec]) -> None:
        self._groups = groups
        self._tables: dict[int, list[list[int]]] = {}
        self._touched: deque[dict[tuple[int, int], set[int]]] = deque()

    def planned(self, plan: StepPlan) -> None:
        touches: dict[tuple[int, int], set[int]] = {}
        for item in plan.work:
            tables = self._tables.setdefault(item.id, [[] for _ in self._groups])
            for group, (spec, blocks) in enumerate(zip(self._groups, item.new_blocks, strict=True)):
                if item.fresh:
                    tables[group] = []
                tables[group].extend(blocks)
                size = spec.block_tokens
                seen = item.start + 1 - (spec.window or item.start + 1)
                last = (item.start + item.num_tokens - 1) // size
                for index in range(max(0, seen) // size, last + 1):
                    block = tables[group][index]
                    touches.setdefault((group, block), set()).add(item.id)
                    if index >= item.start // size:
                        users = [touched.get((group, block), set()) for touched in self._touched]
                        others = set().union(*users) - {item.id}
                        assert not others, f"block {block} of {others} was taken back from a step"
        self._touched.append(touches)

    def finished(self) -> None:
        self._touched.popleft()
