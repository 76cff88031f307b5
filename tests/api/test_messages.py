"""/v1/messages through Anthropic's own client, on a real model whose words are known."""

import json
from typing import Any

import anthropic
import pytest
from anthropic import AsyncAnthropic

from tests.api.scripted_model import SCRIPTS

pytestmark = pytest.mark.procs

TOOLS: Any = [
    {
        "name": "weather",
        "description": "Looks.",
        "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
        "cache_control": {"type": "ephemeral"},
    },
    {"type": "custom", "name": "add", "input_schema": {"type": "object"}},
]


@pytest.fixture
async def client(scripted):
    async with AsyncAnthropic(base_url=scripted.url, api_key="none", max_retries=0) as found:
        yield found


def asked(script: str, **fields: Any) -> dict[str, Any]:
    """The fields of a request; the model's words are certain, whatever the temperature."""
    base = {"model": "tiny", "max_tokens": 200, "messages": [{"role": "user", "content": script}]}
    return base | fields


async def ask(client: AsyncAnthropic, script: str, **fields: Any) -> Any:
    return await client.messages.create(**asked(script, **fields))


async def events_of(client: AsyncAnthropic, script: str, **fields: Any) -> list[Any]:
    return [event async for event in await ask(client, script, stream=True, **fields)]


def blocks_of(message: Any) -> list[dict[str, Any]]:
    """Content without ids."""
    dumped = [block.model_dump(exclude_none=True) for block in message.content]
    return [{k: v for k, v in block.items() if k not in ("id", "signature")} for block in dumped]


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "tool_use", "name": name, "input": arguments}


def thought(words: str) -> dict[str, Any]:
    return {"type": "thinking", "thinking": words}


@pytest.mark.parametrize(
    ("script", "blocks", "reason"),
    [
        ("plain", [text(SCRIPTS["plain"])], "end_turn"),
        ("weather", [text("Let me look."), call("weather", city="Paris", days=3)], "tool_use"),
        ("both", [call("weather", city="Rome"), call("add", a=1, b=[2, {"c": "}"}])], "tool_use"),
        ("think", [thought("Two and two."), text("The answer is four.")], "end_turn"),
        ("deep", [thought("It is late by now."), text("Good night.")], "end_turn"),
        ("thinkcall", [thought("It may rain."), call("weather", city="Oslo")], "tool_use"),
        ("unknown", [text(SCRIPTS["unknown"])], "end_turn"),
    ],
)
async def test_blocks_come_whole_and_as_a_stream(client, script, blocks, reason):
    message = await ask(client, script, tools=TOOLS)
    assert blocks_of(message) == blocks
    assert (message.role, message.type, message.model) == ("assistant", "message", "tiny")
    assert (message.stop_reason, message.stop_sequence) == (reason, None)
    async with client.messages.stream(**asked(script, tools=TOOLS)) as stream:
        async for _ in stream:
            pass
        final = await stream.get_final_message()
    assert blocks_of(final) == blocks
    assert final.stop_reason == reason
    assert final.usage.output_tokens == message.usage.output_tokens
    whole = message.usage
    assert whole.input_tokens + whole.cache_read_input_tokens == (
        final.usage.input_tokens + final.usage.cache_read_input_tokens
    )


async def test_the_events_of_a_stream_are_in_order(client):
    events = await events_of(client, "weather", tools=TOOLS)
    told = [event.type for event in events]
    kinds = [kind for i, kind in enumerate(told) if i == 0 or kind != told[i - 1]]
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert kinds == ["message_start", *block, *block, "message_delta", "message_stop"]
    deltas = {event.delta.type for event in events if event.type == "content_block_delta"}
    assert deltas == {"text_delta", "input_json_delta"}
    assert events[0].message.usage.input_tokens > 50
    assert [e.index for e in events if e.type == "content_block_start"] == [0, 1]


async def test_the_round_trip_of_a_call(client):
    question: Any = {"role": "user", "content": "weather"}
    first = await ask(client, "", messages=[question], tools=TOOLS)
    result = {"type": "tool_result", "tool_use_id": first.content[1].id}
    history = [question, {"role": "assistant", "content": first.content}]
    for content in ("sunny", [text("sunny")]):
        results = {"role": "user", "content": [{**result, "content": content}]}
        answer = await ask(client, "", messages=[*history, results], tools=TOOLS)
        assert blocks_of(answer) == [text("It is sunny in Paris today.")]
    more = {"role": "user", "content": [{**result, "content": "sunny"}, text("plain")]}
    answer = await ask(client, "", messages=[*history, more], tools=TOOLS)
    assert blocks_of(answer) == [text(SCRIPTS["plain"])]


async def test_thoughts_can_be_given_back_and_switched_off(client):
    first = await ask(client, "think", thinking={"type": "adaptive"})
    history = [
        {"role": "user", "content": "think"},
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": "plain"},
    ]
    assert blocks_of(await ask(client, "", messages=history)) == [text(SCRIPTS["plain"])]
    wish = asked("think", thinking={"type": "enabled", "budget_tokens": 1024})
    raw = await client.messages.with_raw_response.create(**wish)
    assert raw.headers["x-appliance-ignored"] == "thinking.budget_tokens"
    assert blocks_of(await raw.parse())[0] == thought("Two and two.")
    quiet = await ask(client, "think", thinking={"type": "disabled"})
    assert blocks_of(quiet) == [text(SCRIPTS["plain"])]


@pytest.mark.parametrize(
    ("stops", "words", "hit"),
    [
        (["never", "dear"], "Good morning to you, ", "dear"),
        (["reader", "dear reader"], "Good morning to you, ", "dear reader"),
        (["ning to you"], "Good mor", "ning to you"),
        (["never"], SCRIPTS["plain"], None),
    ],
)
async def test_the_stop_sequence_that_was_hit_is_named(client, stops, words, hit):
    message = await ask(client, "plain", stop_sequences=stops)
    assert blocks_of(message) == [text(words)]
    assert (message.stop_reason, message.stop_sequence) == (
        ("stop_sequence", hit) if hit else ("end_turn", None)
    )
    events = await events_of(client, "plain", stop_sequences=stops)
    told = "".join(e.delta.text for e in events if e.type == "content_block_delta")
    last = events[-2].delta
    assert (told, last.stop_reason, last.stop_sequence) == (
        words, message.stop_reason, hit
    )  # fmt: skip


async def test_an_answer_that_reaches_its_limit_says_so(client):
    message = await ask(client, "weather", max_tokens=12, tools=TOOLS)
    assert message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == 12
    assert blocks_of(message)[0]["text"].startswith("Let me look.\n<tool_call>")
    events = await events_of(client, "weather", max_tokens=25, tools=TOOLS)
    assert events[-2].delta.stop_reason == "max_tokens"
    assert [e.type for e in events].count("content_block_stop") == 2


async def test_system_text_and_blocks_are_part_of_the_prompt(client):
    counts = []
    for system in (anthropic.NOT_GIVEN, "Be brief.", [text("Be "), text("brief.")]):
        found = await client.messages.count_tokens(
            model="tiny", messages=[{"role": "user", "content": "plain"}], system=system
        )
        counts.append(found.input_tokens)
        message = await ask(client, "plain", system=system)
        usage = message.usage
        assert usage.input_tokens + usage.cache_read_input_tokens == counts[-1]
    assert counts[0] < counts[1] == counts[2]
    with_tools = await client.messages.count_tokens(
        model="tiny", messages=[{"role": "user", "content": "plain"}], tools=TOOLS
    )
    assert with_tools.input_tokens > counts[0] + 50


async def test_one_call_when_more_are_not_wanted(client):
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    message = await ask(client, "both", tools=TOOLS, tool_choice=choice)
    assert blocks_of(message) == [call("weather", city="Rome")]
    none = await ask(client, "both", tools=TOOLS, tool_choice={"type": "none"})
    assert blocks_of(none) == [text(SCRIPTS["both"])]


async def test_harmless_fields_are_accepted(client):
    keep: Any = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
    message = await ask(
        client,
        "plain",
        metadata={"user_id": "someone"},
        service_tier="auto",
        extra_body={"context_management": keep, "temperature": 0, "top_k": 5, "slo": "chat"},
        extra_headers={"anthropic-beta": "something-2025-01-01"},
        extra_query={"beta": "true"},
    )
    assert message.id.startswith("msg_")
    assert message._request_id.startswith("req-")


def said(role: str, *blocks: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(blocks)}]}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role",
         "unsupported_value"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages[0].role",
         "unsupported_value"),
        (said("user"), "messages[0].content", "invalid_value"),
        (said("user", {"type": "image"}), "messages[0].content[0].type", "unsupported_value"),
        (said("user", {"type": "text"}), "messages[0].content[0].text", "invalid_value"),
        (said("user", {"type": "tool_result", "tool_use_id": "x"}),
         "messages[0].content[0].tool_use_id", "invalid_value"),
        (said("user", {"type": "tool_result"}), "messages[0].content[0].tool_use_id",
         "missing_required_parameter"),
        (said("assistant", {"type": "redacted_thinking"}), "messages[0].content[0].type",
         "unsupported_value"),
        ({"extra_body": {"max_tokens": None}}, "max_tokens", "missing_required_parameter"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 10_000}, "max_tokens", "context_length_exceeded"),
        ({"extra_body": {"temperature": 3}}, "temperature", "invalid_value"),
        ({"extra_body": {"stop": "x"}}, "stop", "invalid_value"),
        ({"extra_body": {"n": 2}}, "n", "invalid_value"),
        ({"stop_sequences": [""]}, "stop_sequences", "invalid_value"),
        ({"thinking": {"type": "sometimes"}}, "thinking.type", "unsupported_value"),
        ({"output_config": {"effort": "low"}}, "output_config.effort", "unsupported_parameter"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type",
         "unsupported_value"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools[1].name", "invalid_value"),
        ({"tool_choice": {"type": "any"}}, "tool_choice", "invalid_value"),
        ({"tool_choice": {"type": "tool"}, "tools": TOOLS}, "tool_choice", "unsupported_value"),
        ({"extra_body": {"container": "c"}}, "container", "unsupported_parameter"),
        ({"extra_body": {"mcp_servers": [{}]}}, "mcp_servers", "unsupported_parameter"),
        ({"extra_body": {"context_management": {"edits": [{"type": "clear_tool_uses"}]}}},
         "context_management", "unsupported_parameter"),
    ],
)  # fmt: skip
async def test_refusals_name_the_field_in_the_words_of_this_api(
    client, fields, param, code, stream
):
    with pytest.raises(anthropic.BadRequestError) as caught:
        await ask(client, "plain", **{"stream": stream, **fields})
    body: Any = caught.value.body
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"
    assert (body["error"]["param"], body["error"]["code"]) == (param, code)
    assert param in body["error"]["message"] or code == "context_length_exceeded"


async def test_other_failures_have_their_own_types(client):
    with pytest.raises(anthropic.NotFoundError) as caught:
        await ask(client, "plain", model="other")
    body: Any = caught.value.body
    assert body["error"]["type"] == "not_found_error"
    assert body["request_id"] == caught.value.response.headers["x-request-id"]
    with pytest.raises(anthropic.APIStatusError) as refused:
        await client.get("/v1/messages", cast_to=object)
    assert refused.value.status_code == 405
    assert refused.value.body["error"]["code"] == "method_not_allowed"


SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Bonn", "Paris"]}},
    "required": ["city"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
async def test_a_call_that_is_required_comes(client, choice):
    tools = [{"name": "weather", "input_schema": SCHEMA}]
    message = await ask(client, "plain", tools=tools, tool_choice=choice)
    assert message.stop_reason == "tool_use"
    assert message.content[0].name == "weather"
    assert message.content[0].input["city"] in ("Bonn", "Paris")


async def test_the_text_has_the_form_that_was_asked_for(client):
    form = {"format": {"type": "json_schema", "schema": SCHEMA}}
    message = await ask(client, "plain", output_config=form)
    assert json.loads(message.content[0].text)["city"] in ("Bonn", "Paris")
    with pytest.raises(anthropic.BadRequestError) as caught:
        await ask(client, "plain", output_config={"format": {"type": "xml", "schema": SCHEMA}})
    body: Any = caught.value.body
    assert body["error"]["param"] == "output_config.format.type"
