"""Malformed bodies get a typed error that names the field; unknown fields are only named."""

import json

import pytest

from appliance.api.decode import BodyDecoder
from appliance.api.errors import ApiError
from appliance.api.schemas import (
    COMPLETIONS_REFUSED,
    REFUSED,
    ChatBody,
    CompletionBody,
    fields_of,
)

MESSAGES = [{"role": "user", "content": "hi"}]


def refusal(data: bytes | dict) -> ApiError:
    raw = data if isinstance(data, bytes) else json.dumps(data).encode()
    with pytest.raises(ApiError) as caught:
        BodyDecoder(ChatBody).decode(raw)
    assert caught.value.status == 400
    assert caught.value.body.type == "invalid_request_error"
    assert caught.value.body.message
    return caught.value


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"  \n",
        b"{",
        b"{} {}",
        b"\xff\xfe",
        b'{"messages":"\xff"}',
        b"\xef\xbb\xbf{}",
        b'{"messages":[],"temperature":NaN}',
        b'{"messages":[],"temperature":Infinity}',
        b'{"messages":[],"x":-Infinity}',
        b'{"messages":[{"role":"user","content":"\\ud800"}]}',
        b'{"messages":[],"x":"\x01"}',
    ],
)
def test_what_is_not_json_is_refused(raw):
    assert refusal(raw).body.code == "invalid_json"


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'{"messages":[', b'{"x":[[[['])
def test_deep_nesting_is_refused(opening):
    assert refusal(opening * 50_000).body.code in {"invalid_json", "invalid_type"}


@pytest.mark.parametrize("raw", [b"[]", b"1", b'"x"', b"null", b"true"])
def test_a_body_that_is_no_object_is_refused(raw):
    error = refusal(raw)
    assert error.body.code == "invalid_type"
    assert "object" in error.body.message


def test_a_key_given_twice_is_refused_at_any_depth():
    top = refusal(b'{"messages":[],"seed":1,"seed":1}')
    assert (top.body.code, top.body.param) == ("duplicate_key", "seed")
    prefix = refusal(b'{"messages":[],"seed":1,"seed":12}')
    assert (prefix.body.code, prefix.body.param) == ("duplicate_key", "seed")
    escaped = refusal(b'{"messages":[],"n":1, "\\u006e" : 2}')
    assert (escaped.body.code, escaped.body.param) == ("duplicate_key", "n")
    inner = refusal(b'{"messages":[{"role":"user","role":"system","content":""}]}')
    assert (inner.body.code, inner.body.param) == ("duplicate_key", "role")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"n": []}, "n"),
        ({"stop": 5}, "stop"),
        ({"stop": ["a", 5]}, "stop[1]"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": True}, "stream_options"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": 3, "content": ""}]}, "messages[0].role"),
        ({"messages": [{"content": ""}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": {}}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{}]}]}, "messages[0].content[0].type"),
        ({"slo": {"tfft_ms": 5}}, "slo"),
        ({"slo": {"ttft_ms": "5"}}, "slo.ttft_ms"),
        ({"logprobs": 3}, "logprobs"),
        ({"seed": 1e300}, "seed"),
    ],
)
def test_a_wrong_type_names_the_field(change, param):
    assert refusal({"messages": MESSAGES, **change}).body.param == param


def test_an_object_in_which_nothing_must_be_lost_names_what_it_knows():
    error = refusal({"messages": MESSAGES, "slo": {"ttft": 5}})
    assert "no field 'ttft'; known: ttft_ms, tpot_ms, e2e_ms, class" in error.body.message


def test_a_missing_field_is_named():
    error = refusal({"model": "m"})
    assert (error.body.code, error.body.param) == ("missing_required_parameter", "messages")


def test_integers_are_taken_for_floats_and_null_for_absent():
    body = {"messages": MESSAGES, "temperature": 1, "top_p": 0, "stop": None, "n": None}
    decoded = BodyDecoder(ChatBody).decode(json.dumps(body).encode())
    assert decoded.body.temperature == 1.0
    assert decoded.body.stop is None
    assert decoded.ignored == ()


MATTERS = {
    "length_penalty": 2,
    "no_repeat_ngram_size": 3,
    "logits_processors": ["x"],
    "allowed_token_ids": [1],
    "bad_words": ["no"],
    "best_of": 2,
    "use_beam_search": True,
    "echo": True,
    "suffix": "end",
    "prompt_logprobs": 1,
    "prompt_embeds": "AAAA",
    "truncate_prompt_tokens": 5,
    "tools": [{"type": "function"}],
    "tool_choice": "auto",
    "functions": [{"name": "f"}],
    "function_call": "auto",
    "modalities": ["text", "audio"],
    "audio": {"voice": "x"},
    "prediction": {"type": "content"},
    "reasoning": {"effort": "low"},
    "reasoning_effort": "low",
    "thinking": {"type": "enabled"},
    "thinking_token_budget": 5,
    "verbosity": "high",
    "web_search_options": {},
    "guided_grammar": "root ::= x",
    "chat_template": "{{ messages }}",
    "documents": [{"text": "x"}],
    "continue_final_message": True,
    "mm_processor_kwargs": {"a": 1},
    "detokenize": False,
    "spaces_between_special_tokens": False,
    "return_tokens_as_token_ids": True,
    "return_token_ids": True,
}
NEUTRAL = {
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "logit_bias": {},
    "best_of": 1,
    "echo": False,
    "suffix": "",
    "response_format": {"type": "text"},
    "tools": [],
    "tool_choice": "none",
    "functions": [],
    "function_call": "none",
    "modalities": ["text"],
    "reasoning_effort": "none",
    "verbosity": "medium",
    "detokenize": True,
    "continue_final_message": False,
    "parallel_tool_calls": True,
    "metadata": {"a": "b"},
    "store": False,
    "user": "someone",
}


def test_every_refused_field_has_a_case_here():
    assert set(MATTERS) == set(REFUSED)


@pytest.mark.parametrize("name", sorted(MATTERS))
def test_r21_a_field_that_would_change_the_answer_is_refused_by_name(name):
    if name in fields_of(ChatBody):  # plain completions have no use for it
        with pytest.raises(ApiError) as caught:
            BodyDecoder(CompletionBody).decode(
                json.dumps({"prompt": "x", name: MATTERS[name]}).encode()
            )
        error = caught.value
    else:
        error = refusal({"messages": MESSAGES, name: MATTERS[name]})
    assert (error.body.code, error.body.param) == ("unsupported_parameter", name)
    assert name in error.body.message


@pytest.mark.parametrize("value", [True, [], "0", {"a": 1}])
def test_a_neutral_number_is_not_taken_from_another_type(value):
    error = refusal({"messages": MESSAGES, "presence_penalty": value})
    assert error.body.param == "presence_penalty"


def test_neutral_values_are_accepted_and_not_called_ignored():
    body = {"messages": MESSAGES, **NEUTRAL, "guided_json": None, "web_search_options": None}
    assert BodyDecoder(ChatBody).decode(json.dumps(body).encode()).ignored == ()


def test_r21_unknown_fields_are_accepted_and_named():
    body = {"prompt": "x", "best_friend": 1, "evil\r\nset-cookie": 2, "top_logprobs": 3}
    decoded = BodyDecoder(CompletionBody).decode(json.dumps(body).encode())
    assert decoded.ignored == ("best_friend", "?", "top_logprobs")


def test_the_names_of_ignored_fields_are_bounded():
    body = {"prompt": "x", **{f"field{i}": i for i in range(1000)}}
    assert len(BodyDecoder(CompletionBody).decode(json.dumps(body).encode()).ignored) == 32


def test_fields_inside_objects_that_nobody_looks_at_are_named():
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}", "x": 1}}
    body = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {}}]},
            {"role": "user", "content": "hi", "cache_control": {"type": "ephemeral"}},
            {"role": "assistant", "tool_calls": [call], "cache_control": None},
        ],
        "chat_template_kwargs": {"anything": {"goes": 1}},
        "stream": True,
        "stream_options": {"include_usage": True, "chunk_size": 3},
        "nothing": 1,
    }
    decoded = BodyDecoder(ChatBody).decode(json.dumps(body).encode())
    assert decoded.ignored == (
        "nothing",
        "messages.content.cache_control",
        "messages.cache_control",
        "messages.tool_calls.function.x",
        "stream_options.chunk_size",
    )


@pytest.mark.parametrize("name", ["max_completion_tokens", "top_logprobs"])
def test_r21_names_of_chat_are_refused_in_plain_completions(name):
    with pytest.raises(ApiError) as caught:
        BodyDecoder(CompletionBody, refused=COMPLETIONS_REFUSED).decode(
            json.dumps({"prompt": "x", name: 5}).encode()
        )
    assert (caught.value.body.code, caught.value.body.param) == ("unsupported_parameter", name)
