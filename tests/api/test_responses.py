"""/v1/responses through the official client, on a real model whose words are known."""

import json
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from tests.api.scripted_model import WEATHER

pytestmark = pytest.mark.procs

TOOLS: Any = [
    {
        "type": "function",
        "name": "weather",
        "description": "Looks.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
    {"type": "function", "name": "add", "parameters": None, "strict": False},
]


@pytest.fixture
async def client(scripted):
    async with AsyncOpenAI(base_url=f"{scripted.url}/v1", api_key="none", max_retries=0) as found:
        yield found


async def respond(client: AsyncOpenAI, script: Any, **fields: Any) -> Any:
    return await client.responses.create(model="tiny", input=script, temperature=0, **fields)


async def gather(stream: Any) -> list[Any]:
    return [event async for event in stream]


def bare(response: Any) -> Any:
    """A response without what differs from one to the next."""
    dumped = response.model_dump()
    for name in ("id", "created_at", "completed_at", "slo"):
        dumped.pop(name)
    dumped["usage"]["input_tokens_details"].pop("cached_tokens")
    for item in dumped["output"]:
        item.pop("id")
        item.pop("call_id", None)
    return dumped


PROSE = [
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
]
CALL = [
    "response.output_item.added",
    "response.function_call_arguments.delta",
    "response.function_call_arguments.done",
    "response.output_item.done",
]
THOUGHTS = ["response.output_item.added", "response.content_part.added",
            "response.reasoning_text.delta", "response.reasoning_text.done",
            "response.content_part.done", "response.output_item.done"]  # fmt: skip
BEGIN, END = ["response.created", "response.in_progress"], ["response.completed"]


@pytest.mark.parametrize(
    ("script", "kinds"),
    [
        ("plain", PROSE),
        ("weather", PROSE + CALL),
        ("both", CALL + CALL),
        ("think", THOUGHTS + PROSE),
        ("deep", THOUGHTS + PROSE),
        ("thinkcall", THOUGHTS + CALL),
    ],
)
async def test_a_stream_tells_the_response_step_by_step(client, script, kinds):
    whole = await respond(client, script, tools=TOOLS)
    events = await gather(await respond(client, script, tools=TOOLS, stream=True))
    told = [event.type for event in events]
    assert [kind for i, kind in enumerate(told) if i == 0 or kind != told[i - 1]] == (
        BEGIN + kinds + END
    )
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].response.status == "in_progress"
    assert bare(events[-1].response) == bare(whole)
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert done == events[-1].response.output
    for event in events:
        if getattr(event, "item_id", None) is not None:
            assert event.item_id == events[-1].response.output[event.output_index].id


async def test_deltas_joined_are_the_text(client):
    events = await gather(await respond(client, "weather", tools=TOOLS, stream=True))
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    arguments = "".join(
        e.delta for e in events if e.type == "response.function_call_arguments.delta"
    )
    assert (text, arguments) == ("Let me look.", WEATHER)


async def test_the_clients_own_accumulator_understands_the_stream(client):
    async with client.responses.stream(
        model="tiny", input="weather", tools=TOOLS, temperature=0
    ) as stream:
        async for _ in stream:
            pass
        final = await stream.get_final_response()
    assert final.output_text == "Let me look."
    assert final.output[1].arguments == WEATHER


async def test_a_response_in_one_piece(client):
    answer = await respond(
        client,
        "plain",
        instructions="Be brief.",
        max_output_tokens=200,
        metadata={"a": "b"},
        user="someone",
        include=["reasoning.encrypted_content"],
        truncation="disabled",
        store=False,
        text={"format": {"type": "text"}, "verbosity": "medium"},
        extra_body={"priority": 1, "top_k": 5, "seed": 3},
    )
    assert answer.id.startswith("resp_")
    assert (answer.object, answer.status, answer.model) == ("response", "completed", "tiny")
    assert answer.output_text == "Good morning to you, dear reader."
    assert answer.instructions == "Be brief."
    assert answer.metadata == {"a": "b"}
    assert (answer.max_output_tokens, answer.temperature, answer.tools) == (200, 0, [])
    assert answer.store is False
    usage = answer.usage
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    (message,) = answer.output
    assert message.id.startswith("msg_")
    assert (message.role, message.status) == ("assistant", "completed")


async def test_an_answer_that_reaches_its_limit_is_incomplete(client):
    answer = await respond(client, "plain", max_output_tokens=3)
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.output[0].status == "incomplete"
    events = await gather(await respond(client, "weather", tools=TOOLS, max_output_tokens=25,
                                        stream=True))  # fmt: skip
    assert events[-1].type == "response.incomplete"
    call = events[-1].response.output[-1]
    assert (call.type, call.status) == ("function_call", "incomplete")
    assert WEATHER.startswith(call.arguments)


async def test_the_round_trip_of_a_call(client):
    first = await respond(client, "weather", tools=TOOLS)
    call = first.output[1]
    assert json.loads(call.arguments) == {"city": "Paris", "days": 3}
    history = [
        {"role": "user", "content": "weather"},
        *(item.model_dump(exclude_none=True) for item in first.output),
        {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"},
    ]
    answer = await respond(client, history, tools=TOOLS)
    assert answer.output_text == "It is sunny in Paris today."


async def test_thoughts_can_be_given_back(client):
    first = await respond(client, "think")
    assert first.output[0].content[0].text == "Two and two."
    assert first.usage.output_tokens_details.reasoning_tokens > 0
    history = [
        {"role": "user", "content": [{"type": "input_text", "text": "think"}]},
        *(item.model_dump(exclude_none=True) for item in first.output),
        {"role": "user", "content": "plain"},
    ]
    answer = await respond(client, history)
    assert answer.output_text == "Good morning to you, dear reader."
    quiet = await respond(client, "think", reasoning={"effort": "none"})
    assert quiet.output_text == "Good morning to you, dear reader."


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "unsupported_parameter"),
        ({"conversation": "conv_1"}, "conversation", "unsupported_parameter"),
        ({"store": True}, "store", "unsupported_parameter"),
        ({"background": True}, "background", "unsupported_parameter"),
        ({"prompt": {"id": "p"}}, "prompt", "unsupported_parameter"),
        ({"truncation": "auto"}, "truncation", "unsupported_parameter"),
        ({"include": ["file_search_call.results"]}, "include", "unsupported_parameter"),
        ({"top_logprobs": 2}, "top_logprobs", "unsupported_parameter"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort", "unsupported_parameter"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "unsupported_parameter"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "unsupported_value"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "invalid_value"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools[1].name", "invalid_value"),
        ({"tool_choice": "sometimes"}, "tool_choice", "unsupported_value"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"max_output_tokens": 0}, "max_output_tokens", "invalid_value"),
        ({"max_output_tokens": 10_000}, "max_output_tokens", "context_length_exceeded"),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"extra_body": {"max_tokens": 3}}, "max_tokens", "invalid_value"),
        ({"extra_body": {"n": 2}}, "n", "invalid_value"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": 5}, "input", "invalid_type"),
        ({"input": "word " * 5000}, "input", "context_length_exceeded"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "unsupported_value"),
        ({"input": [{"content": "x"}]}, "input[0].role", "missing_required_parameter"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
         "input[0].content[0].type", "unsupported_value"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "unsupported_value"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]},
         "input[0].call_id", "invalid_value"),
        ({"model": "other"}, "model", "model_not_found"),
    ],
)  # fmt: skip
async def test_refusals_name_the_field(client, fields, param, code, stream):
    fields = {"model": "tiny", "input": "plain", **fields}
    with pytest.raises(openai.APIStatusError) as caught:
        await client.responses.create(stream=stream, **fields)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert caught.value.status_code == (404 if code == "model_not_found" else 400)
    named = code not in ("model_not_found", "context_length_exceeded")
    assert not named or param in caught.value.message


async def test_an_embedding_model_is_not_here(client):
    with pytest.raises(openai.NotFoundError) as caught:
        await client.embeddings.create(model="tiny", input="x")
    assert caught.value.code == "no_embedding_model"
    assert "No embedding model is served" in caught.value.message


CITY = {"type": "string", "enum": ["Bonn", "Paris"]}
SCHEMA = {
    "type": "object",
    "properties": {"city": CITY},
    "required": ["city"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
async def test_a_call_that_is_required_comes(client, choice):
    tools: Any = [
        {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": True},
    ]
    answer = await respond(client, "plain", tools=tools, tool_choice=choice)
    call = answer.output[0]
    assert (call.type, call.name) == ("function_call", "weather")
    assert json.loads(call.arguments)["city"] in CITY["enum"]
    assert answer.tool_choice.model_dump() == choice if isinstance(choice, dict) else choice


async def test_the_text_has_the_form_that_was_asked_for(client):
    form: Any = {"type": "json_schema", "name": "place", "schema": SCHEMA, "strict": True}
    answer = await respond(client, "plain", text={"format": form})
    assert json.loads(answer.output_text)["city"] in CITY["enum"]
    assert answer.text.format.name == "place"
    with pytest.raises(openai.BadRequestError) as caught:
        await respond(client, "plain", text={"format": {"type": "xml"}})
    assert caught.value.param == "text.format.type"
    with pytest.raises(openai.BadRequestError) as caught:
        await respond(client, "plain", text={"format": {**form, "schema": {"type": 5}}})
    assert caught.value.param == "text.format.schema"
