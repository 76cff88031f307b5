"""Memory of toy workers that outlives them, and copies between two of them that take their time.

A slab is the pool of a worker and its index (generation and name of each block), written by its
owner only. A copy reads it token by token, at any moment, while the owner goes on; what the copier
may believe is decided afterwards by what the index says then.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from appliance.core.peer import CopyDone, CopyJob, FetchDone, FetchJob, IndexChanges, Inherited

Slot = tuple[int, int] | None


@dataclass
class Slab:
    """One worker's pool of one paged group."""

    num_blocks: int
    block_tokens: int
    slots: list[Slot] = field(default_factory=list)
    generations: list[int] = field(default_factory=list)
    names: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.slots = [None] * (self.num_blocks * self.block_tokens)
        self.generations = [0] * self.num_blocks
        self.names = [0] * self.num_blocks

    def write_index(self, changes: IndexChanges) -> None:
        for block, generation in changes.taken:
            assert generation > self.generations[block], "a generation went back"
            self.generations[block], self.names[block] = generation, 0
        for block, name in changes.named:
            self.names[block] = name

    def inherit(self) -> Inherited:
        """What a successor finds, after it has voided what nobody can find."""
        for block, name in enumerate(self.names):
            if not name:
                self.generations[block] += 1
        return Inherited(generations=tuple(self.generations), names=tuple(self.names))

    def find(self, name: int) -> int | None:
        return self.names.index(name) if name in self.names else None

    def checksum(self, block: int) -> int:
        size = self.block_tokens
        return hash(tuple(self.slots[block * size : (block + 1) * size])) & 0xFFFF


class Copy:
    """A copy job under way: `advance` copies a few tokens; the last time it looks at the index and
    is `done`."""

    def __init__(self, job: CopyJob | FetchJob, source: Slab, target: Slab) -> None:
        self.job = job
        self.source = source
        self.target = target
        self.done: CopyDone | FetchDone | None = None
        self.checksum: Callable[[int], int] | None = None
        self._steps: list[tuple[int, int]] = []
        self._begun = False
        self._found: list[tuple[int, int, int]] = []

    def advance(self, num_tokens: int, fails: str = "") -> None:
        """Copy some more. With `fails` it ends without success instead."""
        if not self._begun:
            self._begin()
        if fails:
            self._finish(fails)
            return
        for _ in range(num_tokens):
            if not self._steps:
                break
            source, target = self._steps.pop()
            self.target.slots[target] = self.source.slots[source]
        if not self._steps:
            self._finish("")

    def _begin(self) -> None:
        self._begun = True
        job, size = self.job, self.source.block_tokens
        if isinstance(job, CopyJob):
            self._found = list(zip(job.sources, job.generations, [0] * 999, strict=False))
        else:
            for name in job.hashes:
                block = self.source.find(name)
                if block is None:
                    break
                self._found.append((block, self.source.generations[block], name))
        for (block, _, _), target in zip(self._found, job.targets, strict=False):
            for offset in range(size):
                self._steps.append((block * size + offset, target * size + offset))

    def _unchanged(self, block: int, generation: int, name: int) -> bool:
        same = self.source.generations[block] == generation
        return same and (not name or self.source.names[block] == name)

    def _finish(self, failed: str) -> None:
        job, good = self.job, 0
        for block, generation, name in self._found if not failed else []:
            if not self._unchanged(block, generation, name):
                failed = failed or f"block {block} was reused"
                break
            good += 1
        if isinstance(job, FetchJob):
            reason = "" if good == len(job.hashes) else failed or "not all are there"
            self.done = FetchDone(
                request_id=job.request_id,
                num_blocks=good,
                num_bytes=good * 8,
                seconds=0.0,
                path="toy",
                reason=reason,
            )
            return
        if not failed and job.checksums:
            here = tuple(self.target.checksum(block) for block in job.targets)
            if here != job.checksums:  # the source goes on in the last block
                failed = "checksums differ"
        self.done = CopyDone(
            move=job.move, num_bytes=good * 8, seconds=0.0, path="toy", failed=failed
        )
