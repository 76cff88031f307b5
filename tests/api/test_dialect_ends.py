"""Streams of /v1/responses, /v1/messages and of chat with tools that end badly say so once, in the
words of their API; whatever is sent there gets a typed error or an answer (R1)."""

import asyncio
import http.client
import json
from typing import Any

import anthropic
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.api.messages.schemas import MESSAGES_REFUSED, MessagesBody
from appliance.api.responses.schemas import RESPONSES_REFUSED, ResponsesBody
from appliance.api.schemas import ChatBody, fields_of
from appliance.core.faults import FaultRule

pytestmark = pytest.mark.procs

SLOW = (FaultRule(point="worker.before_step", action="delay", repeat=True, seconds=0.05),)


@pytest.fixture
def slow_server(special_server):
    return special_server(num_workers=1, faults=SLOW)


async def after_two(stream: Any, server: Any, kind: str) -> list[Any]:
    """All events of a stream whose server gives up after the second event of this kind."""
    events = []
    async for event in stream:
        events.append(event)
        if [each.type for each in events].count(kind) == 2:
            await asyncio.to_thread(server.call, server.node.drain(0))
    return events


async def test_a_response_that_fails_says_so_in_its_last_event(slow_server):
    async with openai.AsyncOpenAI(base_url=f"{slow_server.url}/v1", api_key="x") as client:
        stream = await client.responses.create(
            model="tiny", input="go", stream=True, extra_body={"ignore_eos": True}
        )
        events = await after_two(stream, slow_server, "response.output_text.delta")
    last = events[-1]
    assert (last.type, last.response.status) == ("response.failed", "failed")
    assert last.response.error.code == "server_error"
    assert last.response.error.message
    assert last.response.output[0].type == "message"
    assert [event.sequence_number for event in events] == list(range(len(events)))


async def test_a_message_that_fails_raises_in_the_client(slow_server):
    async with anthropic.AsyncAnthropic(base_url=slow_server.url, api_key="x") as client:
        stream = await client.messages.create(
            model="tiny",
            max_tokens=500,
            messages=[{"role": "user", "content": "go"}],
            stream=True,
            extra_body={"ignore_eos": True},
        )
        with pytest.raises(anthropic.APIStatusError) as caught:
            await after_two(stream, slow_server, "content_block_delta")
    body: Any = caught.value.body
    assert body["error"]["type"] == "overloaded_error"
    assert body["error"]["code"] == "drain_timeout"


async def test_a_server_that_drains_refuses_in_the_words_of_each_api(slow_server):
    slow_server.call(slow_server.node.drain(0))
    async with openai.AsyncOpenAI(
        base_url=f"{slow_server.url}/v1", api_key="x", max_retries=0
    ) as client:
        with pytest.raises(openai.InternalServerError) as refused:
            await client.responses.create(model="tiny", input="go", stream=True)
        assert refused.value.code == "draining"
    async with anthropic.AsyncAnthropic(
        base_url=slow_server.url, api_key="x", max_retries=0
    ) as other:
        with pytest.raises(anthropic.APIStatusError) as caught:
            await other.messages.create(
                model="tiny", max_tokens=5, messages=[{"role": "user", "content": "go"}]
            )
    body: Any = caught.value.body
    assert (caught.value.status_code, body["error"]["type"]) == (503, "overloaded_error")
    assert int(caught.value.response.headers["Retry-After"]) >= 1


async def test_a_client_that_leaves_frees_everything(slow_server):
    async with anthropic.AsyncAnthropic(base_url=slow_server.url, api_key="x") as client:
        stream = await client.messages.create(
            model="tiny",
            max_tokens=1500,
            messages=[{"role": "user", "content": "go"}],
            stream=True,
            extra_body={"ignore_eos": True},
        )
        async for event in stream:
            if event.type == "content_block_delta":
                break
        await stream.close()
    async with asyncio.timeout(20):
        while True:
            if not slow_server.read(lambda node: node.state())["totals"]["live"]:
                return
            await asyncio.sleep(0.02)


# --- whatever is sent -----------------------------------------------------------------------------

WORDS = ["type", "text", "role", "content", "input", "name", "id", "call_id", "output", "arguments",
         "tool_use_id", "input_schema", "parameters", "function", "thinking", "format", "schema",
         "tool_calls", "tool_call_id", "tool_choice", "strict", "effort"]  # fmt: skip
LITERALS = ["text", "function", "tool", "auto", "none", "required", "any", "user", "assistant",
            "message", "tool_use", "tool_result", "function_call", "function_call_output", "plain",
            "input_text", "output_text", "reasoning", "thinking", "json_schema", "object", "f", "c",
            "{}", "custom"]  # fmt: skip
KNOWN = sorted(
    fields_of(ChatBody)
    | fields_of(MessagesBody)
    | fields_of(ResponsesBody)
    | set(MESSAGES_REFUSED)
    | set(RESPONSES_REFUSED)
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-2, 40)
    | st.text(max_size=6)
    | st.sampled_from(LITERALS)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4)
    ),
    max_leaves=10,
)
OBJECTS = st.dictionaries(st.sampled_from(WORDS), VALUES, max_size=5)
TOOL = {"type": "object", "properties": {"a": {"type": "integer"}}}
BASES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "plain"}],
        "max_tokens": 3,
        "tools": [{"type": "function", "function": {"name": "f", "parameters": TOOL}}],
    },
    "/v1/responses": {
        "input": "plain",
        "max_output_tokens": 3,
        "tools": [{"type": "function", "name": "f", "parameters": TOOL}],
    },
    "/v1/messages": {
        "messages": [{"role": "user", "content": "plain"}],
        "max_tokens": 3,
        "tools": [{"name": "f", "input_schema": TOOL}],
    },
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "plain"}]},
}
LISTS = {name: st.lists(OBJECTS, max_size=3) for name in ("messages", "input", "tools")}
SPOILT = st.fixed_dictionaries(
    {}, optional={**LISTS, "stream": st.booleans(), "tool_choice": SCALARS | OBJECTS}
) | st.dictionaries(st.sampled_from(KNOWN), VALUES, max_size=2)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(path=st.sampled_from(sorted(BASES)), spoilt=SPOILT, stream=st.booleans())
def test_any_body_gets_an_answer_or_a_typed_error(scripted, path, spoilt, stream):
    body = {**BASES[path], "stream": stream, **spoilt}
    connection = http.client.HTTPConnection("127.0.0.1", scripted.port, timeout=60)
    try:
        raw = json.dumps(body).encode()
        connection.request("POST", path, raw, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        status, answer = reply.status, reply.read()
    finally:
        connection.close()
    assert status in (200, 400, 404), (status, answer)
    assert not scripted.node.broken
    if status != 200:
        error = json.loads(answer)["error"]
        assert {"message", "type", "param", "code"} == set(error)
        assert error["message"]
    elif answer.startswith((b"data: ", b"event: ")):
        ends = (b"data: [DONE]\n\n", b'{"type":"message_stop"}\n\n')
        assert (
            answer.endswith(ends)
            or b"event: response.completed\n" in answer
            or (b"event: response.incomplete\n" in answer)
        )
    else:
        assert isinstance(json.loads(answer), dict)
