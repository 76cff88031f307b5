"""Why the node decided what it did about itself, as `Decided` records.

A *fall-back* (a phase served by a worker that is not meant for it) is a state and no event: it is
said once when it begins and once when it is over, however many requests it concerns. So are
refusals at the door (kind "turn_away"), one for each reason: they are over when nobody was refused
for `QUIET` seconds, which is found out with the next message."""

from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from appliance.core.asks import Decided
from appliance.core.messages import Reject
from appliance.core.node_state import NodeState
from appliance.core.types import ErrorKind, WorkerId

QUIET = 1.0
"""Seconds without a refusal after which refusals of a kind are over."""
OF_CLIENTS = frozenset({ErrorKind.TOO_LONG, ErrorKind.GRAMMAR})
"""What no other time and no other policy would take: no decision about the node."""


class Wave:
    """Refusals of one kind by one side, one soon after the other."""

    def __init__(self, decided: Decided) -> None:
        self.decided = decided
        self.num_refused = 0
        self.last = decided.at
        """When the newest one was."""


class Audit:
    """Numbers decisions and remembers the fall-backs that last."""

    def __init__(self, state: NodeState) -> None:
        self._state = state
        self._last = 0
        self._fallbacks: dict[str, Decided] = {}
        self._waves: dict[tuple[ErrorKind, str], Wave] = {}

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

    def turned_away(self, reject: Reject, now: float, *, by: str) -> None:
        """This request was refused at the door. Said for the first one of a wave."""
        if reject.kind in OF_CLIENTS:
            return
        wave = self._waves.get((reject.kind, by))
        if wave is None:
            words = f"{reject.kind.value}: {reject.reason}"
            decided = self.decide("turn_away", now, by=by, workers=(), trigger=words)
            wave = self._waves[reject.kind, by] = Wave(decided)
        wave.num_refused += 1
        wave.last = now

    def settle(self, now: float) -> None:
        """Conclude what is over. Cheap when nothing lasts."""
        if not self._waves:
            return
        for key, wave in list(self._waves.items()):
            if now - wave.last > QUIET:
                del self._waves[key]
                seconds = wave.last - wave.decided.at
                words = f"{wave.num_refused} refused within {seconds:.3f} s"
                self.conclude(wave.decided, words)
