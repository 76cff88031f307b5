"""Planner: turns a policy's grants into the work of one step.

The policy says how many tokens for whom; the planner makes it legal. It walks the grants in order,
admits what still waits, finds room in the ledger and books what was planned. Its rules:

* **The oldest running sequence goes first** and is never preempted. Since a sequence is only
  accepted if it fits into the pool alone, the oldest can always get on, and so, one after the
  other, can all.
* **A chunk is trimmed to the room there is**; only a sequence that cannot get on at all costs
  somebody else its blocks. The victim may be the needy one itself.
* **Blocks that are about to come back are waited for**: nobody is preempted while stale sequences
  will give back what is missing with the next finished steps.
* **Who is not here yet gives way.** Blocks reserved for a sequence that is still computed at
  another worker are taken back before anybody is preempted: it goes on where it is.
* **Admission never preempts.** A sequence is admitted if its whole prefill fits beside what running
  prefills still need, with one block to grow for each running sequence. When one does not fit, none
  behind it is tried: small requests cannot starve a large one. If nothing runs, the first is
  admitted whatever the reserve says, and who is not here yet
  gives way to it.
"""

from collections.abc import Sequence

from appliance.core.fetching import Fetcher
from appliance.core.importing import Importer
from appliance.core.messages import Preempted, Report
from appliance.core.roles import RolePreset
from appliance.core.sequence import LiveSequence, Queues, SeqState
from appliance.core.slots import BatchSlots, Grant
from appliance.core.types import BlockId, Phase, SeqWork, WorkerId


class PolicyError(Exception):
    """A policy decided what it may not: over the budget, or about a sequence that is not there."""


class _Draft:
    """What is left for the step being planned."""

    __slots__ = ("admitting", "decodes_left", "now", "prefill_left", "spare", "step")

    def __init__(self, step: int, now: float, *, prefill: int, decodes: int) -> None:
        self.step = step
        self.now = now
        self.prefill_left = prefill
        self.decodes_left = decodes
        self.admitting = True
        """Until the first that waits does not fit."""
        self.spare: list[int] = []
        """Per cache group, blocks that an admission must leave free; empty until one is tried."""


class Planner:
    """Plans steps over `queues`. Whom it preempts it reports in `reports`, which the Batcher
    sends."""

    def __init__(
        self,
        worker: WorkerId,
        queues: Queues,
        *,
        policy: BatchSlots,
        importer: Importer,
        fetcher: Fetcher,
        preset: RolePreset,
        reports: list[Report],
    ) -> None:
        self._importer = importer
        self._fetcher = fetcher
        self._worker = worker
        self._queues = queues
        self._ledger = queues.ledger
        self._policy = policy
        self._reports = reports
        self.bounds = preset
        """Of one step."""
        self._nothing: tuple[tuple[BlockId, ...], ...] = tuple(() for _ in self._ledger.pools)

    def plan(self, step: int, now: float) -> tuple[list[SeqWork], list[LiveSequence]]:
        """The work of step number `step` and, in the same order, whose it is. Both empty when
        nothing can be planned. Raises `PolicyError`."""
        tries = len(self._queues.running)
        while True:
            before = len(self._reports)
            work, planned = self._plan_once(step, now)
            if work or not tries or len(self._reports) == before:
                return work, planned
            tries -= 1  # all that the grants named lost its blocks: others have room now

    def _plan_once(self, step: int, now: float) -> tuple[list[SeqWork], list[LiveSequence]]:
        queues = self._queues
        queues.head_refused = False
        if queues.waiting:
            self._expect_hits()
        left = queues.config.max_batch_tokens
        bounds = self.bounds
        prefill = bounds.prefill_tokens
        if bounds.beside_decodes < prefill and self._decodes():
            prefill = bounds.beside_decodes
        draft = _Draft(step, now, prefill=prefill, decodes=bounds.max_decodes)
        grants = self._policy.fill(queues, left, now)
        by_id = queues.by_id
        work: list[SeqWork] = []
        planned: list[LiveSequence] = []
        for grant in self._oldest_first(grants):
            seq = by_id.get(grant.id)
            left -= grant.num_tokens
            if seq is None or grant.num_tokens < 1 or left < 0:
                raise PolicyError(self._complaint(grant, left))
            if not self._may_run(seq, draft):
                continue
            want = min(grant.num_tokens, seq.num_known - seq.num_computed)
            if seq.phase is Phase.PREFILL:
                want = min(want, draft.prefill_left)
            if seq.num_computed + want > seq.capacity:
                want = self._make_room(seq, want, draft)
                if not want:
                    continue
            if seq.phase is Phase.DECODE:
                draft.decodes_left -= 1
            else:
                draft.prefill_left -= want
                if seq.fresh and draft.spare:
                    queues.promise(seq, draft.spare)
            work.append(self._book(seq, want, step))
            planned.append(seq)
        return work, planned

    def _decodes(self) -> bool:
        """Whether anything here decodes."""
        return any(
            seq.phase is Phase.DECODE and seq.state is SeqState.RUNNING
            for seq in self._queues.running
        )

    def _may_run(self, seq: LiveSequence, draft: _Draft) -> bool:
        """Whether a sequence can be in this step, memory aside; admits it if it waits."""
        if seq.state is SeqState.RUNNING:
            if seq.last_step == draft.step:
                return False
            return (draft.decodes_left if seq.phase is Phase.DECODE else draft.prefill_left) > 0
        if seq.state is not SeqState.WAITING or not draft.admitting or not draft.prefill_left:
            return False
        draft.admitting = self._admit(seq, draft)
        return draft.admitting

    def _oldest_first(self, grants: Sequence[Grant]) -> Sequence[Grant]:
        oldest = self._queues.oldest()
        if oldest is None or not grants or grants[0].id == oldest.id:
            return grants
        for index, grant in enumerate(grants):
            if grant.id == oldest.id:
                return [grant, *grants[:index], *grants[index + 1 :]]
        return grants

    def _complaint(self, grant: Grant, left: int) -> str:
        why = "no such sequence is here"
        if grant.num_tokens < 1:
            why = "a grant is at least one token"
        elif left < 0:
            why = f"the grants exceed the budget of {self._queues.config.max_batch_tokens} tokens"
        return f"policy granted {grant.num_tokens} tokens to request {grant.id}: {why}"

    def _book(self, seq: LiveSequence, num_tokens: int, step: int) -> SeqWork:
        start = seq.num_computed
        end = start + num_tokens
        phase, fresh, new_blocks = seq.phase, seq.fresh, self._nothing
        seq.num_computed = end
        seq.num_outstanding += 1
        seq.last_step = step
        samples = end == seq.num_known
        if samples:
            seq.num_known = end + 1
            seq.phase = Phase.DECODE
            if end + 1 >= seq.limit:
                self._queues.set_aside(seq, SeqState.LAST)
        if seq.unsent and seq.table is not None:
            sent = seq.num_sent
            new_blocks = tuple([tuple(blocks[sent:]) for blocks in seq.table.blocks])
            seq.num_sent = seq.table.num_blocks
            seq.fresh = seq.unsent = False
        return SeqWork(
            id=seq.id,
            start=start,
            num_tokens=num_tokens,
            phase=phase,
            samples=samples,
            fresh=fresh,
            new_blocks=new_blocks,
        )

    # --- admission ------------------------------------------------------------------------------

    def _hits(self, seq: LiveSequence) -> int:
        """Leading blocks of a waiting sequence that are in the cache; one token is always
        computed."""
        return self._ledger.lookup(seq.hashes, (seq.num_known - 1) // self._ledger.block_tokens)

    def _expect_hits(self) -> None:
        """Tell the policy, as `num_computed`, what those at the head of the queue will find in the
        cache, so that it grants no token that need not be computed."""
        queues = self._queues
        left = queues.config.max_batch_tokens
        for seq in queues.waiting[: max(0, queues.free_slots)]:
            if left <= 0:
                break
            seq.num_computed = self._hits(seq) * self._ledger.block_tokens
            left -= seq.num_known - seq.num_computed

    def _admit(self, seq: LiveSequence, draft: _Draft) -> bool:
        """Admit a waiting sequence if a slot is free and memory allows."""
        queues, ledger = self._queues, self._ledger
        queues.head_refused = True
        while queues.free_slots <= 0:
            if queues.running or not self._importer.give_way():
                return False
        hits = self._hits(seq)
        if queues.running:
            if not draft.spare:
                draft.spare = queues.promised()
            num_blocks = ledger.blocks_for(seq.num_known)
            if not ledger.admits(seq.hashes, hits, num_blocks=num_blocks, spare=draft.spare):
                return False
        table = ledger.open(seq.hashes, hits)
        while not ledger.num_free:
            if queues.running or self._copies_come_back() or not self._importer.give_way():
                ledger.close(table)
                return False
        queues.head_refused = False
        queues.admit(seq, table)
        return True

    # --- memory ---------------------------------------------------------------------------------

    def _make_room(self, seq: LiveSequence, want: int, draft: _Draft) -> int:
        """Grow the table of a running sequence for `want` more tokens, or for as many as there is
        room for; preempt if it cannot get on at all. Returns the tokens it can compute, 0 for
        none."""
        queues, ledger = self._queues, self._ledger
        table = seq.table
        while table is not None:
            missing = ledger.blocks_for(seq.num_computed + want) - table.num_blocks
            some = min(missing, ledger.num_free)
            if some > 0:
                ledger.grow(table, some)
                seq.capacity = table.num_blocks * ledger.block_tokens
                seq.unsent = True
            room = min(want, seq.capacity - seq.num_computed)
            if room > 0:
                return room
            if queues.stale and self._blocks_come_back():
                return 0
            if self._copies_come_back():
                return 0
            if self._importer.give_way():
                continue
            victim = self._victim(draft.step, draft.now)
            if victim is None:
                return 0
            self._preempt(victim)
            if victim is seq:
                return 0
        return 0

    def _blocks_come_back(self) -> bool:
        """Whether stale sequences will give back at least one block of every group."""
        stale, ledger = self._queues.stale, self._ledger
        return any(
            seq.table is not None
            and seq.state is not SeqState.STOPPING
            and ledger.would_free(seq.table) > 0
            for seq in self._queues.running
            if seq.id in stale
        )

    def _copies_come_back(self) -> bool:
        """Whether blocks come back as soon as a copy is done."""
        return self._importer.leaving or self._fetcher.busy

    def _victim(self, step: int, now: float) -> LiveSequence | None:
        """Ask the policy whom to preempt: not the oldest, not who is in this step already."""
        queues = self._queues
        oldest = queues.oldest()
        candidates = [
            seq
            for seq in queues.running
            if seq.state is SeqState.RUNNING and seq.last_step != step and seq is not oldest
        ]
        if not candidates:
            return None
        chosen = self._policy.victim(queues, candidates, now)
        for seq in candidates:
            if seq.id == chosen:
                return seq
        raise PolicyError(f"policy chose request {chosen} as victim, which is not a candidate")

    def _preempt(self, seq: LiveSequence) -> None:
        if seq.num_outstanding:
            self._queues.set_aside(seq, SeqState.PREEMPTED)
            return
        self._queues.running.remove(seq)
        lost = self._queues.requeue(seq)
        self._reports.append(Preempted(worker=self._worker, request_id=seq.id, lost_tokens=lost))
