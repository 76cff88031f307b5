"""The seam between the step loop and whatever computes tokens.

Two engines stand behind it: `torch_engine` runs a model, `paced_engine` lets each step last as long
as a device profile says. Both own their worker's KV pool and keep, per sequence, its token ids and
block table; neither decides anything.
"""

from collections.abc import Sequence
from typing import Protocol

from appliance.core.payload import SequenceState, TokenLogprobs
from appliance.core.types import CacheGroupSpec, Record, RequestId, StepPlan


class EngineInfo(Record, frozen=True, kw_only=True):
    """What the engine can hold, known once it is ready."""

    groups: tuple[CacheGroupSpec, ...]
    """Cache groups with the number of usable blocks (a scratch block for padding is not
    counted)."""
    vocab_size: int
    max_positions: int
    weights_source: str
    """Where the weights came from: "slab", "peer:N", "host", "disk", "none"."""
    weights_seconds: float = 0.0
    """Until they were in place."""
    weights_bytes: int = 0
    """That were moved."""
    weights_notes: tuple[str, ...] = ()
    weights_fingerprint: str = ""
    """Of the files that they were read from."""
    notes: tuple[str, ...] = ()
    """What an operator should read in the start-up plan (chosen kernels, fall-backs and why)."""


class SampledToken(Record, frozen=True, kw_only=True, array_like=True):
    """The token drawn for one sequence at the end of a step.

    `failed` says why this sequence cannot go on (its grammar allows nothing more); its token means
    nothing then, and the other sequences are not concerned."""

    id: RequestId
    token: int
    logprobs: TokenLogprobs | None = None
    failed: str = ""


class Engine(Protocol):
    """Computes steps. Single-threaded: every call comes from the step loop."""

    @property
    def info(self) -> EngineInfo: ...

    def add(self, request_id: RequestId, state: SequenceState) -> None:
        """Take a sequence over: its known tokens are prompt + emitted. Replaces an earlier one."""

    def drop(self, request_id: RequestId) -> None:
        """Forget a sequence (unknown ids are fine)."""

    def execute(self, plan: StepPlan) -> Sequence[SampledToken]:
        """Run one step and return a token for each work item with `samples`, in plan order.

        The sampled token is appended to the sequence's known tokens at once, so that the next plan
        may compute it. Work of dropped sequences is skipped. Raises `EngineError` when the device
        fails."""


class EngineError(Exception):
    """The device or the engine failed; the worker cannot go on. The last line names cause and
    fix."""
