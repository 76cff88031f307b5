"""The long task: a text of known words hides a secret word, color and number; one is asked for.

The secrets stand in sentences with fixed wording ("The secret word is lemon."), so the task asks
a model to look back over the whole text, not to understand it. Texts have 200 to 3,500 tokens.
"""

import random
from collections.abc import Mapping
from types import MappingProxyType

from tools.task_record import (
    COLORS,
    WORDS,
    Split,
    Task,
    checksum_holds_out,
    draw_number,
    fits,
)

MIN_NEEDLE_TOKENS, MAX_NEEDLE_TOKENS = 200, 3500
SECRETS = ("word", "color", "number")
_TOKENS_PER_WORD = 2.16
_FRAME_TOKENS = 55
_NUMBER_FRACTION = 0.03
_MIN_SENTENCE, _MAX_SENTENCE = 5, 14


def secret_question(kind: str) -> str:
    """The question for the secret `kind` (a member of `SECRETS`)."""
    return f"What is the secret {kind}?"


def _filler(rng: random.Random, num_words: int) -> list[str]:
    sentences: list[str] = []
    while num_words > 0:
        length = rng.randint(_MIN_SENTENCE, _MAX_SENTENCE)
        words = [
            str(draw_number(rng)) if rng.random() < _NUMBER_FRACTION else rng.choice(WORDS + COLORS)
            for _ in range(length)
        ]
        sentences.append(" ".join(words) + ".")
        num_words -= length
    return sentences


def needle_text(rng: random.Random, *, num_tokens: int) -> tuple[str, Mapping[str, str]]:
    """A text of about `num_tokens` tokens, and its secrets by kind."""
    values = {
        "word": rng.choice(WORDS),
        "color": rng.choice(COLORS),
        "number": str(draw_number(rng)),
    }
    sentences = _filler(rng, round((num_tokens - _FRAME_TOKENS) / _TOKENS_PER_WORD))
    for kind in SECRETS:
        sentence = f"The secret {kind} is {values[kind]}."
        sentences.insert(rng.randint(0, len(sentences)), sentence)
    return "Read this text. " + " ".join(sentences), MappingProxyType(values)


def needle(rng: random.Random, *, num_tokens: int, split: Split = "any") -> Task:
    """A text of about `num_tokens` tokens with one question after it.

    Its content (`key`) is the secrets, the length and which of them is asked for.
    """
    while True:
        text, values = needle_text(rng, num_tokens=num_tokens)
        kind = rng.choice(SECRETS)
        key = f"{kind} {values[kind]} {' '.join(values.values())} {num_tokens}"
        task = Task(
            name="needle",
            prompt=f"{text}\n{secret_question(kind)}",
            answer=values[kind],
            key=key,
            is_held_out=checksum_holds_out("needle", key),
        )
        if fits(task, split):
            return task


def draw_needle(rng: random.Random) -> Task:
    """A needle in a text of any length, every length equally likely."""
    return needle(rng, num_tokens=rng.randint(MIN_NEEDLE_TOKENS, MAX_NEEDLE_TOKENS))
