"""What a Batcher has to say to its peers, and what they said too early.

The node tells both ends of a move over two sockets, and the ends talk over a third: so the first
word of a peer may come before the command it belongs to. It is kept until the command comes, for a
while: what belongs to a move that is over is never asked for.
"""

from collections import OrderedDict

from appliance.core.peer import PeerMessage
from appliance.core.types import MoveId, WorkerId

_MOST_EARLY = 1024
"""Messages that are kept; one move has at most two of them."""
_KEPT_SECONDS = 60.0


class PeerMail:
    """Outgoing messages in order, and early ones by move."""

    def __init__(self) -> None:
        self._out: list[tuple[WorkerId, PeerMessage]] = []
        self._early: OrderedDict[tuple[MoveId, WorkerId, int], tuple[float, PeerMessage]] = (
            OrderedDict()
        )
        self._number = 0

    def say(self, peer: WorkerId, message: PeerMessage) -> None:
        """Send this when the shell asks."""
        self._out.append((peer, message))

    def drain(self) -> list[tuple[WorkerId, PeerMessage]]:
        """What was said since the last call."""
        if not self._out:
            return []
        said, self._out = self._out, []
        return said

    def keep(self, peer: WorkerId, message: PeerMessage, now: float) -> None:
        """A message of a move that is not known (yet)."""
        early = self._early
        while early:
            kept_at, _ = next(iter(early.values()))
            if len(early) < _MOST_EARLY and now - kept_at < _KEPT_SECONDS:
                break
            early.popitem(last=False)
        self._number += 1
        early[message.move, peer, self._number] = (now, message)

    def early(self, peer: WorkerId, move: MoveId) -> list[PeerMessage]:
        """What this peer has said of a move that becomes known now."""
        keys = [key for key in self._early if key[:2] == (move, peer)]
        return [self._early.pop(key)[1] for key in keys]

    def forget(self, peer: WorkerId) -> None:
        """The peer is gone: what it said early, and what it was to be told, means nothing."""
        for key in [key for key in self._early if key[1] == peer]:
            del self._early[key]
        self._out = [(to, message) for to, message in self._out if to != peer]
