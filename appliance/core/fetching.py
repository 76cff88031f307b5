"""Fetcher: cached blocks of others, copied by content before a prefill.

A sequence that is assigned with `pull_from` is BLOCKED until what a peer (or this worker's own host
tier) has of its prefix is copied, or cannot be had; then it waits in the queue like any other and
finds the blocks in the cache. The peer takes no part: its index is shared memory, and names and
generations are checked after the copy, so it may be busy, or dead.

Until then the blocks belong to the fetch, not to the sequence: an abort forgets the sequence at
once, and is answered when nothing is being written any more. What came is kept in either case.
"""

from appliance.core.blocks import BlockTable
from appliance.core.messages import HOST_TIER, Aborted, Assign, PrefixPulled, Report
from appliance.core.peer import FetchDone, FetchJob
from appliance.core.sequence import LiveSequence, Queues
from appliance.core.types import BlockHash, RequestId, WorkerId


class Fetch:
    """Blocks on their way into the cache, for the sake of one sequence."""

    __slots__ = ("answer_abort", "held", "num_hits", "peer", "seq", "table", "wanted")

    def __init__(
        self, seq: LiveSequence, peer: WorkerId, *, table: BlockTable, num_hits: int
    ) -> None:
        self.seq = seq
        self.peer = peer
        self.table = table
        self.num_hits = num_hits
        self.wanted = table.num_blocks - num_hits
        self.answer_abort = False
        self.held: tuple[BlockHash, ...] = ()
        """What stays in the host tier until it is read."""


class Fetcher:
    """All fetches of one Batcher. `reports` are sent by the Batcher."""

    def __init__(self, worker: WorkerId, queues: Queues, *, reports: list[Report]) -> None:
        self._worker = worker
        self._queues = queues
        self._ledger = queues.ledger
        self._reports = reports
        self._fetches: dict[RequestId, Fetch] = {}
        self._jobs: list[FetchJob] = []

    @property
    def busy(self) -> bool:
        """Whether a fetch is under way."""
        return bool(self._fetches)

    @property
    def num_blocked(self) -> int:
        """Sequences that wait for theirs."""
        return sum(not each.answer_abort for each in self._fetches.values())

    def tables(self) -> list[BlockTable]:
        """Blocks that are being written, and those before them."""
        return [each.table for each in self._fetches.values()]

    def of_request(self, request_id: RequestId) -> Fetch | None:
        """The fetch for this sequence."""
        return self._fetches.get(request_id)

    def drain_fetches(self) -> list[FetchJob]:
        """Copies to be made, since the last call."""
        if not self._jobs:
            return []
        jobs, self._jobs = self._jobs, []
        return jobs

    def begin(self, command: Assign, seq: LiveSequence) -> bool:
        """Fetch what is worth it. False: nothing is fetched (`PrefixPulled` says why), the sequence
        is to be queued. With True it is BLOCKED."""
        queues, ledger, peer = self._queues, self._ledger, command.pull_from
        if peer is None:
            return False
        most = min(command.pull_blocks, len(seq.hashes), (seq.num_known - 1) // ledger.block_tokens)
        hits = ledger.lookup(seq.hashes, most)
        tier = ledger.tier if peer == HOST_TIER else None
        wanted = max(0, most - hits)
        reason = ""
        if not ledger.prefix_cache or not ledger.is_paged:
            reason = "this worker keeps no blocks that could be fetched"
        elif wanted and not ledger.admits(
            seq.hashes, hits, num_blocks=most, spare=queues.promised()
        ):
            reason = "there is no room"
        elif wanted and tier is not None:
            there = tier.find(seq.hashes[hits:most])
            most = hits + there
            if not there:
                reason = "it is not in host memory any more"
        if reason or not wanted:
            self._report(seq.id, peer, wanted=wanted, done=None, reason=reason)
            return False
        held = () if tier is None else tuple(seq.hashes[hits:most])
        if tier is not None:
            tier.hold(held)  # what is evicted for the sake of it cannot take its place
        table = ledger.open(seq.hashes, hits)
        ledger.grow(table, most - hits)
        queues.enter_blocked(seq)
        fetch = self._fetches[seq.id] = Fetch(seq, peer, table=table, num_hits=hits)
        fetch.held = held
        self._jobs.append(
            FetchJob(
                request_id=seq.id,
                peer=peer,
                hashes=tuple(seq.hashes[hits:most]),
                targets=tuple(table.blocks[0][hits:]),
            )
        )
        return True

    def refuse(self, command: Assign, reason: str) -> None:
        """Nothing is fetched for this sequence, for a reason of its own."""
        if command.pull_from is not None:
            self._report(command.request.id, command.pull_from, wanted=0, done=None, reason=reason)

    def fetched(self, done: FetchDone) -> bool:
        """A fetch has ended: what came is findable from now on. False: none was under way."""
        fetch = self._fetches.pop(done.request_id, None)
        if fetch is None or done.num_blocks > fetch.wanted:
            return False
        seq, ledger = fetch.seq, self._ledger
        if ledger.tier is not None and fetch.held:
            ledger.tier.release(fetch.held)
        ledger.register(fetch.table, seq.hashes, fetch.num_hits + done.num_blocks)
        ledger.close(fetch.table)
        if fetch.answer_abort:
            self._reports.append(Aborted(worker=self._worker, request_id=seq.id))
            return True
        self._report(seq.id, fetch.peer, wanted=fetch.wanted, done=done, reason=done.reason)
        self._queues.unblock(seq)
        return True

    def abort(self, request_id: RequestId) -> bool:
        """Forget the sequence; `Aborted` is reported when the copy is done. False: unknown."""
        fetch = self._fetches.get(request_id)
        if fetch is None:
            return False
        if not fetch.answer_abort:
            fetch.answer_abort = True
            self._queues.forget_queued(fetch.seq)
        return True

    def _report(
        self,
        request_id: RequestId,
        peer: WorkerId,
        *,
        wanted: int,
        done: FetchDone | None,
        reason: str,
    ) -> None:
        self._reports.append(
            PrefixPulled(
                worker=self._worker,
                request_id=request_id,
                source=peer,
                wanted=wanted,
                num_blocks=0 if done is None else done.num_blocks,
                num_bytes=0 if done is None else done.num_bytes,
                seconds=0.0 if done is None else done.seconds,
                path="" if done is None else done.path,
                reason=reason,
            )
        )
