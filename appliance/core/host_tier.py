"""HostTier: what a worker's pool had to give up, kept in host memory, as numbers.

The blocks of a pool that nobody owns are evicted when somebody needs them. With a tier each evicted
block that has a name is *spilled*: copied into a slot of the tier before anything overwrites it. A
later prompt fetches it from there as it would from a peer (`core/fetching.py`). A slot keeps its
content after it was fetched, so a block that is evicted again need not be copied again.

The tier has a fixed number of slots and gives away the least recently used one; of one chain the
last block goes first, as in the pool. What a fetch is about to read is *held*: it is not given
away, and when all slots are held an evicted block is simply lost.

The shell copies what `drain_spills` says, in order, before the index of the pool is written, before
a copy into the pool begins and before the next step runs. Slots have generations, as the blocks of
a pool have, so a reader can tell whether what it copied was replaced meanwhile.
"""

from collections import OrderedDict
from collections.abc import Sequence

from appliance.core.types import BlockHash, BlockId, Record


class Spill(Record, frozen=True, kw_only=True):
    """Copy block `block` of the pool over slot `slot`, which then holds `content`."""

    block: BlockId
    slot: BlockId
    content: BlockHash
    generation: int


class HostTier:
    """The slots of one worker's tier. All operations are O(1) but for the number of slots held and
    the length of their arguments."""

    def __init__(self, num_blocks: int) -> None:
        """Raises `ValueError` for a tier of no blocks."""
        if num_blocks < 1:
            raise ValueError(f"a host tier needs at least 1 block, got {num_blocks}")
        self.num_blocks = num_blocks
        self.slot_of: OrderedDict[BlockHash, BlockId] = OrderedDict()
        """What is kept and where; the least recently used first."""
        self.held: dict[BlockHash, int] = {}
        """Contents that are being read, by how many."""
        self._free = list(range(num_blocks - 1, -1, -1))
        self._generation = [0] * num_blocks
        self._spills: dict[BlockId, Spill] = {}
        self._changes: dict[BlockHash, bool] = {}

    def spill(self, block: BlockId, content: BlockHash) -> BlockId | None:
        """The pool gives this block to other content: keep it, if it is not kept already. The slot;
        None when all slots are held."""
        slot = self.slot_of.get(content)
        if slot is not None:
            self.slot_of.move_to_end(content)
            return slot
        slot = self._free.pop() if self._free else self._evict()
        if slot is None:
            return None
        self.slot_of[content] = slot
        self._generation[slot] += 1
        self._spills.pop(slot, None)
        self._spills[slot] = Spill(
            block=block, slot=slot, content=content, generation=self._generation[slot]
        )
        self._note(content, present=True)
        return slot

    def find(self, hashes: Sequence[BlockHash]) -> int:
        """How many leading ones of `hashes` are kept."""
        slot_of = self.slot_of
        for index, content in enumerate(hashes):
            if content not in slot_of:
                return index
        return len(hashes)

    def hold(self, hashes: Sequence[BlockHash]) -> None:
        """These are about to be read: they stay until `release`, and count as just used. Raises
        `KeyError` for one that is not kept."""
        for content in reversed(hashes):
            self.slot_of.move_to_end(content)
            self.held[content] = self.held.get(content, 0) + 1

    def release(self, hashes: Sequence[BlockHash]) -> None:
        """Undo one `hold`."""
        for content in hashes:
            self.held[content] -= 1
            if not self.held[content]:
                del self.held[content]

    def drain_spills(self) -> tuple[Spill, ...]:
        """Copies to be made, since the last call; one per slot."""
        if not self._spills:
            return ()
        spills = tuple(self._spills.values())
        self._spills.clear()
        return spills

    def drain_changes(self) -> tuple[tuple[BlockHash, ...], tuple[BlockHash, ...]]:
        """What is kept now and was not at the last call, and the other way round; net."""
        if not self._changes:
            return (), ()
        added = tuple(content for content, present in self._changes.items() if present)
        removed = tuple(content for content, present in self._changes.items() if not present)
        self._changes.clear()
        return added, removed

    def _evict(self) -> BlockId | None:
        held = self.held
        for content in self.slot_of:
            if content not in held:
                self._note(content, present=False)
                return self.slot_of.pop(content)
        return None

    def _note(self, content: BlockHash, *, present: bool) -> None:
        if self._changes.pop(content, None) is None:
            self._changes[content] = present
