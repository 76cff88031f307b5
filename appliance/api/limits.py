"""What one key may use: token buckets over requests and tokens, and a bound on what is under way.

Pure: every method is told the time, nothing here sleeps or reads a clock.

A *bucket* of n per minute holds at most n and regains n / 60 per second, so a key that was idle may
spend a whole minute's worth at once. What cannot be known beforehand (the length of an answer) is
taken when it is known and may leave the bucket below zero; the debt is paid before anything else is
allowed. So over any span of t seconds a key gets no more than n + n * t / 60, plus the answers that
were under way at its end.

* `requests_per_minute`: every POST takes one when it arrives, whatever becomes of it. One that is
  turned away by a limit of its key takes nothing.
* `tokens_per_minute`: a request takes the tokens of its prompts when it is admitted (cached ones
  too; each prompt once, whatever `n` is), and the tokens of its answers when it ends, however it
  ends. It gets its prompts' tokens back when the node refuses it. A prompt that is larger than the
  whole bucket is admitted when the bucket is full.
* `max_concurrent_requests`: POSTs between their arrival and the last byte of their answer.
"""

from collections import Counter

from appliance.core.types import Record

PAUSE = 1.0
"""Seconds to wait for a place among concurrent requests: nobody knows when one ends."""


class KeyLimits(Record, frozen=True, kw_only=True):
    """Bounds of one key; None for no bound."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent_requests: int | None = None


class LimitReached(Exception):
    """A limit of a key does not allow this now. `limit` is its name, `bound` its value."""

    def __init__(self, limit: str, bound: int, *, retry_after: float) -> None:
        super().__init__(f"{limit} = {bound}")
        self.limit = limit
        self.bound = bound
        self.retry_after = retry_after
        """Seconds after which it would be allowed if nothing else is asked meanwhile."""


class Bucket:
    """`per_minute` units a minute, at most `per_minute` at once."""

    def __init__(self, per_minute: int, now: float) -> None:
        """Full at `now`."""
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at = now

    def level(self, now: float) -> float:
        """Units that are there; negative while a debt is open."""
        if now > self._at:
            gained = (now - self._at) * self.per_minute / 60.0
            self._level = min(float(self.per_minute), self._level + gained)
            self._at = now
        return self._level

    def missing(self, units: int, now: float) -> float:
        """Seconds until `units` are there, or until it is full if they are more; 0.0 for now."""
        short = min(units, self.per_minute) - self.level(now)
        return max(0.0, short * 60.0 / self.per_minute)

    def take(self, units: int, now: float) -> None:
        """Take `units`, into debt if need be; negative `units` are given back."""
        self._level = min(float(self.per_minute), self.level(now) - units)


class Account:
    """What one key has used and may still use."""

    def __init__(self, limits: KeyLimits, now: float) -> None:
        self._limits = limits
        rpm, tpm = limits.requests_per_minute, limits.tokens_per_minute
        self._requests = None if rpm is None else Bucket(rpm, now)
        self._tokens = None if tpm is None else Bucket(tpm, now)
        self.concurrent = 0
        """Requests under way."""
        self.requests = 0
        """Requests that were let in."""
        self.prompt_tokens = 0
        """Of requests that have ended."""
        self.generated_tokens = 0
        self.refused: Counter[str] = Counter()
        """Requests turned away, by the name of the limit."""

    def enter(self, now: float) -> None:
        """A request has arrived; `leave` must follow. Raises `LimitReached`, then it must not."""
        most = self._limits.max_concurrent_requests
        if most is not None and self.concurrent >= most:
            self._refuse("max_concurrent_requests", most, retry_after=PAUSE)
        bucket = self._requests
        if bucket is not None:
            self._check(bucket, 1, now, name="requests_per_minute")
            bucket.take(1, now)
        self.concurrent += 1
        self.requests += 1

    def leave(self) -> None:
        """A request that was let in is over."""
        self.concurrent -= 1

    def charge(self, prompt_tokens: int, now: float) -> None:
        """Take the tokens of a request's prompts. Raises `LimitReached`, then nothing is taken."""
        if self._tokens is not None:
            self._check(self._tokens, prompt_tokens, now, name="tokens_per_minute")
            self._tokens.take(prompt_tokens, now)

    def refund(self, prompt_tokens: int, now: float) -> None:
        """Give back what `charge` took for a request that the node refused."""
        if self._tokens is not None:
            self._tokens.take(-prompt_tokens, now)

    def settle(self, prompt_tokens: int, generated_tokens: int, now: float) -> None:
        """A request that was charged for its prompts has ended: take the tokens of its answers."""
        if self._tokens is not None:
            self._tokens.take(generated_tokens, now)
        self.prompt_tokens += prompt_tokens
        self.generated_tokens += generated_tokens

    def _check(self, bucket: Bucket, units: int, now: float, *, name: str) -> None:
        seconds = bucket.missing(units, now)
        if seconds > 0.0:
            self._refuse(name, bucket.per_minute, retry_after=seconds)

    def _refuse(self, name: str, bound: int, *, retry_after: float) -> None:
        self.refused[name] += 1
        raise LimitReached(name, bound, retry_after=retry_after)


class ReceivingBudget:
    """Bytes of large bodies that are being received at this moment, all clients together.

    The first `free` bytes of each body count for nothing, so that slow senders of large bodies
    cannot keep out the small ones."""

    def __init__(self, most: int, *, free: int = 64 * 1024) -> None:
        self._most = most
        self._free = free
        self.used = 0

    def counted(self, received: int) -> int:
        """What a body of which so many bytes are there counts for."""
        return max(0, received - self._free)

    def grow(self, before: int, after: int) -> bool:
        """A body has grown from `before` to `after` bytes; False (and nothing changes) when there
        is no room. One body may always be received alone."""
        more = self.counted(after) - self.counted(before)
        others = self.used - self.counted(before)
        if more and others > 0 and self.used + more > self._most:
            return False
        self.used += more
        return True

    def release(self, received: int) -> None:
        """A body of so many received bytes is complete or given up."""
        self.used -= self.counted(received)
