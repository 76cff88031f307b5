"""Messages, texts and ids; and whether they leave room for an answer."""

import msgspec
import pytest

from appliance.api.errors import ApiError
from appliance.api.prompts import check_ids, prompts_of, room_for
from appliance.api.schemas import Message
from appliance.api.turns import loaded_arguments, turns_of
from appliance.api.validate import Limits

LIMITS = Limits(max_model_len=100, vocab_size=1000, max_sequences=8)


def turns(*messages):
    return turns_of(msgspec.convert(list(messages), list[Message]))


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert turns(
        {"role": "system", "content": "s"}, {"role": "user", "content": parts, "name": "n"}
    ) == [{"role": "system", "content": "s"}, {"role": "user", "content": "ab", "name": "n"}]


@pytest.mark.parametrize(
    ("message", "param", "code"),
    [
        ({"role": "function", "content": "x"}, "messages[0].role", "unsupported_value"),
        ({"role": "tool", "content": "x"}, "messages[0].tool_call_id", "invalid_value"),
        ({"role": "tool", "content": "x", "tool_call_id": "c9"}, "messages[0].tool_call_id",
         "invalid_value"),
        ({"role": "user", "content": "x", "tool_call_id": "c9"}, "messages[0].tool_call_id",
         "invalid_value"),
        ({"role": "user", "content": "x", "reasoning_content": "y"},
         "messages[0].reasoning_content", "invalid_value"),
        ({"role": "user", "content": "x", "tool_calls": [{"id": "1", "function": {"name": "f"}}]},
         "messages[0].tool_calls", "invalid_value"),
        ({"role": "user\n", "content": "x"}, "messages[0].role", "unsupported_value"),
        ({"role": "user"}, "messages[0].content", "invalid_value"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
            "messages[0].content[0].type",
            "unsupported_value",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text",
         "invalid_value"),
        ({"role": "assistant", "tool_calls": [{"id": "1", "type": "custom",
                                               "function": {"name": "f"}}]},
         "messages[0].tool_calls", "unsupported_value"),
        ({"role": "assistant", "content": "", "function_call": {"name": "f"}},
         "messages[0].function_call", "unsupported_parameter"),
        ({"role": "assistant", "content": "", "audio": {"id": 1}}, "messages[0].audio",
         "unsupported_parameter"),
    ],
)  # fmt: skip
def test_r21_what_a_message_may_not_have_is_refused_by_name(message, param, code):
    with pytest.raises(ApiError) as caught:
        turns(message)
    assert (caught.value.body.param, caught.value.body.code) == (param, code)


def test_calls_and_their_results_are_turns():
    arguments = '{"a": [1, "\\u00e9"]}'
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    found = turns(
        {"role": "user", "content": "x"},
        {"role": "assistant", "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "content": [{"type": "text", "text": "3"}], "tool_call_id": "c1"},
    )
    loaded = {**call, "function": {"name": "f", "arguments": {"a": [1, "\u00e9"]}}}
    assert found[1:] == [
        {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [loaded]},
        {"role": "tool", "content": "3", "tool_call_id": "c1"},
    ]


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": "\\ud800"}', "[" * 100_000])
def test_arguments_that_are_no_object_stay_text(text):
    assert loaded_arguments(text) == text


def test_no_messages_are_refused():
    with pytest.raises(ApiError, match="empty"):
        turns()


def test_the_four_shapes_of_a_prompt():
    assert prompts_of("x", LIMITS) == ["x"]
    assert prompts_of(["x", "y"], LIMITS) == ["x", "y"]
    assert [list(ids) for ids in prompts_of([5, 6], LIMITS)] == [[5, 6]]
    assert [list(ids) for ids in prompts_of([[5], [6, 7]], LIMITS)] == [[5], [6, 7]]


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ([], "prompt"),
        ([[]], "prompt[0]"),
        (["x", 5], "prompt"),
        ([[5], "x"], "prompt"),
        ([1000], "prompt"),
        ([[5], [-1]], "prompt[1]"),
        ([2**70], "prompt"),
    ],
)
def test_a_prompt_that_is_none_names_its_place(prompt, param):
    with pytest.raises(ApiError) as caught:
        prompts_of(prompt, LIMITS)
    assert caught.value.body.param == param


def test_ids_outside_the_vocabulary_name_the_first():
    with pytest.raises(ApiError, match="1000 at position 2"):
        check_ids([1, 999, 1000, 1001], "tokens", 1000)
    check_ids([], "tokens", 1000)


def test_the_answer_gets_the_rest_or_sixteen():
    assert room_for(40, None, LIMITS, chat=True) == 60
    assert room_for(40, None, LIMITS, chat=False) == 16
    assert room_for(95, None, LIMITS, chat=False) == 5
    assert room_for(40, 60, LIMITS, chat=True) == 60


@pytest.mark.parametrize(("prompt", "asked"), [(100, None), (250, 1), (99, 2), (40, 61)])
def test_what_does_not_fit_is_refused_as_context_length(prompt, asked):
    with pytest.raises(ApiError) as caught:
        room_for(prompt, asked, LIMITS, chat=True)
    assert caught.value.status == 400
    assert caught.value.body.code == "context_length_exceeded"
    assert "100 tokens" in caught.value.body.message


def test_ids_that_cannot_fit_are_refused_at_once():
    with pytest.raises(ApiError) as caught:
        prompts_of([[5], [6] * 100], LIMITS)
    assert (caught.value.body.code, caught.value.body.param) == (
        "context_length_exceeded",
        "prompt[1]",
    )


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(ApiError, match="no tokens"):
        room_for(0, 5, LIMITS, chat=False)
