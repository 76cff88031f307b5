"""The blocks of one cache group of one worker, as numbers.

Each block is in exactly one of these places:

    free     nobody's, content forgotten            `free`
    cached   nobody's, findable by content hash     `cached`, oldest first: the next to be evicted
    held     in the table of at least one sequence  `owners[block] > 0`
    leased   in no table, pinned for a peer         `owners[block] == 0 and pins[block] > 0`

`cached` counts as free in every account: it is given away when the free list is empty. A block that
is both in a table and pinned counts as held. All operations but `drain_index` are O(1).
"""

from collections import OrderedDict

from appliance.core.host_tier import HostTier
from appliance.core.peer import IndexChanges, Inherited
from appliance.core.types import BlockHash, BlockId, CacheGroupSpec, Record

NO_CHANGES = IndexChanges(taken=(), named=())


class GroupCounts(Record, frozen=True, kw_only=True):
    """How many blocks are where. `free` includes `cached`; free + held + leased = total."""

    total: int
    free: int
    cached: int
    held: int
    leased: int


class Pool:
    """State and moves of one group's blocks; the ledger is its only caller."""

    __slots__ = (
        "block_of",
        "cached",
        "changes",
        "free",
        "generation",
        "hash_of",
        "newly_named",
        "newly_taken",
        "num_held",
        "num_leased",
        "owners",
        "pins",
        "spec",
        "tier",
        "window",
    )

    def __init__(self, spec: CacheGroupSpec, inherited: Inherited | None = None) -> None:
        """With `inherited` generations go on from there, and blocks that have a name begin as
        cached, the first one being the oldest."""
        size = spec.num_blocks
        self.spec = spec
        self.tier: HostTier | None = None
        """Where blocks go that are evicted; None: nowhere."""
        self.window = spec.window if spec.kind == "window" else None
        """Positions that a token sees, itself included; None: all."""
        self.free: list[BlockId] = list(range(size - 1, -1, -1))
        self.cached: OrderedDict[BlockId, None] = OrderedDict()
        self.owners = [0] * size
        self.pins = [0] * size
        self.hash_of: list[BlockHash | None] = [None] * size
        self.block_of: dict[BlockHash, BlockId] = {}
        """Inverse of `hash_of` where that is set: a hash names at most one block."""
        self.generation = [0] * size
        """Bumped each time a block is taken for new content; never goes back."""
        self.num_held = 0
        self.num_leased = 0
        self.changes: dict[BlockHash, bool] = {}
        """Net change of `block_of` since it was last drained: True added, False removed."""
        self.newly_taken: dict[BlockId, None] = {}
        """Blocks taken for new content since they were last drained."""
        self.newly_named: dict[BlockId, BlockHash] = {}
        """Blocks that got a name since they were last drained, and have it still."""
        if inherited is not None:
            self._inherit(inherited)

    def _inherit(self, inherited: Inherited) -> None:
        self.generation = list(inherited.generations)
        for block, content in enumerate(inherited.names):
            if not content:
                continue
            if content in self.block_of:
                self.generation[block] += 1
                self.newly_taken[block] = None
                continue
            self.hash_of[block] = content
            self.block_of[content] = block
            self.cached[block] = None
            self.changes[content] = True
        self.free = [block for block in self.free if block not in self.cached]

    @property
    def num_free(self) -> int:
        """Blocks that can be taken now, cached ones included."""
        return len(self.free) + len(self.cached)

    def counts(self) -> GroupCounts:
        """The account of this group."""
        return GroupCounts(
            total=self.spec.num_blocks,
            free=self.num_free,
            cached=len(self.cached),
            held=self.num_held,
            leased=self.num_leased,
        )

    def drain_index(self) -> IndexChanges:
        """What the shared index must say, since the last call."""
        if not self.newly_taken and not self.newly_named:
            return NO_CHANGES
        generation = self.generation
        taken = tuple([(block, generation[block]) for block in self.newly_taken])
        named = tuple(self.newly_named.items())
        self.newly_taken.clear()
        self.newly_named.clear()
        return IndexChanges(taken=taken, named=named)

    def first_needed(self, num_tokens: int) -> int:
        """Index of the first block that the token after `num_tokens` tokens can still see."""
        if self.window is None:
            return 0
        return max(0, num_tokens - self.window + 1) // self.spec.block_tokens

    def most_needed(self, num_blocks: int) -> int:
        """The most blocks that a sequence of `num_blocks` blocks must hold at once to get on."""
        if self.window is None:
            return num_blocks
        size = self.spec.block_tokens
        return min(num_blocks, (self.window + size - 2) // size + 1)

    def take(self) -> BlockId:
        """A block for new content, owned once: a free one, else the oldest cached one (which can no
        longer be found). The caller has checked `num_free`."""
        if self.free:
            block = self.free.pop()
        else:
            block, _ = self.cached.popitem(last=False)
            self._forget(block)
        self.generation[block] += 1
        self.newly_taken[block] = None
        if self.newly_named:
            self.newly_named.pop(block, None)
        self.owners[block] = 1
        self.num_held += 1
        return block

    def own(self, block: BlockId) -> None:
        """One more table holds this findable block."""
        if self.owners[block] == 0:
            if self.pins[block]:
                self.num_leased -= 1
            else:
                del self.cached[block]
            self.num_held += 1
        self.owners[block] += 1

    def disown(self, block: BlockId) -> None:
        """One table less holds this block; the last one makes it leased, cached or free."""
        self.owners[block] -= 1
        if self.owners[block] == 0:
            self.num_held -= 1
            if self.pins[block]:
                self.num_leased += 1
            else:
                self._give_back(block)

    def pin(self, block: BlockId) -> None:
        """Keep this held block after its tables are gone, until `unpin`."""
        self.pins[block] += 1

    def unpin(self, block: BlockId) -> None:
        """Undo one `pin`."""
        self.pins[block] -= 1
        if self.pins[block] == 0 and self.owners[block] == 0:
            self.num_leased -= 1
            self._give_back(block)

    def name(self, block: BlockId, content: BlockHash) -> None:
        """Make a complete block findable, unless another block of this content is (that one stays
        the findable one, this one stays private) or this one has a name already."""
        if content in self.block_of or self.hash_of[block] is not None:
            return
        self.hash_of[block] = content
        self.block_of[content] = block
        self.newly_named[block] = content
        if self.changes.pop(content, None) is None:
            self.changes[content] = True

    def _forget(self, block: BlockId) -> None:
        content = self.hash_of[block]
        if content is None:
            return
        if self.tier is not None:
            self.tier.spill(block, content)
        self.hash_of[block] = None
        del self.block_of[content]
        if self.changes.pop(content, None) is None:
            self.changes[content] = False

    def _give_back(self, block: BlockId) -> None:
        if self.hash_of[block] is None:
            self.free.append(block)
        else:
            self.cached[block] = None
