"""Sticky prefixes: a request goes where the longest part of its prompt has been, unless that worker
is overloaded.

After the cache-aware routers of SGLang (Zheng et al., NeurIPS 2024, section 3, and its router) and
vLLM. The router remembers for each block of a prompt the worker that it last sent it to, and sees
what workers say they have cached. If that covers at least the share `match` of the prompt, the
request goes there; otherwise, and while the requests are spread too unevenly over the workers (by
more than `gap` requests *and* a factor of `ratio`), it goes where the fewest are. The queue is
first come, first served; deadlines and lengths play no part."""

from collections.abc import Mapping, Sequence
from typing import Annotated

import msgspec

from appliance.core.slots import Policy
from appliance.core.types import BlockHash, Phase, Request, WorkerId
from appliance.core.view import NodeView
from appliance.policy.dispatch_parts import place_least, slots
from appliance.policy.least_loaded import num_requests
from appliance.policy.parts import fcfs_batch
from appliance.policy.settings import read_settings

Positive = Annotated[int, msgspec.Meta(ge=1)]


class StickyPrefixSettings(msgspec.Struct, frozen=True, kw_only=True):
    """When a prefix decides, and when the load does."""

    match: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.3
    gap: Annotated[int, msgspec.Meta(ge=0)] = 32
    ratio: Annotated[float, msgspec.Meta(ge=1)] = 1.5
    remembered_blocks: Positive = 1 << 17
    """Blocks whose last worker is remembered; the oldest are forgotten."""


class StickyRouter:
    """The slot `place`. What it remembers: which worker a block of a prompt last went to."""

    def __init__(self, settings: StickyPrefixSettings) -> None:
        self._settings = settings
        self._spread = place_least(num_requests)
        self._sent: dict[BlockHash, WorkerId] = {}

    def __call__(
        self, view: NodeView, request: Request, phase: Phase, now: float
    ) -> WorkerId | None:
        """The worker with the longest prefix, or the one with the fewest requests."""
        if phase is Phase.DECODE:
            return self._spread(view, request, phase, now)
        willing = view.willing(request, now, phase)
        if not willing:
            return None
        chosen = self._stick(view, willing, request)
        if chosen is None:
            chosen = self._spread(view, request, phase, now)
        if chosen is not None:
            self._remember(request.prefix_hashes, chosen)
        return chosen

    def _stick(
        self, view: NodeView, willing: Sequence[WorkerId], request: Request
    ) -> WorkerId | None:
        hashes, settings, workers = request.prefix_hashes, self._settings, view.workers
        if not hashes:
            return None
        loads = {each: num_requests(workers[each]) for each in willing}
        least, most = min(loads.values()), max(loads.values())
        if most - least > settings.gap and most > settings.ratio * least:
            return None
        sent = self._match(hashes)
        found = {each: max(sent.get(each, 0), view.cached_blocks(each, hashes)) for each in willing}
        best = max(willing, key=lambda each: (found[each], -loads[each], -each))
        covered = found[best] * workers[best].block_tokens
        enough = found[best] and covered >= settings.match * request.prompt_tokens
        return best if enough else None

    def _match(self, hashes: Sequence[BlockHash]) -> dict[WorkerId, int]:
        """Leading blocks that were sent to each worker. A prompt that parts ways with an older one
        takes the common blocks along, so the last worker of a block has those before it too."""
        known: dict[WorkerId, int] = {}
        for index, name in enumerate(hashes):
            worker = self._sent.get(name)
            if worker is None:
                break
            known[worker] = index + 1
        return known

    def _remember(self, hashes: Sequence[BlockHash], worker: WorkerId) -> None:
        sent = self._sent
        for name in hashes:
            sent.pop(name, None)
            sent[name] = worker
        while len(sent) > self._settings.remembered_blocks:
            del sent[next(iter(sent))]


def sticky_prefix(settings: Mapping[str, object]) -> Policy:
    """The policy. Raises `PolicySettingsError` for a setting it does not have."""
    known = read_settings(StickyPrefixSettings, settings, policy="sticky-prefix")
    return Policy(
        name="sticky-prefix", dispatch=slots(place=StickyRouter(known)), batch=fcfs_batch()
    )
