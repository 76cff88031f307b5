"""How one answer did against its budgets, as its `slo` object says it.

Everything counts from the arrival of the request, before its body was read, to the moment when a
token was handed to whatever writes the answer: the next chunk of a stream, or the whole document. A
token that is half a character, or may begin a stop string, waits there. The four parts of the
breakdown are the scheduler's stamps (`appliance.core.stamps`); the way from the scheduler to there
is the end of the last part, so that they sum to last token minus arrival."""

from collections.abc import Sequence
from typing import Any

from appliance.core.slo import Verdict as Judgement
from appliance.core.slo import due, slack
from appliance.core.stamps import Times
from appliance.core.types import ErrorKind, Record, Slo

OF_CLIENTS = frozenset(
    (ErrorKind.CANCELLED, ErrorKind.SLOW_READER, ErrorKind.TOO_LONG, ErrorKind.GRAMMAR)
)
"""Ends that are the client's doing: no outcome of a budget counts them."""


class Verdict(Record, frozen=True, kw_only=True):
    """One complete answer."""

    slo: Slo
    how: Judgement
    times: Times

    @property
    def met(self) -> bool:
        """Whether every target was kept; an answer without targets keeps them by being
        complete."""
        return self.how.met

    @property
    def first_slack(self) -> float | None:
        """Seconds left of the first token's budget when it came."""
        ttft, budget = self.how.ttft, self.slo.ttft
        return None if budget is None or ttft is None else budget - ttft

    def end_slack(self, num_tokens: int) -> float | None:
        """Seconds left before the deadline of the last of `num_tokens` tokens when it came."""
        if num_tokens == 0:
            return None
        end = due(self.slo, num_tokens - 1, arrived=0.0, first_token_at=self.how.ttft)
        return slack(end, self.how.e2e)

    def document(self) -> dict[str, Any]:
        """The `slo` object. A budget that was not set is null; the time per output token of an
        answer of one token is 0."""
        slo, how, times = self.slo, self.how, self.times
        before = times.queue + times.prefill + times.transfer
        return {
            "class": slo.class_name,
            "ttft_budget_ms": _ms(slo.ttft),
            "tpot_budget_ms": _ms(slo.tpot),
            **({} if slo.e2e is None else {"e2e_budget_ms": _ms(slo.e2e)}),
            "ttft_ms": _ms(how.ttft),
            "tpot_ms": _ms(how.tpot or 0.0),
            "met": how.met,
            "breakdown": {
                "queue_ms": _ms(times.queue),
                "prefill_ms": _ms(times.prefill),
                "transfer_ms": _ms(times.transfer),
                "decode_ms": _ms(max(0.0, how.e2e - before)),
            },
            "workers": list(times.workers),
            "demoted": times.demoted,
        }


def worst(verdicts: Sequence[Verdict]) -> Verdict | None:
    """The verdict on an HTTP request with several answers: that of one of them, which missed if any
    did, and among those took longest."""
    return max(verdicts, key=lambda each: (not each.met, each.how.e2e), default=None)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000.0, 3)
