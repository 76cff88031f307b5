"""Answers that must or may call tools: what their grammar lets through is read back as calls."""

import json
from typing import Any

import msgspec
import pytest
from llguidance import LLMatcher
from tokenizers import Tokenizer

from appliance.api.call_grammar import CallSpec, CallTool
from appliance.api.grammar_check import Check, Checker, grammar_of
from appliance.api.parts import joined
from appliance.api.tool_parsers import FORMATS
from appliance.worker.grammar import limits, open_tokenizer

PLACE = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER, ADD = CallTool(name="weather", parameters=PLACE), CallTool(name="add")
NAMES = ("weather", "add")


def check_of(**fields: Any) -> Check:
    spec = CallSpec(**{"format": "hermes", "tools": (WEATHER, ADD), **fields})
    return Check(kind="tool_calls", text=msgspec.json.encode(spec).decode())


class Gate:
    """Which answers a grammar lets through."""

    def __init__(self, model, **fields: Any) -> None:
        path = model / "tokenizer.json"
        self._tokenizer = Tokenizer.from_file(str(path))
        self._library = open_tokenizer(path, ends=(2,), vocab_size=1024)
        self._grammar = grammar_of(check_of(**fields))

    def allows(self, text: str) -> bool:
        """Whether an answer may be this, and end there."""
        matcher = LLMatcher(self._library, self._grammar, log_level=0, limits=limits())
        assert not matcher.is_error(), matcher.get_error()
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def hermes(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def llama(name: str, arguments: str) -> str:
    return f'{{"name": "{name}", "parameters": {arguments}}}'


PARIS = '{"city": "Paris", "days": 3}'


@pytest.mark.parametrize(
    ("form", "write", "between"), [("hermes", hermes, "\n"), ("llama3_json", llama, "; ")]
)
def test_required_calls_are_calls_and_nothing_else(tiny_model, form, write, between):
    gate = Gate(tiny_model, format=form)
    good = [
        write("weather", PARIS),
        write("weather", '{"city":"Rome"}'),
        write("add", "{}"),
        write("weather", PARIS) + between + write("add", "{}"),
    ]
    for text in good:
        assert gate.allows(text)
        parser = FORMATS[form].make(NAMES, eager=False, max_calls=None)
        prose, _, calls = joined([*parser.push(text), *parser.flush()])
        assert prose == ""
        assert len(calls) == 1 + (text == good[-1])
    for text in [
        "",
        "Hello " + good[0],
        good[0] + " bye",
        write("nobody", "{}"),
        write("weather", "{}"),
        write("weather", '{"city": 5}'),
        write("weather", '{"city": "Rome", "hours": 2}'),
        write("add", '{"a": 1}'),
        good[0][:-3],
    ]:
        assert not gate.allows(text), text


@pytest.mark.parametrize(
    ("form", "write", "between"), [("hermes", hermes, "\n"), ("llama3_json", llama, "; ")]
)
def test_one_call_when_more_are_not_wanted(tiny_model, form, write, between):
    gate = Gate(tiny_model, format=form, parallel=False)
    assert gate.allows(write("add", "{}"))
    assert not gate.allows(write("add", "{}") + between + write("add", "{}"))


def test_prose_is_free_and_what_looks_like_a_call_is_one(tiny_model):
    call = hermes("weather", PARIS)
    gate = Gate(tiny_model, prose=True)
    for text in ["", "a < b\n<tool_ca", call, f"Look:\n{call}\n{call} Done.", "{}"]:
        assert gate.allows(text), text
    for text in ["<tool_call>", "<tool_call>hello</tool_call>", hermes("nobody", "{}")]:
        assert not gate.allows(text), text
    one = Gate(tiny_model, prose=True, parallel=False)
    assert one.allows("Look: " + call)
    assert one.allows("Nothing.")
    assert not one.allows(call + call)


def test_prose_of_a_model_that_writes_bare_json(tiny_model):
    gate = Gate(tiny_model, format="llama3_json", prose=True)
    for text in ["", "It is {fine}.", llama("add", "{}")]:
        assert gate.allows(text), text
    for text in ["{", '{"name": "nobody"}', ' {"name"']:
        assert not gate.allows(text), text


def test_a_document_or_a_call(tiny_model):
    gate = Gate(tiny_model, document=json.dumps(PLACE))
    assert gate.allows(PARIS)
    assert gate.allows(hermes("add", "{}"))
    assert not gate.allows(PARIS + hermes("add", "{}"))
    assert not gate.allows("{}")


def test_tags_that_are_tokens_of_markup_are_those_tokens():
    check = check_of(special=("</tool_call>", "<tool_call>"))
    assert "<tool_call> body" in json.dumps(grammar_of(check))
    prose = check_of(special=("</tool_call>", "<tool_call>"), prose=True)
    assert "PROSE <tool_call> body" in json.dumps(grammar_of(prose))


@pytest.fixture(scope="module")
def checker(tiny_model):
    return Checker(tiny_model / "tokenizer.json", vocab_size=1024, ends=(2,))


@pytest.mark.parametrize(
    "fields",
    [{}, {"prose": True}, {"parallel": False}, {"document": json.dumps(PLACE)},
     {"format": "llama3_json"}, {"format": "llama3_json", "prose": True}],
)  # fmt: skip
def test_the_grammars_pass_their_own_check(checker, fields):
    verdict = checker.check(check_of(**fields))
    assert verdict.error == ""
    assert verdict.grammar


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"type": "array"}, "'f' are no object"),
        ({"type": "object", "properties": {"a": {"type": 5}}}, ""),
        ({"properties": {"a": {"type": "string", "pattern": "((a{90}){90}){90}"}}}, "of 'f'"),
    ],
)
@pytest.mark.parametrize("prose", [False, True])
def test_a_schema_that_cannot_be_served_is_refused(checker, parameters, words, prose):
    tool = CallTool(name="f", parameters=parameters, strict=True)
    verdict = checker.check(check_of(tools=(tool,), prose=prose))
    assert verdict.error
    assert words in verdict.error


def test_what_a_schema_that_is_not_strict_cannot_enforce_is_told(checker):
    loose = {"type": "object", "properties": {"a": {"type": "string", "contentEncoding": "x",
                                                    "format": "no-such-format"}}}  # fmt: skip
    for strict in (False, True):
        tool = CallTool(name="f", parameters=loose, strict=strict)
        verdict = checker.check(check_of(tools=(tool,)))
        assert bool(verdict.error) is strict
        assert bool(verdict.ignored) is not strict
