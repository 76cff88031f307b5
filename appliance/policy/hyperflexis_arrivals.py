"""HyperFlexis: what is expected to arrive, from what came lately.

Requests are told apart by their budget for the first token. The prompt tokens per second of each
kind are an exponential average over `WINDOW` seconds, so that a burst is believed in for about as
long as it takes to serve one, and a phase is noticed within some seconds."""

from collections.abc import Sequence
from math import exp

WINDOW = 3.0
"""Seconds."""
KINDS = 32
"""Budgets that are told apart; further ones count as the nearest shorter one known."""


class Arrivals:
    """Prompt tokens per second by budget for the first token."""

    def __init__(self) -> None:
        self._sums: dict[float, tuple[float, float]] = {}

    def note(self, budget: float, tokens: int, now: float) -> None:
        """A request came."""
        if budget not in self._sums and len(self._sums) >= KINDS:
            shorter = [known for known in self._sums if known <= budget]
            budget = max(shorter, default=min(self._sums))
        total, at = self._sums.get(budget, (0.0, now))
        self._sums[budget] = (total * exp((at - now) / WINDOW) + tokens, now)

    def rates(self, now: float) -> Sequence[tuple[float, float]]:
        """(budget, prompt tokens per second)."""
        return [
            (budget, total * exp((at - now) / WINDOW) / WINDOW)
            for budget, (total, at) in self._sums.items()
        ]
