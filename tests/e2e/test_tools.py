"""R21: functions of the bundled model with the official client: offered, called, answered from."""

import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import jsonschema
import openai
import pytest

from tests.e2e.conftest import Server

pytestmark = [pytest.mark.procs, pytest.mark.timeout(300)]


def function(name: str, description: str, **kinds: str) -> Any:
    properties = {parameter: {"type": kind} for parameter, kind in kinds.items()}
    parameters = {"type": "object", "properties": properties, "required": list(kinds)}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


WEATHER = function("get_weather", "Weather in a city", city="string")
ORDER = function("order_item", "Order things", item="string", count="integer")
TOOLS = [WEATHER, ORDER]
ASKED: Any = {"role": "user", "content": "What is the weather in harbor?"}
SUM: Any = {"role": "user", "content": "What is 47 + 38?"}
CALL = ("get_weather", {"city": "harbor"})


@pytest.fixture
async def client(serve: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    server: Server = serve("--devices", "cpu:1", "--set", "devices.threads=1")
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0
    ) as found:
        yield found


async def chat(client: openai.AsyncOpenAI, *messages: Any, **fields: Any) -> Any:
    fields = {"tools": TOOLS, "temperature": 0, "max_tokens": 128, **fields}
    return await client.chat.completions.create(
        model="tiny-tasks", messages=list(messages), **fields
    )


async def whole(client: openai.AsyncOpenAI, *messages: Any, **fields: Any) -> tuple[Any, Any, Any]:
    """Content, calls and finish reason of an answer in one piece."""
    (choice,) = (await chat(client, *messages, **fields)).choices
    calls = [
        (call.function.name, json.loads(call.function.arguments))
        for call in choice.message.tool_calls or ()
    ]
    return choice.message.content, calls, choice.finish_reason


async def streamed(client: openai.AsyncOpenAI, *messages: Any, **fields: Any) -> tuple[Any, ...]:
    """The same of a stream, put together as clients do it."""
    content, reason = "", None
    calls: dict[int, list[str]] = {}
    async for chunk in await chat(client, *messages, stream=True, **fields):
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        reason = choice.finish_reason or reason
        for call in choice.delta.tool_calls or ():
            if call.index not in calls:
                calls[call.index] = [call.function.name, ""]
            calls[call.index][1] += call.function.arguments
    found = [(name, json.loads(arguments)) for name, arguments in calls.values()]
    return content or None, found, reason


async def test_the_model_calls_what_the_question_needs_and_nothing_where_none_is(client):
    for ways in (whole, streamed):
        assert await ways(client, ASKED) == (None, [CALL], "tool_calls")
        order = {"role": "user", "content": "Please order the kettle, 12 of it."}
        called = ("order_item", {"item": "kettle", "count": 12})
        assert await ways(client, order) == (None, [called], "tool_calls")
        assert await ways(client, SUM) == ("85", [], "stop")
        assert await ways(client, SUM, tool_choice="none") == ("85", [], "stop")


async def test_a_required_call_is_made_whatever_was_asked(client):
    for ways in (whole, streamed):
        assert await ways(client, ASKED, tool_choice="required") == (None, [CALL], "tool_calls")
        content, calls, reason = await ways(
            client, SUM, tool_choice="required", parallel_tool_calls=False
        )
        assert (content, reason) == (None, "tool_calls")
        ((name, arguments),) = calls
        (offered,) = [tool["function"] for tool in TOOLS if tool["function"]["name"] == name]
        jsonschema.validate(arguments, offered["parameters"])


async def test_a_named_function_is_called_even_if_another_would_fit(client):
    for tool in TOOLS:
        name = tool["function"]["name"]
        named = {"type": "function", "function": {"name": name}}
        for ways in (whole, streamed):
            content, calls, _ = await ways(client, ASKED, tool_choice=named)
            assert content is None
            assert calls[0][0] == name
            jsonschema.validate(calls[0][1], tool["function"]["parameters"])
        if tool is WEATHER:
            assert calls == [CALL]


async def test_the_answer_is_made_from_what_the_call_returned(client):
    first = (await chat(client, ASKED)).choices[0].message
    for degrees in (21, 7):
        result = {
            "role": "tool",
            "tool_call_id": first.tool_calls[0].id,
            "content": json.dumps({"degrees": degrees}),
        }
        history = (ASKED, first.model_dump(exclude_none=True), result)
        expected = (f"It is {degrees} degrees in harbor.", [], "stop")
        assert await whole(client, *history) == expected
        assert await streamed(client, *history) == expected
        again = (*history, {"role": "assistant", "content": expected[0]}, SUM)
        assert await whole(client, *again) == ("85", [], "stop")


async def test_the_round_trip_of_the_responses_route(client):
    tool = {"type": "function", "strict": False, **WEATHER["function"]}
    fixed: Any = {"model": "tiny-tasks", "tools": [tool], "temperature": 0}
    first = await client.responses.create(input=[ASKED], **fixed)
    (call,) = first.output
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", *CALL)
    items: Any = [
        ASKED,
        call.model_dump(exclude_none=True),
        {"type": "function_call_output", "call_id": call.call_id, "output": '{"degrees": 21}'},
    ]
    second = await client.responses.create(input=items, **fixed)
    assert second.output_text == "It is 21 degrees in harbor."


async def test_the_round_trip_of_the_messages_route(client):
    tool = {
        "name": "get_weather",
        "description": "Weather in a city",
        "input_schema": WEATHER["function"]["parameters"],
    }
    fixed = {"model": "tiny-tasks", "max_tokens": 128, "tools": [tool], "temperature": 0}
    async with aiohttp.ClientSession(raise_for_status=True) as session:

        async def ask(*messages: Any) -> Any:
            body = {**fixed, "messages": list(messages)}
            async with session.post(f"{client.base_url}messages", json=body) as reply:
                return await reply.json()

        first = await ask(ASKED)
        (use,) = first["content"]
        assert first["stop_reason"] == "tool_use"
        assert (use["type"], use["name"], use["input"]) == ("tool_use", *CALL)
        result = {"type": "tool_result", "tool_use_id": use["id"], "content": '{"degrees": 21}'}
        second = await ask(
            ASKED,
            {"role": "assistant", "content": first["content"]},
            {"role": "user", "content": [result]},
        )
    assert [part["text"] for part in second["content"]] == ["It is 21 degrees in harbor."]
    assert second["stop_reason"] == "end_turn"
