"""What only the world knows of a request: how long its answer is, and what stands in its blocks.

Blocks are named as the product names them, by everything up to their end: two prompts share a name
where their prefix ids agree so far. Where no prefix id reaches, and in the answer, a block is
unlike any other.
"""

from collections.abc import Sequence

from appliance.core.types import BlockHash, FinishReason, RequestId, SeqResult

MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_TAILS = 1 << 62
"""Keeps the names of what is not shared apart from those of prefixes."""


def scatter(value: int) -> int:
    """64 well-mixed bits of any integer: the finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    z = (value * _GAMMA + _GAMMA) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


class Names:
    """Names of the blocks of all prompts. Equal ids in equal order give equal names."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._paths: dict[tuple[int, int], int] = {}
        """Number of each prefix: that of the prefix before its last id, and that id."""

    def tail(self, index: int) -> int:
        """Block `k` of the request of this index that is not shared is named this plus `k`."""
        return scatter(_TAILS + index)

    def prompt(
        self, index: int, num_tokens: int, *, prefix: Sequence[int], prefix_block_tokens: int
    ) -> tuple[BlockHash, ...]:
        """The names of all full blocks of a prompt."""
        size = self._block_tokens
        end = num_tokens // size
        names: list[int] = []
        path = 0
        for number, id_ in enumerate(prefix, 1):
            if len(names) >= end:
                break
            path = self._paths.setdefault((path, id_), len(self._paths) + 1)
            stop = min(end, number * prefix_block_tokens // size)
            names.extend(_range(scatter(path), len(names), stop))
        names.extend(_range(self.tail(index), len(names), end))
        return tuple(names)


def _range(base: int, first: int, end: int) -> Sequence[int]:
    if base + end <= MASK:
        return range(base + first, base + end)
    return [(base + block) & MASK for block in range(first, end)]


class Truth:
    """One request as it really is."""

    __slots__ = ("index", "length", "names", "prompt_tokens", "tail")

    def __init__(
        self,
        index: int,
        *,
        prompt_tokens: int,
        length: int,
        names: tuple[BlockHash, ...],
        tail: int,
    ) -> None:
        self.index = index
        self.prompt_tokens = prompt_tokens
        self.length = length
        """Tokens of the answer, if nothing cuts it off."""
        self.names = names
        self.tail = tail

    def known_names(self, num_blocks: int) -> tuple[BlockHash, ...]:
        """Names of the first blocks of prompt and answer."""
        have = len(self.names)
        if num_blocks <= have:
            return self.names if num_blocks == have else self.names[:num_blocks]
        return self.names + tuple(_range(self.tail, have, num_blocks))


class Served:
    """An answer at one worker: where it stands, and what its next token means."""

    __slots__ = ("_block_tokens", "_plain", "_truth", "emitted", "id", "next_event")

    def __init__(
        self, request_id: RequestId, truth: Truth, *, emitted: int, block_tokens: int
    ) -> None:
        """`block_tokens` 0: blocks of the answer get no names."""
        self.id = request_id
        self.emitted = emitted
        self.next_event = 0
        """The number of the token that ends the answer or fills a block."""
        self._truth = truth
        self._block_tokens = block_tokens
        self._plain = SeqResult(id=request_id, num_tokens=1)
        self._look_ahead()

    def push(self) -> SeqResult:
        """One more token."""
        self.emitted += 1
        return self._plain if self.emitted != self.next_event else self._event()

    def _event(self) -> SeqResult:
        truth, size = self._truth, self._block_tokens
        known = truth.prompt_tokens + self.emitted
        names: tuple[BlockHash, ...] = ()
        if size and known % size == 0:
            names = ((truth.tail + known // size - 1) & MASK,)
        stopped = FinishReason.STOP if self.emitted >= truth.length else None
        self._look_ahead()
        return SeqResult(id=self.id, num_tokens=1, stopped=stopped, hashes=names)

    def _look_ahead(self) -> None:
        truth, size = self._truth, self._block_tokens
        end = max(truth.length, self.emitted + 1)
        if size:
            known = truth.prompt_tokens + self.emitted
            end = min(end, (known // size + 1) * size - truth.prompt_tokens)
        self.next_event = end
