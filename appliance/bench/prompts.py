"""Prompts of given lengths: what they say does not matter, how long they are and how they begin do.

A prompt is a list of token ids where the server takes one, else plain words in about the right
number. Blocks of a shared prefix are made of their id alone, so equal beginnings are equal tokens.
Everything else differs between requests, and between runs by the salt: no run finds what the one
before it left in the server's cache.
"""

from random import Random
from typing import Protocol

from appliance.core.types import Record
from appliance.workload.items import Item

NUM_CHOICES = 256
ID_RANGES = (300, 3)
"""Where the ids that prompts are made of may begin: ordinary tokens in every vocabulary seen so
far; the second for vocabularies of a few hundred."""
# fmt: off
WORDS = (
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world",
    "school", "state", "family", "student", "group", "country", "problem", "hand", "part",
    "place", "case", "week", "company", "system", "program", "question", "work", "government",
    "number", "night", "point", "home", "water", "room", "mother", "area", "money", "story",
    "fact", "month", "lot", "right", "study", "book", "eye", "job", "word", "business", "issue",
    "side", "kind", "head", "house", "service", "friend", "father", "power", "hour", "game",
    "line", "end", "member", "law", "car", "city", "community", "name", "president", "team",
    "minute", "idea", "kid", "body", "information", "back", "parent", "face", "level", "office",
    "door", "health", "person", "art", "war", "history", "party", "result", "change", "morning",
    "reason", "research", "girl", "guy", "moment", "air", "teacher", "force", "education",
)
# fmt: on


class TextScale(Record, frozen=True):
    """How many tokens a server makes of words: `fixed + per_word * words`."""

    per_word: float = 1.0
    fixed: float = 0.0


class PromptMaker(Protocol):
    """Makes the JSON of an item's prompt."""

    def __call__(self, item: Item) -> bytes:
        """The value of `prompt`, encoded."""


class IdPrompts:
    """Lists of token ids: exact lengths."""

    def __init__(self, salt: str, *, first_id: int = ID_RANGES[0]) -> None:
        self._salt = salt
        self._table = [str(first_id + index) for index in range(NUM_CHOICES)]

    def __call__(self, item: Item) -> bytes:
        """`[301,422,...]`, `item.prompt_tokens` long."""
        data = draws(item, salt=self._salt, per_word=1.0, fixed=0)
        return ("[" + ",".join(map(self._table.__getitem__, data)) + "]").encode()


class TextPrompts:
    """Words: about the right number of tokens."""

    def __init__(self, salt: str, *, scale: TextScale) -> None:
        self._salt = salt
        self._scale = scale
        self._table = [WORDS[index % len(WORDS)] for index in range(NUM_CHOICES)]

    def __call__(self, item: Item) -> bytes:
        """`"time year ..."`."""
        scale = self._scale
        data = draws(item, salt=self._salt, per_word=scale.per_word, fixed=scale.fixed)
        return ('"' + " ".join(map(self._table.__getitem__, data)) + '"').encode()


def draws(item: Item, *, salt: str, per_word: float, fixed: float) -> bytes:
    """One byte per word of the item's prompt: first the blocks of its prefix, then its own."""
    num_words = max(1, round((item.prompt_tokens - fixed) / per_word))
    block = max(1, round(item.prefix_block_tokens / per_word))
    parts: list[bytes] = []
    left = num_words
    for name in item.prefix:
        if left <= 0:
            break
        parts.append(Random(f"{salt}/block/{name}").randbytes(block)[:left])
        left -= block
    if left > 0:
        parts.append(Random(f"{salt}/item/{item.index}").randbytes(left))
    return b"".join(parts)


def words_of(num_words: int, *, seed: int = 0) -> str:
    """A text of so many words, to see how many tokens a server makes of it."""
    data = Random(f"calibration/{seed}").randbytes(num_words)
    return " ".join(WORDS[index % len(WORDS)] for index in data)
