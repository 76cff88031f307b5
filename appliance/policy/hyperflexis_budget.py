"""HyperFlexis: settings, and the arithmetic that its node part and its step part share.

Symbols as in `docs/hyperflexis.md`: a request arrived at `a` with a prompt of L tokens, of which c
are cached; S1 and S2 are its budgets for the first token and per token; a worker decodes B
sequences over K tokens of context. `StepModel` predicts a step of n prompt tokens beside them.
"""

from typing import Annotated, Literal, NamedTuple

import msgspec

from appliance.core.slo import first_token_deadline
from appliance.core.step_model import StepModel
from appliance.core.types import Request

Share = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
Positive = Annotated[float, msgspec.Meta(gt=0.0)]
ANSWER_SHARE = 0.2
"""Of an end-to-end budget, what is kept for the answer where its length is not known."""
LEAST_CHUNK = 32
"""Prompt tokens that a step takes however tight the decodes beside them are."""


class HyperflexisSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the paper leaves open, each with a default of ours, and switches that take a part of it
    away."""

    budget: bool = True
    """False: steps are filled to the worker's bound, and dispatch looks at no budget."""
    priority: bool = True
    """False: first come, first served, at the node and in a step."""
    migrate: bool = True
    """False: no answer moves to balance the node."""
    order: Literal["slack", "deadline", "density"] = "deadline"
    """What the most urgent of the feasible requests is: the one that has to start first, the one
    that is due first, or the one with the greatest value per second of work."""
    overload: Literal["shed", "none"] = "shed"
    """When not all that waits can be in time: hold back the least value per second of work until
    the rest can, or go on as before."""
    late: Literal["demote", "keep"] = "demote"
    """What cannot be in time any more is served as best effort, or stays where it was."""
    tpot: Literal["averaged", "each"] = "averaged"
    """A step may use what earlier tokens have saved, or every token has to come within S2."""
    anchor: Literal["first_token", "target"] = "first_token"
    """From when tokens are counted: the real first one, or the one that was due."""
    placement: Literal["least", "fullest"] = "least"
    """Among the workers where all budgets hold: who would be done first, or (to empty the others)
    who has the most to do."""
    skip_loose: bool = True
    """Decodes with time in hand sit out a step that would be too long for a tighter one."""
    headroom: Share = 0.8
    """Part of a time budget that a prediction may use."""
    floor: Share = 0.65
    """A step for decodes that are behind may last this share of the tightest S2."""
    ahead_steps: Positive = 2.0
    """Steps of prefill that are placed at a worker before others wait at the node."""
    lane_share: Share = 0.02
    """Of the prompt tokens of a step, what best effort gets even in overload."""
    lane_after: Positive = 60.0
    """Seconds after which best effort is placed though every worker is full, one at a time to each;
    what it gets is lost to those that can be in time."""
    patience: Positive = 120.0
    """Seconds after which a request without targets should have begun."""
    fairness: Annotated[float, msgspec.Meta(ge=0.0)] = 4.0
    """How much a class gains in value when more of it than of others has been given up; 0: not."""
    reserve: Share = 0.35
    """Share of the time until a first token is due that is kept for more urgent arrivals: what does
    not fit into the rest is held back."""
    length_quantile: Annotated[float, msgspec.Meta(gt=0.0, lt=1.0)] = 0.8
    """Of the answers of a class: the length that memory and end-to-end budgets are planned for."""


class Pace(NamedTuple):
    """How a worker gets on with prompts beside its decodes."""

    chunk: int
    """Prompt tokens of a step within the TPOT budgets."""
    step: float
    """Seconds of such a step (expected)."""
    rate: float
    """Prompt tokens per second."""
    decode: float
    """Seconds of a step without prompts, one more in decode than there are (tail)."""


def pace(
    steps: StepModel,
    *,
    decodes: int,
    context_tokens: int,
    tpot: float | None,
    most: int,
    settings: HyperflexisSettings,
) -> Pace:
    """The pace of a worker whose tightest budget per token is `tpot` and that computes up to `most`
    tokens in a step."""
    most = max(LEAST_CHUNK, most - decodes)
    chunk = most
    if settings.budget and decodes and tpot is not None:
        chunk = steps.tokens_within(
            settings.headroom * tpot, decodes=decodes, context_tokens=context_tokens, most=most
        )
        chunk = max(LEAST_CHUNK, chunk)
    step = steps.seconds(prefill_tokens=chunk, decodes=decodes, context_tokens=context_tokens)
    alone = 0.0
    if decodes:
        alone = steps.tail_seconds(decodes=decodes, context_tokens=context_tokens)
    return Pace(chunk, step, chunk / max(step, 1e-9), alone)


def first_token_due(request: Request, *, answer_seconds: float, patience: float) -> float:
    """When the first token is due, on the node's clock. An end-to-end budget leaves time for the
    answer; a request without targets is due after `patience`."""
    slo = request.slo
    due = request.arrived + patience
    if slo.e2e is not None:
        due = request.arrived + slo.e2e - max(answer_seconds, ANSWER_SHARE * slo.e2e)
    first = first_token_deadline(request)
    if first is not None:
        return first if slo.e2e is None else min(first, due)
    return due
