"""R21: answers of a fixed form over HTTP: every way to ask for one, alone and in combination."""

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest

from appliance.api.grammars import DESK, Wanted
from tests.api.conftest import LiveServer, start_server

pytestmark = pytest.mark.procs

MESSAGES: Any = [{"role": "user", "content": "What is it?"}]
SCHEMA: Any = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "count": {"type": "integer", "minimum": 3, "maximum": 90},
    },
    "required": ["name", "count"],
    "additionalProperties": False,
}
UNCHECKED = {**SCHEMA, "minProperties": 2, "not": {"required": ["color"]}}


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    """One server for this module; its process for grammars is the module's, not of one test."""
    live = start_server()
    live.call(live.app[DESK].compiled(Wanted(param="first", kind="choice", text='["yes"]')))
    yield live
    live.close()


def strictly(schema: Any, *, strict: bool | None = True) -> Any:
    body = {"name": "answer", "schema": schema}
    if strict is not None:
        body["strict"] = strict
    return {"type": "json_schema", "json_schema": body}


async def chat(client: openai.AsyncOpenAI, **fields: Any) -> Any:
    fields = {"messages": MESSAGES, "max_tokens": 200, "seed": 5, **fields}
    return await client.chat.completions.create(model="tiny", **fields)


async def complete(client: openai.AsyncOpenAI, **fields: Any) -> Any:
    fields = {"prompt": "It is", "max_tokens": 200, "seed": 5, **fields}
    return await client.completions.create(model="tiny", **fields)


def check_text(text: str) -> None:
    jsonschema.validate(json.loads(text), SCHEMA)


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": strictly(SCHEMA)},
        {"response_format": strictly(SCHEMA, strict=False)},
        {"response_format": strictly(SCHEMA, strict=None)},
        {"extra_body": {"guided_json": SCHEMA}},
        {"extra_body": {"guided_json": json.dumps(SCHEMA)}},
        {"extra_body": {"structured_outputs": {"json": SCHEMA}}},
    ],
)
async def test_R21_a_schema_is_obeyed_however_it_is_given(client, fields):
    answer = await chat(client, **fields)
    assert answer.choices[0].finish_reason == "stop"
    check_text(answer.choices[0].message.content)
    answer = await complete(client, **fields_of_completion(fields))
    assert answer.choices[0].finish_reason == "stop"
    check_text(answer.choices[0].text)


def fields_of_completion(fields: dict[str, Any]) -> dict[str, Any]:
    if "response_format" not in fields:
        return fields
    return {"extra_body": {"response_format": fields["response_format"]}}


@pytest.mark.parametrize(
    ("extra", "pattern"),
    [
        ({"guided_regex": "[A-Z]{2}-[0-9]{3}"}, "[A-Z]{2}-[0-9]{3}"),
        ({"structured_outputs": {"regex": "(ab|cd){2,4}"}}, "(ab|cd){2,4}"),
        ({"guided_choice": ["red fox", 'say "no"', "größer"]}, 'red fox|say "no"|größer'),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
    ],
)
async def test_R21_patterns_and_choices_are_obeyed(client, extra, pattern):
    answer = await chat(client, extra_body=extra)
    assert re.fullmatch(pattern, answer.choices[0].message.content)
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("extra", [{"response_format": {"type": "json_object"}},
                                   {"structured_outputs": {"json_object": True}}])  # fmt: skip
async def test_R21_any_object_begins_one_and_never_rambles_in_white_space(client, extra):
    answer = await chat(client, extra_body=extra, max_tokens=60)
    text = answer.choices[0].message.content
    assert text.startswith("{")
    assert "\n" not in text
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


async def test_several_answers_streams_and_logprobs(client):
    fields: Any = {"response_format": strictly(SCHEMA), "n": 3, "logprobs": True, "top_logprobs": 2}
    whole = await chat(client, **fields)
    texts = [choice.message.content for choice in whole.choices]
    for choice in whole.choices:
        check_text(choice.message.content)
        spelled = "".join(entry.token for entry in choice.logprobs.content[:-1])
        assert spelled == choice.message.content
    assert len(set(texts)) > 1
    parts = ["", "", ""]
    async for chunk in await chat(client, **fields, stream=True):
        for choice in chunk.choices:
            parts[choice.index] += choice.delta.content or ""
    assert parts == texts


async def test_a_seed_fixes_an_answer_of_a_fixed_form(client):
    answers = [
        (await chat(client, response_format=strictly(SCHEMA), seed=seed)).choices[0].message.content
        for seed in (1, 1, 2)
    ]
    assert answers[0] == answers[1] != answers[2]


async def test_stop_strings_and_a_small_limit_cut_what_would_be_valid(client):
    answer = await chat(client, response_format=strictly(SCHEMA), stop=['"count"'])
    text = answer.choices[0].message.content
    assert text.rstrip().endswith(",")
    assert "count" not in text
    assert answer.choices[0].finish_reason == "stop"
    answer = await chat(client, response_format=strictly(SCHEMA), max_tokens=3)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 3


async def test_what_a_lenient_schema_cannot_enforce_is_named_in_a_header(client):
    raw = await client.chat.completions.with_raw_response.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=200,
        response_format=strictly(UNCHECKED, strict=False),
    )
    assert raw.headers["x-appliance-ignored"] == "response_format.json_schema.schema"
    check_text(raw.parse().choices[0].message.content)
    with pytest.raises(openai.BadRequestError) as caught:
        await chat(client, response_format=strictly(UNCHECKED))
    assert caught.value.param == "response_format.json_schema.schema"
    assert "not" in caught.value.body["message"]


@pytest.mark.parametrize(
    ("extra", "param", "code"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type", "unsupported_value"),
        ({"response_format": {"type": "structural_tag"}}, "response_format.type",
         "unsupported_value"),
        ({"response_format": {}}, "response_format.type", "missing_required_parameter"),
        ({"response_format": "json"}, "response_format", "invalid_type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema",
         "invalid_value"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
         "response_format.json_schema.schema", "invalid_value"),
        ({"response_format": strictly([1])}, "response_format.json_schema.schema",
         "invalid_value"),
        ({"response_format": strictly({"type": "foo"})}, "response_format.json_schema.schema",
         "invalid_value"),
        ({"guided_json": "nonsense"}, "guided_json", "invalid_value"),
        ({"guided_json": 5}, "guided_json", "invalid_value"),
        ({"guided_json": {"type": "integer", "minimum": 2, "maximum": 1}}, "guided_json",
         "invalid_value"),
        ({"guided_regex": "a("}, "guided_regex", "invalid_value"),
        ({"guided_regex": ""}, "guided_regex", "invalid_value"),
        ({"guided_regex": "x" * 70_000}, "guided_regex", "invalid_value"),
        ({"guided_regex": "(a{999}){999}"}, "guided_regex", "invalid_value"),
        ({"guided_choice": []}, "guided_choice", "invalid_value"),
        ({"guided_choice": ["a", ""]}, "guided_choice", "invalid_value"),
        ({"guided_choice": "abc"}, "guided_choice", "invalid_type"),
        ({"guided_grammar": "root ::= x"}, "guided_grammar", "unsupported_parameter"),
        ({"structured_outputs": {"grammar": "x"}}, "structured_outputs", "invalid_type"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "invalid_value"),
        ({"structured_outputs": {"regex": "a", "json_object": True}},
         "structured_outputs.json_object", "invalid_value"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "unsupported_parameter"),
        ({"guided_regex": "a*", "min_tokens": 3}, "min_tokens", "unsupported_parameter"),
    ],
)  # fmt: skip
async def test_R21_refusals_name_the_field(client, extra, param, code):
    with pytest.raises(openai.BadRequestError) as caught:
        await chat(client, extra_body=extra)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert len(caught.value.body["message"]) < 500


@pytest.mark.parametrize(
    "extra",
    [{"response_format": {"type": "text"}}, {"response_format": None}, {"guided_json": None},
     {"structured_outputs": {}}, {"guided_regex": None, "ignore_eos": True}],
)  # fmt: skip
async def test_asking_for_no_form_changes_nothing(client, extra):
    plain = await chat(client, max_tokens=8)
    same = await chat(client, max_tokens=8, extra_body=extra)
    if "ignore_eos" not in extra:
        assert same.choices[0].message.content == plain.choices[0].message.content
