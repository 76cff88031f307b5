"""What the step loop keeps beside a sequence: its text, and the names of its blocks.

Everything here is a function of the token ids, so a sequence that was served elsewhere before is
rebuilt by replaying what it has emitted.
"""

from array import array
from collections.abc import Sequence

from appliance.core.hashes import chain, root_hash
from appliance.core.payload import SequenceState
from appliance.core.types import BlockHash, Request
from appliance.worker.text import SequenceText, TokenText

_NONE: tuple[BlockHash, ...] = ()


def check_state(state: SequenceState, request: Request, *, emitted: int, block_tokens: int) -> None:
    """Raises `ValueError` when the state is not one of this request after `emitted` tokens."""
    for what, ids, expected in (
        ("prompt", state.prompt, request.prompt_tokens),
        ("emitted", state.emitted, emitted),
    ):
        if len(ids) != 4 * expected:
            raise ValueError(f"{what} has {len(ids)} bytes, {expected} ids of int32 were named")
    named = len(request.prefix_hashes) * block_tokens
    if 4 * named > len(state.prompt) + len(state.emitted):
        raise ValueError(f"prefix_hashes name {named} tokens")


class BlockNames:
    """Names full blocks as a sequence of known tokens grows."""

    __slots__ = ("_block_tokens", "_key", "_parent", "_tail", "names")

    def __init__(
        self,
        state: SequenceState,
        given: Sequence[BlockHash],
        *,
        block_tokens: int,
        key: bytes,
    ) -> None:
        """`given` names leading full blocks of prompt and emitted tokens; the others are named
        here."""
        known = memoryview(state.prompt + state.emitted)
        begin = 4 * block_tokens * len(given)
        parent = given[-1] if given else root_hash(key=key, adapter=state.adapter, salt=state.salt)
        more = chain(known[begin:], block_tokens, key=key, parent=parent)
        self.names: tuple[BlockHash, ...] = (*given, *more)
        """All full blocks known when this was made."""
        self._parent = more[-1] if more else parent
        self._tail = array("i", known[4 * block_tokens * len(self.names) :].tobytes())
        self._block_tokens = block_tokens
        self._key = key

    def push(self, token: int) -> tuple[BlockHash, ...]:
        """Add a known token; returns the name of the block that it filled, if it did."""
        self._tail.append(token)
        if len(self._tail) < self._block_tokens:
            return _NONE
        block = self._tail.tobytes()
        (self._parent,) = chain(block, self._block_tokens, key=self._key, parent=self._parent)
        self._tail = array("i")
        return (self._parent,)


class ServedSequence:
    """One sequence at this worker."""

    __slots__ = ("emitted", "names", "prompt_ids", "text")

    def __init__(
        self,
        state: SequenceState,
        names: BlockNames | None,
        *,
        tokens: TokenText,
        keep_prompt: bool = False,
    ) -> None:
        """`names` is None without a prefix cache. `keep_prompt` remembers which ids the prompt
        has (for fault plans that look for one)."""
        self.text = SequenceText(tokens, state.sampling)
        self.emitted = array("i", state.emitted)
        """Ids of the answer so far."""
        for token in self.emitted:
            self.text.push(token)
        self.names = names
        self.prompt_ids = frozenset(array("i", state.prompt)) if keep_prompt else frozenset[int]()
