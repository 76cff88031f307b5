"""What a grammar lets an answer say next: token masks by the llguidance library.

A grammar's state is a function of the ids that the answer has, so a sequence that comes from
another worker is rebuilt by replaying them, and preemption needs nothing. End tokens are allowed
where the answer may end and are the only ones left where it must.

A grammar is compiled once per worker and copied for each answer; copies share what their lexer has
learnt, so the second answer of a schema costs a fraction of the first. All work of a step is
bounded by `limits()`. A grammar that reaches a bound is compiled anew for the answer alone (the
copies together may have used up what one may); if that does not help this answer fails, and no
other.
"""

import re
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

BitMask: TypeAlias = npt.NDArray[np.int32]
"""One bit per token of the vocabulary, low bits first; `[words]`."""
MOST_KEPT = 32
"""Compiled grammars that a worker remembers."""
MAX_WORDS = 200
"""Letters of an error that are passed on."""


def limits() -> LLParserLimits:
    """Bounds of one grammar: some milliseconds for a step, some tens of megabytes for all of its
    states. `verbose_errors` would put the schema into log lines."""
    return LLParserLimits(
        step_lexer_fuel=50_000,
        step_max_items=20_000,
        max_lexer_states=20_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )


class GrammarFailed(Exception):
    """The answer cannot go on under its grammar; says why."""


class Grammars:
    """Compiled grammars of one worker. Reads the tokenizer when the first one is asked for."""

    def __init__(self, tokenizer: Path, *, vocab_size: int, most_kept: int = MOST_KEPT) -> None:
        """`tokenizer` is a `tokenizer.json`; `vocab_size` the width of the logits; `most_kept` the
        compiled grammars that are remembered."""
        self._path = tokenizer
        self._vocab_size = vocab_size
        self._most_kept = most_kept
        self._limits = limits()
        self._tokenizers: dict[tuple[int, ...], LLTokenizer] = {}
        self._kept: OrderedDict[tuple[str, tuple[int, ...]], LLMatcher] = OrderedDict()

    def open(self, text: str, *, ends: tuple[int, ...], emitted: Sequence[int]) -> "Grammar":
        """The state of an answer that has said `emitted`; `ends` are the model's end tokens. Never
        fails: what is wrong is said by the first `look`."""
        return Grammar(self, text, ends=ends, emitted=emitted)

    def matcher(self, text: str, ends: tuple[int, ...], *, anew: bool) -> LLMatcher:
        """A matcher at the start of its answer: a copy, or (`anew`) one that shares nothing with
        the copies given out before. Raises `GrammarFailed`."""
        key = (text, ends)
        if anew or key not in self._kept:
            built = LLMatcher(self._tokenizer(ends), text, log_level=0, limits=self._limits)
            if built.is_error():
                raise GrammarFailed(in_words(built.get_error()))
            self._kept[key] = built
            if len(self._kept) > self._most_kept:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key].deep_copy()

    def num_words(self, ends: tuple[int, ...]) -> int:
        """Length of a mask."""
        return -(-int(self._tokenizer(ends).vocab_size) // 32)

    def _tokenizer(self, ends: tuple[int, ...]) -> LLTokenizer:
        if ends not in self._tokenizers:
            self._tokenizers[ends] = open_tokenizer(
                self._path, ends=ends, vocab_size=self._vocab_size
            )
        return self._tokenizers[ends]


class Grammar:
    """One answer within its grammar."""

    __slots__ = ("_grammars", "_is_over", "_mask", "_matcher", "_said", "_text", "ends")

    def __init__(
        self, grammars: Grammars, text: str, *, ends: tuple[int, ...], emitted: Sequence[int]
    ) -> None:
        self._grammars = grammars
        self._text = text
        self.ends = ends
        self._matcher: LLMatcher | None = None
        self._mask: BitMask = np.zeros(0, np.int32)
        self._said = array("i", emitted)
        self._is_over = bool(self._said) and self._said[-1] in ends

    def look(self) -> BitMask:
        """Which tokens may come next, one bit each; valid until the next call. After an end token
        only end tokens may come. Raises `GrammarFailed`."""
        if self._matcher is None:
            self._matcher = self._replayed(anew=False)
        if not self._filled(self._matcher):
            self._matcher = self._replayed(anew=True)
            if not self._filled(self._matcher):
                words = in_words(self._matcher.get_error())
                raise GrammarFailed(f"after {len(self._said)} tokens {words}")
        return self._mask

    def push(self, token: int) -> None:
        """The answer has one more token, one that was allowed."""
        if self._is_over:
            return
        self._said.append(token)
        self._is_over = token in self.ends
        if self._matcher is not None:
            self._matcher.consume_token(token)

    def _replayed(self, *, anew: bool) -> LLMatcher:
        matcher = self._grammars.matcher(self._text, self.ends, anew=anew)
        matcher.consume_tokens(list(self._said))
        if not len(self._mask):
            self._mask = np.zeros(self._grammars.num_words(self.ends), np.int32)
        return matcher

    def _filled(self, matcher: LLMatcher) -> bool:
        """Write the mask; False when the matcher has failed or allows nothing."""
        if matcher.is_error():
            return False
        matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        return not matcher.is_error() and bool(self._mask.any())


def open_tokenizer(path: Path, *, ends: tuple[int, ...], vocab_size: int) -> LLTokenizer:
    """The library's view of a `tokenizer.json`. Raises `GrammarFailed`."""
    if not ends:
        raise GrammarFailed("the model names no end token, so no grammar could ever end")
    try:
        text = path.read_text(encoding="utf-8")
        found = LLTokenizer(text, eos_token=list(ends))
        if found.vocab_size < vocab_size:  # models pad their vocabulary
            found = LLTokenizer(text, n_vocab=vocab_size, eos_token=list(ends))
    except (OSError, ValueError) as error:
        raise GrammarFailed(f"{path.name} cannot be used with a grammar: {error}") from error
    return found


def in_words(error: str) -> str:
    """What the library says of a grammar, as one short line."""
    if not error or error.startswith("NoExtension"):
        return "no text can follow"
    found = re.search(r"^\s*error: (.+)$", error, re.M) or re.search(
        r"\(in regex\): (.+)$", error, re.M
    )
    line = found[1] if found else error.strip().partition("\n")[0]
    return line if len(line) <= MAX_WORDS else line[: MAX_WORDS - 3] + "..."
