"""Why the node decided what it did about itself, as `Decided` records.

A *fall-back* (a phase served by a worker that is not meant for it) is a state and no event: it is
said once when it begins and once when it is over, however many requests it concerns."""

from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from appliance.core.asks import Decided
from appliance.core.node_state import NodeState
from appliance.core.types import WorkerId


class Audit:
    """Numbers decisions and remembers the fall-backs that last."""

    def __init__(self, state: NodeState) -> None:
        self._state = state
        self._last = 0
        self._fallbacks: dict[str, Decided] = {}

    def decide(
        self,
        kind: str,
        now: float,
        *,
        by: str,
        workers: Sequence[WorkerId],
        trigger: str,
        prediction: Mapping[str, float] | None = None,
        cost: float = 0.0,
        outcome: str = "",
    ) -> Decided:
        """Say a decision; with an empty `outcome` it is said again by `conclude`."""
        self._last += 1
        decided = Decided(
            decision=self._last,
            at=now,
            kind=kind,
            by=by,
            workers=tuple(workers),
            trigger=trigger,
            prediction=dict(prediction or {}),
            cost=cost,
            outcome=outcome,
        )
        self._state.out.append(decided)
        return decided

    def conclude(self, decided: Decided, outcome: str) -> None:
        """Say how a decision ended."""
        self._state.out.append(replace(decided, outcome=outcome))

    def fallback(self, key: str, now: float, *, workers: Sequence[WorkerId], trigger: str) -> None:
        """This fall-back happens (again). Said if it is new, or for another reason."""
        known = self._fallbacks.get(key)
        if known is not None and known.trigger == trigger:
            return
        self.over(key)
        self._fallbacks[key] = self.decide(
            "fallback", now, by="mechanism", workers=workers, trigger=trigger
        )

    def over(self, key: str) -> None:
        """This fall-back does not happen any more. Cheap when it did not."""
        decided = self._fallbacks.pop(key, None)
        if decided is not None:
            self.conclude(decided, "over")
