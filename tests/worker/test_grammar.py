"""Grammars: what may follow, where answers end, and that their state is a function of the ids."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import jsonschema
import pytest
from llguidance import LLParserLimits

from appliance.api.grammar_check import Check, grammar_of
from appliance.worker import grammar as module
from appliance.worker.grammar import Grammar, GrammarFailed, Grammars, in_words
from appliance.worker.text import TokenText
from tests.random_schemas import random_schema

TOKENIZER = Path(__file__).resolve().parents[2] / "models" / "tiny-tasks" / "tokenizer.json"
EOS = 2
ENDS = (EOS,)


@pytest.fixture(scope="module")
def tokens() -> TokenText:
    return TokenText.load(TOKENIZER.parent)


@pytest.fixture
def grammars() -> Grammars:
    return Grammars(TOKENIZER, vocab_size=1024)


def regex(pattern: str) -> str:
    return grammar_of(Check(kind="regex", text=pattern))


def allowed(grammar: Grammar) -> list[int]:
    words = grammar.look()
    return [t for t in range(len(words) * 32) if int(words[t // 32]) >> (t % 32) & 1]


def say(grammar: Grammar, rng: random.Random, *, limit: int = 3000) -> list[int]:
    """Any answer that the grammar allows; the end is preferred where it may be."""
    said: list[int] = []
    while len(said) < limit:
        among = allowed(grammar)
        said.append(EOS if EOS in among else rng.choice(among))
        grammar.push(said[-1])
        if said[-1] == EOS:
            return said
    raise AssertionError("no end")


def text_of(tokens: TokenText, ids: Sequence[int]) -> str:
    stream = tokens.stream()
    return "".join(map(stream.push, ids)) + stream.flush()


@pytest.mark.parametrize("seed", range(40))
def test_R21_whatever_a_schemas_grammar_lets_through_is_valid(
    grammars: Grammars, tokens: TokenText, seed: int
) -> None:
    schema, _ = random_schema(seed)
    text = grammar_of(Check(kind="json_schema", text=json.dumps(schema)))
    for turn in range(3):
        ids = say(grammars.open(text, ends=ENDS, emitted=()), random.Random(turn))
        jsonschema.Draft202012Validator(schema).validate(json.loads(text_of(tokens, ids[:-1])))


def test_R5_an_answer_taken_over_at_any_token_goes_on_alike(grammars: Grammars) -> None:
    schema, _ = random_schema(8)
    text = grammar_of(Check(kind="json_schema", text=json.dumps(schema)))
    stayed = grammars.open(text, ends=ENDS, emitted=())
    ids = say(grammars.open(text, ends=ENDS, emitted=()), random.Random(2))
    elsewhere = Grammars(TOKENIZER, vocab_size=1024)
    for place, token in enumerate(ids):
        moved = elsewhere.open(text, ends=ENDS, emitted=ids[:place])
        assert allowed(moved) == allowed(stayed)
        stayed.push(token)


def test_the_end_is_allowed_where_the_answer_may_end_and_alone_where_it_must(
    grammars: Grammars, tokens: TokenText
) -> None:
    grammar = grammars.open(regex("(ab){1,2}"), ends=ENDS, emitted=())
    may_end = []
    while (among := allowed(grammar)) != [EOS]:
        may_end.append(EOS in among)
        grammar.push(next(token for token in among if token != EOS))
    assert not may_end[0]
    assert may_end.count(True) == 1
    grammar.push(EOS)
    assert allowed(grammar) == [EOS]  # steps that were planned ahead still look
    grammar.push(EOS)
    assert allowed(grammar) == [EOS]


def test_answers_of_one_grammar_do_not_touch_each_other(grammars: Grammars) -> None:
    text = regex("a{1,3}|b{1,3}")
    first, second = (grammars.open(text, ends=ENDS, emitted=()) for _ in range(2))
    fresh = allowed(second)
    first.push(allowed(first)[0])
    assert allowed(second) == fresh != allowed(first)


def test_special_tokens_other_than_ends_are_never_allowed(
    grammars: Grammars, tokens: TokenText
) -> None:
    grammar = grammars.open(regex("(.|\n)*"), ends=ENDS, emitted=())
    assert set(allowed(grammar)) & tokens.special == {EOS}


def test_a_padded_vocabulary_and_several_ends(tokens: TokenText) -> None:
    wide = Grammars(TOKENIZER, vocab_size=1100)
    grammar = wide.open(regex("a"), ends=(2, 6), emitted=())
    assert len(grammar.look()) * 32 >= 1100
    assert max(allowed(grammar)) < tokens.num_tokens
    grammar.push(allowed(grammar)[0])
    assert allowed(grammar) == [2, 6]


def test_what_cannot_follow_its_grammar_fails_with_words(grammars: Grammars) -> None:
    with pytest.raises(GrammarFailed, match="no end token"):
        grammars.open(regex("a"), ends=(), emitted=()).look()
    with pytest.raises(GrammarFailed, match=r"cannot be used with a grammar"):
        Grammars(TOKENIZER.parent / "none.json", vocab_size=9).open(
            regex("a"), ends=ENDS, emitted=()
        ).look()
    with pytest.raises(GrammarFailed, match="unclosed group"):
        grammars.open(regex("a("), ends=ENDS, emitted=()).look()
    with pytest.raises(GrammarFailed, match="after 1 tokens"):
        grammars.open(regex("b"), ends=ENDS, emitted=[70]).look()
    with pytest.raises(GrammarFailed, match="after 0 tokens no text can follow"):
        grammars.open(regex("[^\\s\\S]"), ends=ENDS, emitted=()).look()


def test_a_grammar_whose_copies_used_up_its_bounds_is_compiled_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few = LLParserLimits(max_lexer_states=900, verbose_errors=False)
    monkeypatch.setattr(module, "limits", lambda: few)
    grammars = Grammars(TOKENIZER, vocab_size=1024)
    text = regex(".*a.{30}b.{30}c")
    compiled = []
    built = Grammars.matcher
    monkeypatch.setattr(
        Grammars,
        "matcher",
        lambda self, *args, anew: compiled.append(anew) or built(self, *args, anew=anew),
    )
    for seed in range(12):
        rng = random.Random(seed)
        grammar = grammars.open(text, ends=ENDS, emitted=())
        for _ in range(15):
            grammar.push(rng.choice([t for t in allowed(grammar) if t != EOS]))
    assert 0 < compiled.count(True) < 12


def test_only_so_many_grammars_are_remembered() -> None:
    grammars = Grammars(TOKENIZER, vocab_size=1024, most_kept=2)
    opened = [grammars.open(regex(f"a{{{n}}}"), ends=ENDS, emitted=()) for n in (1, 2, 3)]
    assert all(EOS not in allowed(grammar) for grammar in opened)
    assert len(grammars._kept) == 2
    for count, grammar in enumerate(opened, 1):  # those that were forgotten still serve
        spelled = 0
        while allowed(grammar) != [EOS]:
            grammar.push(next(t for t in allowed(grammar) if t != EOS))
            spelled += 1
        assert 1 <= spelled <= count


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("", "no text can follow"),
        ("NoExtensionBias\n<non-verbose/>", "no text can follow"),
        ("at 1(8): invalid regex:\n  a(\n  ^\nerror: unclosed group\n   1 | x", "unclosed group"),
        ("first\nsecond", "first"),
        ("x" * 999, "x" * 197 + "..."),
    ],
)
def test_errors_of_the_library_become_one_short_line(error: str, words: str) -> None:
    assert in_words(error) == words
