"""One request of a workload, as the client knows it.

`output_tokens` is the truth: the world (or the client that stops reading) knows it, no scheduler is
told. `max_tokens` is what the request says, and every scheduler sees that. Where the specification
has `max_tokens = 0`, as "five" has, the two are equal, so whoever reads `max_tokens` as a length
knows the truth there; a larger number in the specification hides it."""

from appliance.core.types import Record, Slo


class Item(Record, frozen=True, kw_only=True):
    """One request. `at` is seconds from the start of the run; `prefix` holds the ids of successive
    blocks of `prefix_block_tokens` prompt tokens: equal beginnings are a shared prefix, the last id
    may stand for a partly filled block, and tokens beyond them are the item's own."""

    index: int
    at: float
    class_name: str
    prompt_tokens: int
    output_tokens: int
    max_tokens: int
    slo: Slo
    prefix: tuple[int, ...] = ()
    prefix_block_tokens: int = 0
