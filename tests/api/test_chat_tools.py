"""Tools and reasoning through the official client, on a real model whose words are known."""

import json
from typing import Any, Literal

import openai
import pydantic
import pytest
from openai import AsyncOpenAI

from appliance.api.settings import ApiSettings
from tests.api.scripted_model import WEATHER

pytestmark = pytest.mark.procs

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: Any = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "Looks.", "parameters": PARAMETERS},
    },
    {"type": "function", "function": {"name": "add"}},
]


@pytest.fixture
async def client(scripted):
    async with AsyncOpenAI(base_url=f"{scripted.url}/v1", api_key="none", max_retries=0) as found:
        yield found


async def chat(client: AsyncOpenAI, script: str, **fields: Any) -> Any:
    fields = {"messages": [{"role": "user", "content": script}], "tools": TOOLS} | fields
    fields = {name: value for name, value in fields.items() if value is not None}
    return await client.chat.completions.create(model="tiny", temperature=0, **fields)


class Streamed:
    """A stream put together as clients do it."""

    def __init__(self) -> None:
        self.content = ""
        self.reasoning = ""
        self.calls: dict[int, dict[str, str]] = {}
        self.pieces = 0
        self.reason = ""
        self.usage: Any = None

    @property
    def named(self) -> list[tuple[str, str]]:
        return [(call["name"], call["arguments"]) for _, call in sorted(self.calls.items())]


async def gather(stream: Any) -> Streamed:
    whole = Streamed()
    async for chunk in stream:
        whole.usage = chunk.usage or whole.usage
        for choice in chunk.choices:
            delta = choice.delta
            whole.content += delta.content or ""
            whole.reasoning += getattr(delta, "reasoning_content", None) or ""
            whole.reason = choice.finish_reason or whole.reason
            for call in delta.tool_calls or ():
                if call.index not in whole.calls:
                    assert call.id.startswith("call_")
                    assert call.type == "function"
                    whole.calls[call.index] = {"name": call.function.name, "arguments": ""}
                else:
                    assert call.id is None
                    assert call.function.name is None
                whole.calls[call.index]["arguments"] += call.function.arguments
                whole.pieces += 1
    return whole


async def both_ways(client: AsyncOpenAI, script: str, **fields: Any) -> tuple[Any, Streamed]:
    whole = await chat(client, script, **fields)
    return whole.choices[0], await gather(await chat(client, script, stream=True, **fields))


CALL = ("weather", WEATHER)


@pytest.mark.parametrize(
    ("script", "content", "calls"),
    [
        ("weather", "Let me look.", [CALL]),
        ("both", None, [("weather", '{"city": "Rome"}'),
                        ("add", '{"a": 1, "b": [2, {"c": "}"}]}')]),
    ],
)  # fmt: skip
async def test_calls_are_found_in_one_piece_and_as_a_stream(client, script, content, calls):
    whole, streamed = await both_ways(client, script)
    assert whole.message.content == content
    assert whole.finish_reason == "tool_calls"
    found = [(call.function.name, call.function.arguments) for call in whole.message.tool_calls]
    assert found == calls
    assert len({call.id for call in whole.message.tool_calls}) == len(calls)
    assert (streamed.content or None, streamed.named) == (content, calls)
    assert streamed.reason == "tool_calls"
    assert streamed.pieces > 2 * len(calls), "arguments come in increments"


@pytest.mark.parametrize("script", ["malformed", "unknown"])
async def test_what_is_no_call_is_plain_content(client, script):
    whole, streamed = await both_ways(client, script)
    assert whole.message.tool_calls is None
    assert "<tool_call>" in whole.message.content
    assert whole.message.content.endswith("</tool_call>")
    assert whole.finish_reason == "stop"
    assert streamed.reason == "stop"
    if script == "unknown":
        assert (streamed.content, streamed.named) == (whole.message.content, [])


async def test_plain_answers_stay_plain_with_tools(client):
    whole, streamed = await both_ways(client, "plain")
    assert whole.message.content == streamed.content == "Good morning to you, dear reader."
    assert (whole.message.tool_calls, streamed.calls) == (None, {})
    assert (whole.finish_reason, streamed.reason) == ("stop", "stop")


@pytest.mark.parametrize("fields", [{"tools": None}, {"tool_choice": "none"}])
async def test_without_tools_the_text_is_the_answer(client, fields):
    whole, streamed = await both_ways(client, "weather", **fields)
    assert whole.message.content == streamed.content
    assert whole.message.content.startswith("Let me look.\n<tool_call>")
    assert (whole.message.tool_calls, whole.finish_reason) == (None, "stop")


async def test_one_call_when_more_are_not_wanted(client):
    whole, streamed = await both_ways(client, "both", parallel_tool_calls=False)
    assert [call.function.name for call in whole.message.tool_calls] == ["weather"]
    assert [name for name, _ in streamed.named] == ["weather"]


async def test_a_call_cut_off_by_its_length_is_not_one_to_act_upon(client):
    whole, streamed = await both_ways(client, "weather", max_tokens=16)
    assert (whole.finish_reason, streamed.reason) == ("length", "length")
    assert whole.message.tool_calls is None
    assert whole.message.content.startswith("Let me look.\n<tool_call>")


async def test_the_round_trip_of_a_call(client):
    question: Any = [{"role": "user", "content": "weather"}]
    message = (await chat(client, "", messages=question)).choices[0].message
    assert json.loads(message.tool_calls[0].function.arguments) == {"city": "Paris", "days": 3}
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}
    history = [*question, message.model_dump(exclude_none=True), result]
    answer = await chat(client, "", messages=history)
    assert answer.choices[0].message.content == "It is sunny in Paris today."
    assert answer.usage.prompt_tokens > 100


async def test_tools_are_part_of_the_prompt(client):
    with_tools = await chat(client, "plain")
    without = await chat(client, "plain", tools=None)
    assert with_tools.usage.prompt_tokens > without.usage.prompt_tokens + 50


@pytest.mark.parametrize(
    ("script", "thoughts", "content"),
    [
        ("think", "Two and two.", "The answer is four."),
        ("deep", "It is late by now.", "Good night."),
    ],
)
async def test_thoughts_are_split_off(client, script, thoughts, content):
    options = {"include_usage": True}
    whole, streamed = await both_ways(client, script, tools=None)
    assert whole.message.reasoning_content == streamed.reasoning == thoughts
    assert whole.message.content == streamed.content == content
    assert (whole.finish_reason, streamed.reason) == ("stop", "stop")
    counted = await gather(
        await chat(client, script, tools=None, stream=True, stream_options=options)
    )
    details = counted.usage.completion_tokens_details
    assert 0 < details.reasoning_tokens < counted.usage.completion_tokens


async def test_thoughts_before_a_call(client):
    whole, streamed = await both_ways(client, "thinkcall")
    assert whole.message.reasoning_content == streamed.reasoning == "It may rain."
    assert whole.message.content is None
    assert streamed.named == [("weather", '{"city": "Oslo"}')]
    assert whole.finish_reason == streamed.reason == "tool_calls"


async def test_thoughts_can_be_switched_off_where_the_template_has_a_switch(client):
    answer = await chat(client, "think", tools=None, reasoning_effort="none")
    assert answer.choices[0].message.content == "Good morning to you, dear reader."
    history: Any = [
        {"role": "user", "content": "think"},
        {"role": "assistant", "content": "Four.", "reasoning_content": "Two and two."},
        {"role": "user", "content": "plain"},
    ]
    answer = await chat(client, "", messages=history, tools=None)
    assert answer.choices[0].message.content == "Good morning to you, dear reader."


async def test_log_probabilities_and_running_usage_go_with_calls(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = [
        chunk
        async for chunk in await chat(
            client, "weather", stream=True, logprobs=True, stream_options=options
        )
    ]
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    entries = [
        entry
        for chunk in chunks
        for choice in chunk.choices
        if choice.logprobs
        for entry in choice.logprobs.content
    ]
    text = "".join(entry.token for entry in entries)
    assert text.startswith("Let me look.\n<tool_call>")
    whole = await chat(client, "weather", logprobs=True)
    assert len(whole.choices[0].logprobs.content) == len(entries) == counts[-1]


async def test_choices_have_their_own_calls(client):
    answer = await chat(client, "both", n=2)
    ids = [call.id for choice in answer.choices for call in choice.message.tool_calls]
    assert len(set(ids)) == 4


def with_function(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", **fields}}]}


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "unsupported_value"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "invalid_value"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "tools[2].function.name", "invalid_value"),
        (with_function(name=""), "tools[0].function.name", "invalid_value"),
        (with_function(name="a b"), "tools[0].function.name", "invalid_value"),
        (with_function(parameters=[]), "tools[0].function.parameters", "invalid_type"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice",
         "invalid_value"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice", "unsupported_value"),
        ({"tool_choice": "required", "tools": []}, "tool_choice", "invalid_value"),
        (with_function(parameters={"type": "array"}) | {"tool_choice": "required"}, "tools",
         "invalid_value"),
        (with_function(parameters={"type": "object", "not": {}}, strict=True), "tools",
         "invalid_value"),
        ({"tool_choice": "required", "extra_body": {"ignore_eos": True}}, "ignore_eos",
         "unsupported_parameter"),
        ({"extra_body": {"guided_regex": "a+"}}, "tools", "unsupported_parameter"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "unsupported_parameter"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
async def test_refusals_name_the_field(client, fields, param, code, stream):
    with pytest.raises(openai.BadRequestError) as caught:
        await chat(client, "plain", stream=stream, **fields)
    assert (caught.value.param, caught.value.code) == (param, code)


CITY = {"type": "string", "enum": ["Bonn", "Paris"]}
FORCED: Any = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": CITY},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]


@pytest.mark.parametrize("script", ["plain", "malformed", "think"])
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
async def test_a_call_that_is_required_comes_whatever_the_model_would_say(client, script, choice):
    options = {"tools": FORCED, "tool_choice": choice, "parallel_tool_calls": False}
    whole, streamed = await both_ways(client, script, **options)
    assert whole.finish_reason == streamed.reason == "tool_calls"
    assert whole.message.content is None
    (call,) = whole.message.tool_calls
    assert streamed.named == [(call.function.name, call.function.arguments)]
    arguments = json.loads(call.function.arguments)
    if call.function.name == "weather":
        assert arguments in ({"city": "Bonn"}, {"city": "Paris"})
    else:
        assert arguments == {}
    assert call.function.name == "weather" or choice == "required"


async def test_a_strict_tool_is_called_by_its_schema_and_prose_is_free(client):
    strict: Any = json.loads(json.dumps(FORCED))
    strict[0]["function"]["strict"] = True
    whole, streamed = await both_ways(client, "weather", tools=strict)
    assert whole.message.content == "Let me look."
    (call,) = whole.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert arguments in ({"city": "Bonn"}, {"city": "Paris"}), "the model would say days, too"
    assert streamed.named == [(call.function.name, call.function.arguments)]
    plain, _ = await both_ways(client, "plain", tools=strict)
    assert plain.message.content == "Good morning to you, dear reader."
    assert plain.finish_reason == "stop"


async def test_a_call_may_come_in_place_of_a_document(client):
    schema = {
        "type": "object",
        "properties": {"a": CITY},
        "required": ["a"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    whole, _ = await both_ways(client, "both", tools=FORCED, response_format=form)
    assert whole.finish_reason == "tool_calls"
    assert whole.message.tool_calls[0].function.name == "weather"
    other, _ = await both_ways(client, "plain", tools=FORCED, response_format=form)
    if other.finish_reason == "stop":
        assert json.loads(other.message.content)["a"] in CITY["enum"]


async def test_the_operator_can_switch_both_off(special_server, scripted_dir):
    from tests.api.conftest import start_scripted

    live = start_scripted(scripted_dir, ApiSettings(tool_format="none", reasoning="none"))
    try:
        async with AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none") as client:
            answer = await chat(client, "think", tools=None)
            assert answer.choices[0].message.content.startswith("<think>")
            with pytest.raises(openai.BadRequestError) as caught:
                await chat(client, "plain")
            assert caught.value.param == "tools"
            assert "tool_format" in caught.value.message
    finally:
        live.close()


class City(pydantic.BaseModel):
    """Where to look."""

    city: Literal["Bonn", "Paris"]


async def test_the_clients_own_helpers_understand_calls_and_forms(client):
    tool = openai.pydantic_function_tool(City, name="weather")
    messages: Any = [{"role": "user", "content": "weather"}]
    answer = await client.chat.completions.parse(
        model="tiny", messages=messages, tools=[tool], temperature=0
    )
    (call,) = answer.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, City)
    async with client.chat.completions.stream(
        model="tiny", messages=messages, tools=[tool], temperature=0
    ) as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in kinds
    assert "tool_calls.function.arguments.done" in kinds
    (call,) = final.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, City)
    formed = await client.chat.completions.parse(
        model="tiny", messages=messages, response_format=City, temperature=0
    )
    assert isinstance(formed.choices[0].message.parsed, City)
