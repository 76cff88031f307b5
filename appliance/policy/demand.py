"""What a division of the workers into roles would have to bear: a fluid model over the step model.

A worker that gets `p` prompt tokens and must emit `d` answer tokens each second does steps of `T`
seconds, each with `n = p T` prompt tokens beside `B = d T` decodes of `c` tokens of context. It
keeps up when such a step takes no longer than `T`, for the longest `T` that is allowed: by the
tightest TPOT (where anything decodes), by the tokens and by the sequences of a step. The *level* of
a worker is the share of that capacity that is used: with `p = 0` it is
`d / mu`, `mu = B* / T(B*)` with `B*` the largest batch within the tightest TPOT; with `d = 0` the
share of its time that prompts take. Above 1 it cannot keep up. The step model is the larger of two
planes, so the test is a sum of rates for each plane and needs no search.

A policy that fits the chunks of prompts into the slack of the decodes beside them (`chunk` = "fit")
makes long steps only where the level asks for them. With chunks of a fixed size what a prompt does
to the answers beside it comes in bursts: then a mean is judged that nine of ten answers stay below.

A phase that no worker prefers is served by the others as if they were mixed. Mixed workers take
what the others cannot, at equal levels."""

import math
from collections.abc import Callable
from functools import cached_property

import msgspec

from appliance.core.types import Role
from appliance.core.view import Targets

TAIL = 1.28
"""Standard deviations above the mean below which nine of ten lie."""
FULL = 0.95
"""Above this share of its time a queue is as long as one likes; waiting is cut off there."""
AHEAD = 5.0
"""Seconds for which what piles up is predicted where workers cannot keep up."""
VARIED = 1.5
"""How much longer prompts of varied lengths wait than equal ones: half of 1 and the squared
coefficient of variation."""
ROUNDS = 10
HOPELESS = 50.0
"""A level that nothing can bear; larger ones are not told apart."""

Plane = tuple[float, float, float, float, float]
"""Seconds per (step, prompt token, pair, decode, token of context)."""


class Load(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """What has to be served, predicted, and what a worker can do. Rates are of the whole node."""

    prompt_rate: float
    """Prompt tokens to compute each second."""
    token_rate: float
    """Answer tokens each second."""
    prompt_tokens: float
    """Length of a prompt."""
    context_tokens: float
    """Tokens of context of one decode."""
    answer_tokens: float
    """Length of an answer."""
    backlog_tokens: float = 0.0
    """Prompt tokens that are here and not computed."""
    planes: tuple[Plane, ...]
    tail: float = 1.0
    """Factor from the expected to the tail duration of a step."""
    max_batch_tokens: int
    max_num_seqs: int
    chunk: int = 0
    """Prompt tokens of a step beside decodes; 0: fitted into the slack of the decodes."""
    targets: Targets = Targets()

    def step(self, num_tokens: float, decodes: float) -> float:
        """Seconds of a step with so many prompt tokens beside so many decodes."""
        pairs = num_tokens * max(num_tokens, self.prompt_tokens) / 2
        context = decodes * self.context_tokens
        row = (1.0, num_tokens, pairs, decodes, context)
        return max(sum(k * x for k, x in zip(plane, row, strict=True)) for plane in self.planes)

    @cached_property
    def allowed(self) -> float:
        """Longest mean step where something decodes; infinite without a target."""
        tpot = self.targets.tpot
        if tpot is None:
            return math.inf
        return max(tpot / self.tail, 1.25 * self.step(0.0, 1.0))

    @cached_property
    def costs(self) -> tuple[tuple[float, float, float], ...]:
        """Seconds of a step, of a prompt token and of a decode in each plane."""
        return tuple(
            (base, token + pair * self.prompt_tokens / 2, decode + context * self.context_tokens)
            for base, token, pair, decode, context in self.planes
        )

    def keeps_up(self, prompts: float, tokens: float, allowed: float) -> bool:
        """Whether one worker can compute `prompts` prompt tokens and emit `tokens` each second with
        steps of `allowed` seconds at most."""
        seconds = allowed if tokens > 0.0 else math.inf
        if tokens > 0.0:
            seconds = min(seconds, self.max_num_seqs / tokens)
        seconds = min(seconds, self.max_batch_tokens / max(prompts + tokens, 1e-9))
        return all(
            base + seconds * (prompts * token + tokens * decode) <= seconds
            for base, token, decode in self.costs
        )

    @cached_property
    def longest(self) -> float:
        """Seconds of a full step beside a full batch."""
        return self.step(float(self.max_batch_tokens), float(self.max_num_seqs))

    @cached_property
    def prefill(self) -> float:
        """Workers that prompts keep busy."""
        most = self.max_batch_tokens
        each = max(base / most + token for base, token, _ in self.costs)
        return self.prompt_rate * each

    @cached_property
    def full_batch(self) -> float:
        """The largest batch of decodes within the tightest TPOT."""
        allowed, batch = self.allowed, float(min(self.max_num_seqs, self.max_batch_tokens))
        for base, _, decode in self.costs:
            if decode > 0.0 and allowed < math.inf:
                batch = min(batch, (allowed - base) / decode)
        return max(1.0, batch)

    @cached_property
    def decode(self) -> float:
        """Workers that answers keep busy: the rate over `mu`."""
        batch = self.full_batch
        return self.token_rate * self.step(0.0, batch) / batch


class Division(msgspec.Struct, frozen=True, kw_only=True):
    """How many workers have which role."""

    prefill: int
    decode: int
    mixed: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.prefill + self.decode + self.mixed

    def count(self, role: Role) -> int:
        """Those of one role."""
        return {
            Role.PREFILL: self.prefill,
            Role.DECODE: self.decode,
            Role.MIXED: self.mixed,
        }[role]

    def common(self, other: "Division") -> "Division":
        """Workers that need not change to get from one to the other."""
        return Division(
            prefill=min(self.prefill, other.prefill),
            decode=min(self.decode, other.decode),
            mixed=min(self.mixed, other.mixed),
        )

    def served(self) -> "Division":
        """As it works: a phase that no worker prefers is served by the others as if mixed."""
        if not self.mixed and not (self.prefill and self.decode):
            return Division(prefill=0, decode=0, mixed=self.total)
        return self

    def plus(self, mixed: int) -> "Division":
        """With so many more mixed workers."""
        return Division(prefill=self.prefill, decode=self.decode, mixed=self.mixed + mixed)


class Pressure(msgspec.Struct, frozen=True, kw_only=True):
    """What a division would have to bear; shares of 1."""

    worst: float
    prefill: float
    """Level of the workers that compute prompts."""
    decode: float
    """Level of those that decode."""
    first_token: float
    per_token: float

    def words(self) -> str:
        """Which of them is the worst."""
        if self.worst == self.per_token and self.per_token > max(self.prefill, self.decode):
            return "time per token"
        if self.worst == self.first_token and self.first_token > max(self.prefill, self.decode):
            return "time to first token"
        return "prefill" if self.prefill >= self.decode else "decode"


class _Shares(msgspec.Struct, frozen=True, kw_only=True):
    """What one worker of a division gets each second."""

    prompts: float
    """Prompt tokens of a mixed one."""
    tokens: float
    """Answer tokens of a mixed one."""
    decode_tokens: float
    """Answer tokens of one that only decodes."""


def pressure(division: Division, load: Load) -> Pressure:
    """What this division of workers would have to bear."""
    shape = division.served()
    if not shape.total or load.prompt_rate + load.token_rate <= 0.0:
        return Pressure(worst=0.0, prefill=0.0, decode=0.0, first_token=0.0, per_token=0.0)
    level = _level(shape, load)
    prefill = load.prefill / max(1, shape.prefill + shape.mixed)
    decode = load.decode / max(1, shape.decode + shape.mixed)
    if shape.mixed:
        prefill, decode = max(prefill, level), max(decode, level)
    shares = _shares(shape, load, level)
    targets = load.targets
    each = _gap(shape, load, shares) * load.tail / targets.tpot if targets.tpot else 0.0
    first = 0.0
    if targets.ttft:
        first = _first(shape, load, shares, level=prefill) * load.tail / targets.ttft
    return Pressure(
        worst=max(level, first, each),
        prefill=prefill,
        decode=decode,
        first_token=first,
        per_token=each,
    )


def _level(shape: Division, load: Load) -> float:
    """The least level at which the workers keep up, all at the same if some are mixed."""
    prefill, decode = load.prefill, load.decode
    if not shape.mixed:
        return max(prefill / shape.prefill, decode / shape.decode)
    allowed = load.allowed

    def bears(level: float) -> bool:
        shares = _shares(shape, load, level)
        return load.keeps_up(shares.prompts / level, shares.tokens / level, allowed)

    low = max(prefill / (shape.prefill + shape.mixed), decode / (shape.decode + shape.mixed))
    return _least(bears, low=max(low, 1e-3))


def _least(bears: Callable[[float], bool], *, low: float) -> float:
    if bears(low):
        return low
    high = 2.0 * low
    while not bears(high):
        low, high = high, 2.0 * high
        if high > HOPELESS:
            return HOPELESS
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        low, high = (low, middle) if bears(middle) else (middle, high)
    return high


def _shares(shape: Division, load: Load, level: float) -> _Shares:
    """Prefill and decode workers take what they can at this level, mixed ones the rest."""
    prompts, tokens = load.prompt_rate, load.token_rate
    decoded = 0.0
    if shape.prefill and load.prefill > 0.0:
        prompts *= max(0.0, 1.0 - level * shape.prefill / load.prefill)
    if shape.decode and load.decode > 0.0:
        decoded = tokens * min(1.0, level * shape.decode / load.decode)
        tokens -= decoded
    mixed = max(1, shape.mixed)
    return _Shares(
        prompts=prompts / mixed,
        tokens=tokens / mixed,
        decode_tokens=decoded / max(1, shape.decode),
    )


def _shortest(load: Load, *, prompts: float, tokens: float) -> float:
    """The shortest step that keeps up with these rates, as far as there is one."""
    longest = load.longest
    seconds = 0.0
    for base, token, decode in load.costs:
        left = 1.0 - prompts * token - tokens * decode
        seconds = max(seconds, base / left if left > 0.0 else longest)
    return min(seconds, longest)


def _batch(load: Load, shares: _Shares) -> float:
    """Decodes of a mixed worker."""
    seconds = _shortest(load, prompts=shares.prompts, tokens=shares.tokens)
    return min(float(load.max_num_seqs), shares.tokens * seconds)


def _gap(shape: Division, load: Load, shares: _Shares) -> float:
    """Mean seconds between the tokens of an answer, which nine of ten answers stay below."""
    gaps = [0.0]
    if shares.decode_tokens > 0.0:
        gaps.append(_shortest(load, prompts=0.0, tokens=shares.decode_tokens))
    if shape.mixed and shares.tokens > 0.0:
        chunk = min(float(load.chunk), load.prompt_tokens)
        if chunk:
            gaps.append(_tail_gap(load, shares, chunk=chunk))
        else:
            gaps.append(_fitted_gap(load, shares))
    return max(gaps)


def _fitted_gap(load: Load, shares: _Shares) -> float:
    """On a mixed worker whose prompts are fitted into the slack: too many of them wait, and
    lengthen no step beyond what is allowed."""
    alone = _shortest(load, prompts=0.0, tokens=shares.tokens)
    both = _shortest(load, prompts=shares.prompts, tokens=shares.tokens)
    return max(alone, min(both, FULL * load.allowed))


def _tail_gap(load: Load, shares: _Shares, *, chunk: float) -> float:
    """On a mixed worker whose prompts come in chunks of that size.

    A step is lengthened by a chunk with probability q, and then so are about `run` in a row; the
    mean of the gaps of an answer varies accordingly (normal approximation)."""
    decodes = _batch(load, shares)
    plain, long = load.step(0.0, decodes), load.step(chunk, decodes)
    rate = shares.prompts / chunk
    if rate <= 0.0 or long <= plain:
        return plain
    left = 1.0 - rate * (long - plain)
    q = min(1.0, rate * plain / left) if left > 0.0 else 1.0
    run = max(1.0, load.prompt_tokens / chunk)
    spread = math.sqrt(q * (1 - q) * run / max(1.0, load.answer_tokens - 1))
    return plain + (long - plain) * min(1.0, q + TAIL * spread)


def _first(shape: Division, load: Load, shares: _Shares, *, level: float) -> float:
    """Seconds to the first token of a prompt, its waiting included: for what is here, for what
    comes at random (Sakasegawa's formula for several workers with one queue), and, where the
    workers cannot keep up, for what will have piled up `AHEAD` seconds from now."""
    most = float(load.max_batch_tokens)
    if shape.prefill:
        alone = load.step(min(load.prompt_tokens, most), 0.0) * max(1.0, load.prompt_tokens / most)
    else:
        decodes = _batch(load, shares)
        chunk = float(load.chunk) or _fitting(load, decodes)
        chunk = max(1.0, min(chunk, load.prompt_tokens, most))
        alone = load.step(chunk, decodes) * load.prompt_tokens / chunk
    capacity, workers = _prompt_capacity(shape, load, shares), shape.prefill + shape.mixed
    busy = min(level, FULL)
    each = load.prompt_tokens * workers / capacity
    queue = math.pow(busy, math.sqrt(2 * (workers + 1)) - 1) / (workers * (1 - busy)) * each
    piling = max(0.0, level - FULL) * AHEAD
    return alone + queue * VARIED + load.backlog_tokens / capacity + piling


def _prompt_capacity(shape: Division, load: Load, shares: _Shares) -> float:
    """Prompt tokens each second that the workers can compute beside what they decode."""
    most = float(load.max_batch_tokens)
    seconds = min(load.allowed, load.step(most, _batch(load, shares)))
    alone = beside = math.inf
    for base, token, decode in load.costs:
        if token > 0.0:
            alone = min(alone, 1.0 / (base / most + token))
            beside = min(beside, (1.0 - base / seconds - shares.tokens * decode) / token)
    total = shape.prefill * alone + shape.mixed * max(beside, 0.02 * alone)
    return max(total, 1e-9)


def _fitting(load: Load, decodes: float) -> float:
    """Prompt tokens that fit beside so many decodes into the longest step allowed."""
    allowed, most = load.allowed, float(load.max_batch_tokens)
    if allowed == math.inf:
        return most
    for base, token, decode in load.costs:
        if token > 0.0:
            most = min(most, (allowed - base - decodes * decode) / token)
    return max(most, 0.02 * load.max_batch_tokens)
