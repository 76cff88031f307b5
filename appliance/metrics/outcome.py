"""What a client saw of one request. All times are seconds from the start of the run."""

from appliance.core.types import Record, Slo


class Outcome(Record, frozen=True, kw_only=True):
    """One request's fate as its client saw it.

    `at` is when it was due to be sent, `sent` when it was; `first` and `last` are its first and
    last content tokens (None: none came). `on_time` is the share of the tokens received that came
    by `sent + ttft + k * tpot` (k from 0; without a TTFT target counted from the first token;
    without a TPOT target every token is on time). `longest_gap` is between successive tokens.
    `finished`: the stream ended as it should. `server` is the verdict in the answer, if any."""

    index: int
    class_name: str
    slo: Slo
    prompt_tokens: int
    wanted_tokens: int
    at: float
    sent: float
    first: float | None
    last: float | None
    num_tokens: int
    on_time: float
    longest_gap: float
    finished: bool
    error: str = ""
    cached_tokens: int = 0
    workers: tuple[int, ...] = ()
    server: dict[str, object] | None = None

    @property
    def ttft(self) -> float | None:
        """Seconds from send to first token."""
        return None if self.first is None else self.first - self.sent

    @property
    def tpot(self) -> float | None:
        """Mean seconds per token after the first; 0 for a single token, None for none."""
        if self.first is None or self.last is None or self.num_tokens < 1:
            return None
        if self.num_tokens == 1:
            return 0.0
        return (self.last - self.first) / (self.num_tokens - 1)

    @property
    def e2e(self) -> float | None:
        """Seconds from send to last token."""
        return None if self.last is None else self.last - self.sent

    @property
    def lateness(self) -> float:
        """Seconds that the client itself was late; never negative."""
        return max(0.0, self.sent - self.at)
