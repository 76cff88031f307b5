"""What two workers say to each other while the KV of a sequence moves, and what the copy needs.

The *target* of a move pulls; the *source* only says what is ready. Over the doorbell between the
two, without the server::

    target                                   source
      Asked(num_blocks, room)  ----------->    room is reserved; these blocks are there already
      <----------------------  Offered(first, blocks, ...)   as blocks become complete
      Taken(num_blocks, room)  ----------->    copied and verified; there is room for so many
      <----------------------  Offered(final=True)   stopped; the rest, and what was emitted
    or, at any time
      <----------------------  Withdrawn(reason)     it ended here, was preempted, or goes on here
      Dropped(reason)    ----------------->    the target gives up

Blocks are named by number in the source's pool, each with the generation that it had when it was
offered; whoever copies a block looks at the generation again *afterwards*. A message of a move
that is over is ignored.

Copies themselves are made by the shell: the Batcher hands out a `CopyJob` and hears a `CopyDone`.
"""

from appliance.core.types import BlockHash, BlockId, MoveId, Record, RequestId, Tagged, WorkerId


class Asked(Tagged, frozen=True, kw_only=True):
    """`room` blocks are reserved at the target; its cache holds the first `num_blocks` already.
    The source does not stop before all that it has fits into the room."""

    move: MoveId
    num_blocks: int
    room: int


class Offered(Tagged, frozen=True, kw_only=True):
    """Blocks `first ..` of the sequence can be copied: `blocks[i]`, at `generations[i]`.

    `num_tokens` tokens of KV are in place, counted from the first of the sequence. With `final`
    the source has stopped: the last block may be partly filled, and the payload beside the message
    is the little-endian int32 ids of all tokens emitted so far, of which there are `num_emitted`;
    `stopped_at` is when. `first_token_at` is when token number `emitted_before` (0 is the first of
    all) came, from which its budgets are counted. `checksums` (test mode) are of whole blocks, in
    order; empty otherwise."""

    move: MoveId
    first: int
    blocks: tuple[BlockId, ...]
    generations: tuple[int, ...]
    num_tokens: int
    final: bool = False
    num_emitted: int = 0
    cached_tokens: int = 0
    stopped_at: float = 0.0
    first_token_at: float | None = None
    emitted_before: int = 0
    checksums: tuple[int, ...] = ()


class Taken(Tagged, frozen=True, kw_only=True):
    """The first `num_blocks` blocks of the sequence are at the target, where there is room for
    `room` by now."""

    move: MoveId
    num_blocks: int
    room: int


class Withdrawn(Tagged, frozen=True, kw_only=True):
    """The source ends the move: the sequence ended, was preempted, or goes on there."""

    move: MoveId
    reason: str


class Dropped(Tagged, frozen=True, kw_only=True):
    """The target ends the move."""

    move: MoveId
    reason: str


PeerMessage = Asked | Offered | Taken | Withdrawn | Dropped


class CopyJob(Record, frozen=True, kw_only=True):
    """Copy block `sources[i]` of `peer`'s pool over block `targets[i]` of ours, and look afterwards
    whether each source block still has `generations[i]`.

    `slack`: seconds until the sequence's next token is due (None: no target); smaller goes
    first."""

    move: MoveId
    peer: WorkerId
    sources: tuple[BlockId, ...]
    targets: tuple[BlockId, ...]
    generations: tuple[int, ...]
    checksums: tuple[int, ...] = ()
    slack: float | None = None


class CopyDone(Record, frozen=True, kw_only=True):
    """What came of a `CopyJob`; jobs of one move end in their order. `failed`: why nothing of it
    may be used; empty when all is well."""

    move: MoveId
    num_bytes: int
    seconds: float
    path: str
    failed: str = ""


class FetchJob(Record, frozen=True, kw_only=True):
    """Find blocks of these contents in `peer`'s cache (its index is shared memory) and copy as many
    leading ones as are there over `targets`; content and generation are checked after the copy.
    Nobody at the peer takes part, so it may be busy, or dead."""

    request_id: RequestId
    peer: WorkerId
    hashes: tuple[BlockHash, ...]
    targets: tuple[BlockId, ...]


class FetchDone(Record, frozen=True, kw_only=True):
    """The first `num_blocks` blocks of the job are in place."""

    request_id: RequestId
    num_blocks: int
    num_bytes: int
    seconds: float
    path: str
    reason: str = ""
    """Why not all of them; empty when they are."""


class IndexChanges(Record, frozen=True, kw_only=True):
    """What the shared index of a pool must say *before* the next step runs: blocks taken for new
    content (with their new generation; their name is void), then blocks that got a name."""

    taken: tuple[tuple[BlockId, int], ...]
    named: tuple[tuple[BlockId, BlockHash], ...]


class Inherited(Record, frozen=True, kw_only=True):
    """What a predecessor left in a pool, by block: generations, and names (0: none)."""

    generations: tuple[int, ...]
    names: tuple[BlockHash, ...]
