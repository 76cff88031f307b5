"""The program that tries out grammars before a worker sees them; a process of its own.

Compiling a grammar takes a millisecond as a rule, and for some grammars minutes or all memory: the
library bounds much of its work and not all of it. So what a client sends is compiled here first,
in a process that the server ends when it takes too long. What passes has been compiled as workers
do it, within their limits, and has been walked through for some tokens.

One line of JSON in, one line out: `Check` and `Verdict`; the first line out says that the program
is ready. The program ends with its input.
"""

import ctypes
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import numpy as np
from llguidance import LLMatcher, grammar_from

from appliance.api.call_grammar import CallSpec, lark_of
from appliance.core.types import Record
from appliance.worker.grammar import GrammarFailed, Grammars, in_words

MAX_BUILD_SECONDS = 0.5
MAX_STEP_SECONDS = 0.1
MAX_WALK_SECONDS = 0.3
"""Processor time of compiling with the first mask, of any further mask, and of all of these
together."""
WALKS = 2
WALK_TOKENS = 64
MAX_TOOL_WALKS = 6
"""Walks that are added for tools, one for each up to this many."""
MAX_NESTED_REPEATS = 2_000
"""Copies that repetitions within repetitions of a pattern may amount to."""
MAX_DIVISOR = 10_000
"""Least common multiple of all `multipleOf`, as whole numbers; its automaton grows with the
square."""
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
"""On one line, at most one space behind a comma or a colon: with free white space a model may write
nothing else for ever."""

_PR_SET_PDEATHSIG = 1
_VERBOSE = re.compile(r"\(\?[a-zA-Z]*x")


class Check(Record, frozen=True, kw_only=True):
    """A grammar to be tried: `kind` "json_schema" (`text`: the schema), "regex", "choice" (a JSON
    list of strings) or "tool_calls" (a `CallSpec`). With `lenient`, what cannot be enforced is left
    out and told."""

    kind: str
    text: str
    lenient: bool = False


class Verdict(Record, frozen=True, kw_only=True):
    """The grammar as workers take it, and what it does not enforce; or an `error` in words."""

    grammar: str = ""
    ignored: tuple[str, ...] = ()
    error: str = ""


class Unfit(Exception):
    """Why a grammar is not served."""


class Checker:
    """Tries grammars with one tokenizer."""

    def __init__(self, tokenizer: Path, *, vocab_size: int, ends: tuple[int, ...]) -> None:
        self._grammars = Grammars(tokenizer, vocab_size=vocab_size, most_kept=1)
        self._ends = ends
        self._grammars.num_words(ends)

    def check(self, check: Check) -> Verdict:
        """Compile and walk. Never raises for what a client can send."""
        try:
            text = grammar_of(check)
            failed, messages = LLMatcher.validate_grammar_with_warnings(text)
            if failed:
                raise Unfit(in_words(messages[0]))
            for walked, walks in _walks(check, text):
                self._walk(walked, walks)
        except (Unfit, GrammarFailed) as error:
            return Verdict(error=str(error))
        return Verdict(grammar=text, ignored=tuple(messages))

    def _walk(self, text: str, walks: int) -> None:
        """Say what the grammar allows, at random, and look at what each step costs."""
        for seed in range(walks):
            random, began = Random(seed), time.thread_time()
            grammar = self._grammars.open(text, ends=self._ends, emitted=())
            limit, left = MAX_BUILD_SECONDS, MAX_BUILD_SECONDS + MAX_WALK_SECONDS
            for _ in range(WALK_TOKENS):
                bits = np.unpackbits(grammar.look().view(np.uint8), bitorder="little")
                now = time.thread_time()
                left -= now - began
                if now - began > limit or left < 0:
                    raise Unfit("it takes too long to follow")
                allowed = bits.nonzero()[0]
                token = int(allowed[random.randrange(len(allowed))])
                if token in self._ends:
                    break
                began, limit, left = now, MAX_STEP_SECONDS, min(left, MAX_WALK_SECONDS)
                grammar.push(token)


def grammar_of(check: Check) -> str:
    """The grammar in the library's notation. Raises `Unfit`."""
    match check.kind:
        case "json_schema":
            return _json_grammar(check.text, lenient=check.lenient)
        case "regex":
            refuse_repeats([check.text])
            return str(grammar_from("regex", check.text))
        case "choice":
            return str(grammar_from("choice", check.text))
        case "tool_calls":
            return str(grammar_from("lark", _calls_grammar(check.text)))
        case other:
            raise Unfit(f"{other!r} is not a kind of grammar")


def _json_grammar(text: str, *, lenient: bool) -> str:
    try:
        schema = json.loads(text)
    except RecursionError as error:
        raise Unfit("it is nested too deeply") from error
    except ValueError as error:
        raise Unfit(f"it is not valid JSON: {error}") from error
    if not isinstance(schema, dict):
        raise Unfit("it is not a JSON object")
    return json.dumps({"grammars": [{"json_schema": json.loads(_styled(schema, lenient))}]})


def _walks(check: Check, text: str) -> list[tuple[str, int]]:
    """Grammars to walk through, and how often, so that every part is likely to be met."""
    if check.kind != "tool_calls":
        return [(text, WALKS)]
    spec = msgspec.json.decode(check.text, type=CallSpec)
    walks = WALKS + min(len(spec.tools), MAX_TOOL_WALKS)
    if not spec.prose:
        return [(text, walks)]
    calls = msgspec.json.encode(msgspec.structs.replace(spec, prose=False)).decode()
    return [(text, WALKS), (grammar_of(Check(kind=check.kind, text=calls)), walks)]


def _calls_grammar(text: str) -> str:
    """`text` is a `CallSpec`."""
    try:
        return lark_of(msgspec.json.decode(text, type=CallSpec), _styled)
    except Unfit as error:
        raise Unfit(" ".join([str(error), *getattr(error, "__notes__", ())])) from error
    except RecursionError as error:
        raise Unfit("it is nested too deeply") from error
    except ValueError as error:
        raise Unfit(str(error)) from error


def _styled(schema: dict[str, Any], lenient: bool) -> str:
    """A schema that can be compiled, with what it shall look like. Raises `Unfit`."""
    try:
        words = [*_keywords(schema)]
        refuse_repeats(value for key, value in words if key == "pattern")
        refuse_repeats(key for _, value in words if isinstance(value, dict) for key in value)
        refuse_divisors(value for key, value in words if key == "multipleOf")
        options = {**JSON_STYLE, "lenient": True} if lenient else JSON_STYLE
        return json.dumps({**schema, "x-guidance": options}, allow_nan=False)
    except RecursionError as error:
        raise Unfit("it is nested too deeply") from error
    except ValueError as error:
        raise Unfit(f"it is not valid JSON: {error}") from error


def _keywords(schema: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    """Every key and value within; keys are keywords or names of properties."""
    todo: list[Any] = [schema]
    while todo:
        item = todo.pop()
        if isinstance(item, dict):
            yield from item.items()
            todo += item.values()
        elif isinstance(item, list):
            todo += item


def refuse_repeats(patterns: Iterable[Any]) -> None:
    """Raise `Unfit` for a pattern whose repetitions within repetitions amount to too many copies:
    `(a{300}){300}`."""
    for pattern in patterns:
        if not isinstance(pattern, str):
            continue
        if _VERBOSE.search(pattern):
            raise Unfit("a pattern has comments (flag x)")
        if nested_repeats(pattern) > MAX_NESTED_REPEATS:
            raise Unfit("a pattern has repetitions within repetitions that amount to too much")


def nested_repeats(pattern: str) -> int:
    """Largest product of the counts of repetitions, two or more of them, one within the other."""
    deepest = [(1, 0)]  # per open group: largest product of what is repeated in it, how many
    closed, best, position = (1, 0), 1, 0
    while position < len(pattern):
        letter = pattern[position]
        position += 1
        if letter == "\\":
            closed, position = (1, 0), position + 1
        elif letter == "[":
            closed, position = (1, 0), _class_end(pattern, position)
        elif letter == "(":
            deepest.append((1, 0))
        elif letter == ")" and len(deepest) > 1:
            closed = deepest.pop()
            deepest[-1] = max(deepest[-1], closed)
        elif letter == "{" and (count := _count(pattern, position)) is not None:
            product, depth = closed[0] * count, closed[1] + 1
            deepest[-1] = max(deepest[-1], (product, depth))
            closed, position = (product, depth), pattern.index("}", position) + 1
            if depth > 1:
                best = max(best, product)
        elif letter not in "*+?":
            closed = (1, 0)
    return best


def _class_end(pattern: str, position: int) -> int:
    """Behind the bracket that closes a class of letters."""
    if pattern.startswith("^", position):
        position += 1
    position += 1  # a bracket that comes first is a letter
    while position < len(pattern) and pattern[position] != "]":
        position += 2 if pattern[position] == "\\" else 1
    return position + 1


def _count(pattern: str, position: int) -> int | None:
    """The larger number of `{m}`, `{m,}` or `{m,n}`; None when it is none of them."""
    inside, brace, _ = pattern[position : position + 24].partition("}")
    numbers = inside.split(",")
    if not brace or not numbers[0].isdecimal() or len(numbers) > 2:
        return None
    return max(1, *(int(number) for number in numbers if number.isdecimal()))


def refuse_divisors(values: Iterable[Any]) -> None:
    """Raise `Unfit` when the divisors together need too large an automaton."""
    numbers = [abs(Fraction(str(value))) for value in values if type(value) in (int, float)]
    whole = [number.numerator for number in numbers if number]
    if whole and math.lcm(*whole) > MAX_DIVISOR:
        raise Unfit(f"'multipleOf' is served up to {MAX_DIVISOR} (common multiple of all of them)")


def main() -> None:
    """Serve checks from standard input until it ends. Arguments: tokenizer, vocabulary size, end
    tokens as a JSON list."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    tokenizer, vocab_size, ends = sys.argv[1:]
    said = msgspec.json.Encoder()
    try:
        checker = Checker(Path(tokenizer), vocab_size=int(vocab_size), ends=tuple(json.loads(ends)))
    except GrammarFailed as error:
        _say(said.encode(Verdict(error=str(error))))
        return
    _say(said.encode(Verdict()))
    heard = msgspec.json.Decoder(Check)
    for line in sys.stdin.buffer:
        _say(said.encode(checker.check(heard.decode(line))))


def _say(line: bytes) -> None:
    os.write(sys.stdout.fileno(), line + b"\n")


if __name__ == "__main__":
    main()
