"""What is refused before a worker sees it: hostile, unsupported and impossible grammars."""

import json
from pathlib import Path
from typing import Any

import pytest

from appliance.api import grammar_check
from appliance.api.grammar_check import (
    Check,
    Checker,
    Unfit,
    grammar_of,
    nested_repeats,
    refuse_divisors,
)
from appliance.worker.grammar import GrammarFailed
from tests.random_schemas import random_schema

TOKENIZER = Path(__file__).parents[2] / "models" / "tiny-tasks" / "tokenizer.json"


@pytest.fixture(scope="module")
def checker() -> Checker:
    return Checker(TOKENIZER, vocab_size=1024, ends=(2,))


def schema_error(checker: Checker, schema: Any, *, lenient: bool = False) -> str:
    text = schema if isinstance(schema, str) else json.dumps(schema)
    return checker.check(Check(kind="json_schema", text=text, lenient=lenient)).error


def regex_error(checker: Checker, pattern: str) -> str:
    return checker.check(Check(kind="regex", text=pattern)).error


def nested(levels: int) -> str:
    return '{"type":"array","items":' * levels + "{}" + "}" * levels


@pytest.mark.parametrize("seed", range(0, 200, 5))
def test_R21_random_schemas_are_served(checker: Checker, seed: int) -> None:
    assert schema_error(checker, random_schema(seed)[0]) == ""


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ("[1]", "not a JSON object"),
        ("{", "not valid JSON"),
        ('{"minimum": 1e999}', "not valid JSON"),
        ('{"minimum": NaN}', "not valid JSON"),
        (nested(150), "recursion limit"),
        (nested(20_000), "nested too deeply"),
        ({"type": "foo"}, "Invalid type: foo"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {"type": "string"}}, '"not"'),
        ({"type": "string", "format": "iri"}, "Unknown format: iri"),
        ({"$ref": "http://x.y/z"}, "http://x.y/z"),
        ({"$ref": "file:///etc/passwd"}, "file:///etc/passwd"),
        ({"$ref": "#"}, "no text can follow"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "Unsatisfiable"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "integer", "multipleOf": 9_999_991}, "multipleOf"),
        ({"allOf": [{"type": "integer", "multipleOf": p} for p in (97, 101, 103)]}, "multipleOf"),
        ({"type": "number", "multipleOf": 0.123457}, "multipleOf"),
        ({"type": "string", "pattern": "(a{300}){300}"}, "repetitions"),
        ({"patternProperties": {"^(x{99}y){99}$": {}}}, "repetitions"),
        ({"allOf": [{"type": "string", "pattern": f"a.{{{i}}}b"} for i in range(1, 20)]}, "regex"),
        ({"allOf": [{"anyOf": [{"type": "object", "properties": {f"p{i}": {"const": j}}}
                               for j in range(4)]} for i in range(12)]}, "too large"),
        ({"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(1200)},
          "additionalProperties": False}, "items"),
    ],
)  # fmt: skip
def test_schemas_that_are_refused_say_why(checker: Checker, schema: Any, words: str) -> None:
    error = schema_error(checker, schema)
    assert words in error
    assert len(error) < 300
    assert "\n" not in error


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("a(", "unclosed group"),
        ("(a)\\1", "backreferences"),
        ("\\bfoo", "lookarounds"),
        ("(" * 300 + ")" * 300, "nested"),
        ("[^\\s\\S]", "no text can follow"),
        ("x(a{1000}){1000}", "repetitions"),
        ("x([a-z]{1,100}){1,100}", "repetitions"),
        ("(?ix)(a{300} # )\n){300}", "flag x"),
    ],
)
def test_regular_expressions_that_are_refused_say_why(
    checker: Checker, pattern: str, words: str
) -> None:
    assert words in regex_error(checker, pattern)


@pytest.mark.parametrize("bound", ["MAX_BUILD_SECONDS", "MAX_STEP_SECONDS", "MAX_WALK_SECONDS"])
def test_what_costs_more_than_a_bound_is_refused(
    checker: Checker, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    monkeypatch.setattr(grammar_check, bound, -1.0)
    assert regex_error(checker, "[a-z]+b") == "it takes too long to follow"


@pytest.mark.parametrize(
    "pattern",
    ["a/b", "a\nb", "(red|green)+", "(?i)abc",
     "\\d{3}-\\d{4}", "([a-z]{1,63}\\.){1,10}[a-z]{2,9}", ".*", "^a$",
     "(a|b)*a(a|b){30}", "日本|größer", "x[a-z]{100000}"],
)  # fmt: skip
def test_regular_expressions_that_are_served(checker: Checker, pattern: str) -> None:
    assert regex_error(checker, pattern) == ""


def test_large_bounds_that_cost_nothing_are_served(checker: Checker) -> None:
    for schema in (
        {"type": "string", "maxLength": 1_000_000_000},
        {"type": "array", "items": {"type": "integer"}, "maxItems": 1_000_000},
        {"type": "integer", "minimum": 1, "maximum": 10**300},
        {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(300)}},
        {"$defs": {"t": {"type": "object", "properties": {"l": {"$ref": "#/$defs/t"}}}},
         "$ref": "#/$defs/t"},
    ):  # fmt: skip
        assert schema_error(checker, schema) == "", schema


def test_what_cannot_be_enforced_is_refused_or_left_out_and_told(checker: Checker) -> None:
    schema = {"type": "array", "uniqueItems": True, "items": {"type": "string", "format": "iri"}}
    assert "uniqueItems" in schema_error(checker, schema)
    verdict = checker.check(Check(kind="json_schema", text=json.dumps(schema), lenient=True))
    assert verdict.error == ""
    assert any("uniqueItems" in words for words in verdict.ignored)
    assert any("iri" in words for words in verdict.ignored)


def test_options_of_the_library_are_not_the_clients_to_set(checker: Checker) -> None:
    schema = {"type": "integer", "x-guidance": {"lenient": True, "item_separator": "(a|b){9}"}}
    verdict = checker.check(Check(kind="json_schema", text=json.dumps(schema)))
    (part,) = json.loads(verdict.grammar)["grammars"]
    assert part["json_schema"]["x-guidance"] == {
        "whitespace_flexible": False,
        "item_separator": ", ?",
        "key_separator": ": ?",
    }


def test_choices_are_served_and_other_kinds_are_not(checker: Checker) -> None:
    choice = Check(kind="choice", text=json.dumps(['say "hi"', "a\\b", "日本\n"]))
    assert checker.check(choice).error == ""
    assert "kind" in checker.check(Check(kind="bnf", text="x")).error


@pytest.mark.parametrize(
    ("pattern", "product"),
    [
        ("a{3}", 1),
        ("(a{3}){4}", 12),
        ("((a{3})*){4}", 12),
        ("[({]{5}x{7}", 1),
        ("(a{2}|b{9}){3}c{100}", 27),
        ("((a{10}b){10}c){10}", 1000),
        ("a\\{3}{4}", 1),
        ("(a{2,}){3,5}", 10),
        ("a{x}(b{1){2}", 1),
        ("))((", 1),
        ("[]a]{3}[^]a]{3}", 1),
        ("(?:x{5}y){6}{7}", 210),
        ("[", 1),
        ("a\\", 1),
        ("(a{99999999999999999999}){9}", 9 * 99999999999999999999),
    ],
)
def test_repetitions_within_repetitions_are_multiplied(pattern: str, product: int) -> None:
    assert nested_repeats(pattern) == product


@pytest.mark.parametrize(
    "fine", [[100] * 5, [0.01], [0.25, 2.5], [1e-7], [7, 11, 13], [True], ["a"], [0]]
)
def test_divisors_that_are_served(fine: list[Any]) -> None:
    refuse_divisors(fine)


@pytest.mark.parametrize("bad", [[7, 11, 13, 17], [10_007], [3.14159265], [1e300]])
def test_divisors_that_are_refused(bad: list[Any]) -> None:
    with pytest.raises(Unfit, match="multipleOf"):
        refuse_divisors(bad)


def test_without_an_end_or_a_tokenizer_there_is_no_checker(tmp_path: Path) -> None:
    with pytest.raises(GrammarFailed, match="end token"):
        Checker(TOKENIZER, vocab_size=1024, ends=())
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(GrammarFailed, match=r"tokenizer\.json cannot be used"):
        Checker(tmp_path / "tokenizer.json", vocab_size=1024, ends=(2,))


def test_a_grammar_is_what_workers_take() -> None:
    parsed = json.loads(grammar_of(Check(kind="regex", text="a/b")))
    assert "start:" in parsed["grammars"][0]["lark_grammar"]
