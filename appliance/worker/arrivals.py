"""Sequences that are coming from other workers: all that is known of them before they are here.

What a sequence needs beside its KV (text, block names, penalties, grammar) is a function of its
token ids. Those that are known when the move is ordered are replayed then; the few that the source
emits afterwards come with its last offer and are added while the last blocks are copied. So when
the last block lands nothing is left to rebuild, and the text goes on exactly where the source's
ended: what that one kept back is kept back here.
"""

from array import array

import msgspec

from appliance.core.payload import SequenceState
from appliance.core.types import BlockHash, MoveId, RequestId, WorkerId
from appliance.worker.engine import Engine
from appliance.worker.sequence_state import ServedSequence
from appliance.worker.transfer import PeerPool


class Arrival:
    """One sequence under way to this worker."""

    __slots__ = ("_state", "is_known", "pool", "request_id", "served", "source")

    def __init__(
        self, request_id: RequestId, source: WorkerId, state: SequenceState, served: ServedSequence
    ) -> None:
        """`served` has replayed what `state` says was emitted."""
        self.request_id = request_id
        self.source = source
        self.served = served
        self.pool: PeerPool | None = None
        """The pool of the incarnation that makes the offers, whatever comes after it."""
        self.is_known = False
        """The engine has it."""
        self._state = state

    def complete(self, emitted: bytes, engine: Engine) -> tuple[BlockHash, ...]:
        """The source has stopped after these ids (little-endian int32). Gives the sequence to the
        engine; returns the names of all full blocks of known tokens. Raises `ValueError` when they
        do not go on from what was known."""
        known = self._state.emitted
        if len(emitted) % 4 or not emitted.startswith(known):
            raise ValueError(
                f"the ids beside the last offer ({len(emitted)} bytes) do not go on from the "
                f"{len(known) // 4} tokens that the node knew of"
            )
        served, names = self.served, list[BlockHash]()
        if served.names is not None:
            names.extend(served.names.names)
        for token in array("i", emitted[len(known) :]):
            served.emitted.append(token)
            served.text.push(token)
            if served.names is not None:
                names.extend(served.names.push(token))
        engine.add(self.request_id, msgspec.structs.replace(self._state, emitted=emitted))
        self.is_known = True
        return tuple(names)


class Arrivals:
    """All of one worker, by move."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._by_move: dict[MoveId, Arrival] = {}

    def expect(self, move: MoveId, arrival: Arrival) -> None:
        """A move to here was ordered."""
        self._by_move[move] = arrival

    def get(self, move: MoveId) -> Arrival | None:
        """None: no such move is under way."""
        return self._by_move.get(move)

    def take(self, move: MoveId) -> Arrival:
        """It has arrived. Raises `KeyError`."""
        return self._by_move.pop(move)

    def drop(self, move: MoveId) -> None:
        """It will not come (unknown moves are fine)."""
        arrival = self._by_move.pop(move, None)
        if arrival is not None and arrival.is_known:
            self._engine.drop(arrival.request_id)

    def drop_request(self, request_id: RequestId) -> None:
        """The request is over, whichever move brings it."""
        for move in [m for m, a in self._by_move.items() if a.request_id == request_id]:
            self.drop(move)
