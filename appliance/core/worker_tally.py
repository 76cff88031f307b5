"""What the requests at one worker add up to, kept as they come and go.

Nothing here costs anything per token but one addition per report: a policy may ask after every
report how many sequences decode somewhere, over how many tokens of context, and how tight the
tightest budget per token there is."""

from appliance.core.request_table import RequestRecord
from appliance.core.types import RequestId


class WorkerTally:
    """Sums over the requests at one worker and those that it pulls. Changed only through its
    `WorkerSlot` and where prefill begins or ends."""

    __slots__ = ("_tpots", "context_tokens", "decodes", "prompts", "tightest_tpot")

    def __init__(self) -> None:
        self.decodes = 0
        """Sequences that emit there (or have, and are about to again after a preemption)."""
        self.context_tokens = 0
        """Their prompt and emitted tokens: the KV that a step reads."""
        self.tightest_tpot: float | None = None
        """The least TPOT budget of all that are there or on their way, the demoted aside."""
        self.prompts: dict[RequestId, RequestRecord] = {}
        """Those with `pending` tokens, oldest first."""
        self._tpots: dict[float, int] = {}

    def enter(self, record: RequestRecord) -> None:
        """The request is assigned to this worker, or begins to move here."""
        tpot = record.request.slo.tpot
        if tpot is None or record.demoted:
            return
        self._tpots[tpot] = self._tpots.get(tpot, 0) + 1
        if self.tightest_tpot is None or tpot < self.tightest_tpot:
            self.tightest_tpot = tpot

    def leave(self, record: RequestRecord) -> None:
        """It is so no longer (or is about to be demoted)."""
        tpot = record.request.slo.tpot
        if tpot is None or record.demoted:
            return
        left = self._tpots[tpot] - 1
        if left:
            self._tpots[tpot] = left
            return
        del self._tpots[tpot]
        if tpot == self.tightest_tpot:
            self.tightest_tpot = min(self._tpots, default=None)

    def begin_decode(self, record: RequestRecord) -> None:
        """Tokens come from this worker from now on."""
        if not record.decodes:
            record.decodes = True
            self.decodes += 1
            self.context_tokens += record.request.prompt_tokens + record.emitted

    def end_decode(self, record: RequestRecord) -> None:
        """None come any more. Does nothing if none did."""
        if record.decodes:
            record.decodes = False
            self.decodes -= 1
            self.context_tokens -= record.request.prompt_tokens + record.emitted

    def agrees(self, assigned: list[RequestRecord], incoming: list[RequestRecord]) -> bool:
        """Whether all of it is the sum of its parts."""
        decoding = [record for record in assigned if record.decodes]
        context = sum(record.request.prompt_tokens + record.emitted for record in decoding)
        tpots = [
            record.request.slo.tpot
            for record in (*assigned, *incoming)
            if record.request.slo.tpot is not None and not record.demoted
        ]
        pending = {record.request.id for record in assigned if record.pending}
        return (
            (self.decodes, self.context_tokens) == (len(decoding), context)
            and self.tightest_tpot == min(tpots, default=None)
            and sum(self._tpots.values()) == len(tpots)
            and set(self.prompts) == pending
        )
