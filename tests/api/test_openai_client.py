"""R21: the official client against every route and field, streaming and not, refusals too."""

from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

pytestmark = pytest.mark.procs

MESSAGES: Any = [{"role": "user", "content": "repeat: red fox"}]
EXACT = {"ignore_eos": True}
"""Answers end at `max_tokens` and nowhere else."""


async def chat(client: AsyncOpenAI, **fields: Any) -> Any:
    extra = EXACT | fields.pop("extra_body", {})
    fields = {"messages": MESSAGES, "max_tokens": 8} | fields
    return await client.chat.completions.create(model="tiny", extra_body=extra, **fields)


async def complete(client: AsyncOpenAI, **fields: Any) -> Any:
    extra = EXACT | fields.pop("extra_body", {})
    return await client.completions.create(
        model="tiny", extra_body=extra, **{"max_tokens": 8, "prompt": "red", **fields}
    )


async def gather(stream: Any) -> list[Any]:
    return [chunk async for chunk in stream]


def texts(chunks: list[Any]) -> dict[int, str]:
    """The text of every choice of a stream."""
    found: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            piece = choice.delta.content if hasattr(choice, "delta") else choice.text
            found[choice.index] = found.get(choice.index, "") + (piece or "")
    return found


def reasons(chunks: list[Any]) -> list[tuple[int, str]]:
    """Every finish reason of a stream."""
    return sorted(
        (choice.index, choice.finish_reason)
        for chunk in chunks
        for choice in chunk.choices
        if choice.finish_reason
    )


# --- models ---------------------------------------------------------------------------------------


async def test_models_are_listed_and_found(client):
    (model,) = (await client.models.list()).data
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "appliance")
    assert await client.models.retrieve("tiny") == model


@pytest.mark.parametrize("name", ["other", "org/other"])
async def test_an_unknown_model_is_not_found(client, name):
    with pytest.raises(openai.NotFoundError) as caught:
        await client.models.retrieve(name)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(model=name, messages=MESSAGES)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


# --- chat -----------------------------------------------------------------------------------------


async def test_chat_in_one_piece(client):
    answer = await chat(client)
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.model == "tiny"
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert choice.message.role == "assistant"
    assert choice.message.content
    usage = answer.usage
    assert (usage.completion_tokens, usage.total_tokens) == (8, usage.prompt_tokens + 8)
    assert usage.prompt_tokens_details.cached_tokens == 0 or usage.prompt_tokens > 16


async def test_chat_as_a_stream_says_the_same(client):
    whole = await chat(client, seed=7)
    chunks = await gather(await chat(client, seed=7, stream=True))
    assert texts(chunks) == {0: whole.choices[0].message.content}
    assert reasons(chunks) == [(0, "length")]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert all(chunk.usage is None for chunk in chunks)


async def test_an_answer_ends_by_itself(client):
    answer = await chat(client, max_tokens=None, extra_body={"ignore_eos": False})
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens >= 1


async def test_usage_of_a_stream_comes_when_asked_for(client):
    options = {"include_usage": True}
    *chunks, last = await gather(await chat(client, stream=True, stream_options=options))
    assert last.choices == []
    assert last.usage.completion_tokens == 8
    assert all(chunk.usage is None for chunk in chunks)


async def test_running_usage_comes_when_asked_for(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await gather(await chat(client, stream=True, stream_options=options))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 8


@pytest.mark.parametrize("stream", [False, True])
async def test_several_choices_have_their_own_text(client, stream):
    answer = await chat(client, n=3, seed=11, stream=stream)
    if stream:
        chunks = await gather(answer)
        found = texts(chunks)
        assert reasons(chunks) == [(0, "length"), (1, "length"), (2, "length")]
    else:
        found = {choice.index: choice.message.content for choice in answer.choices}
        assert answer.usage.completion_tokens == 24
    assert sorted(found) == [0, 1, 2]
    assert len(set(found.values())) == 3


async def test_a_seed_repeats_an_answer(client):
    one, two, other = [
        (await chat(client, seed=seed)).choices[0].message.content for seed in (5, 5, 6)
    ]
    assert one == two
    assert one != other


async def test_both_names_of_the_limit(client):
    answer = await chat(client, max_tokens=None, max_completion_tokens=3)
    assert answer.usage.completion_tokens == 3


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_ends_the_answer_before_it(client, stream):
    whole = (await chat(client, seed=3, max_tokens=24)).choices[0].message.content
    stop = whole[10:14]
    answer = await chat(client, seed=3, max_tokens=24, stop=["\x00never", stop], stream=stream)
    if stream:
        chunks = await gather(answer)
        content, reason = texts(chunks)[0], reasons(chunks)[0][1]
    else:
        content, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert reason == "stop"
    assert content == whole[: whole.index(stop)]


async def test_a_stop_string_is_kept_when_asked_for(client):
    whole = (await chat(client, seed=3, max_tokens=24)).choices[0].message.content
    stop = whole[10:14]
    extra = {"include_stop_str_in_output": True}
    kept = await chat(client, seed=3, max_tokens=24, stop=stop, extra_body=extra)
    assert kept.choices[0].message.content == whole[: whole.index(stop) + len(stop)]


async def test_no_stop_is_no_stop(client):
    assert (await chat(client, stop=None)).choices[0].finish_reason == "length"


async def test_a_stop_token_ends_the_answer(client):
    extra = {"logprobs": 0}
    whole = await complete(client, seed=3, max_tokens=12, extra_body=extra)
    fourth = whole.choices[0].logprobs.tokens[3]
    ids = (await post_json(client, "/tokenize", prompt=fourth, add_special_tokens=False))["tokens"]
    assert len(ids) == 1
    answer = await complete(client, seed=3, max_tokens=12, extra_body={"stop_token_ids": ids})
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens <= 4


@pytest.mark.parametrize("stream", [False, True])
async def test_chat_logprobs(client, stream):
    answer = await chat(client, logprobs=True, top_logprobs=2, seed=1, stream=stream)
    if stream:
        chunks = [chunk.choices[0] for chunk in await gather(answer)]
        entries = [
            entry for choice in chunks if choice.logprobs for entry in choice.logprobs.content
        ]
    else:
        entries = answer.choices[0].logprobs.content
    assert len(entries) == 8
    for entry in entries:
        assert entry.logprob <= 0
        assert bytes(entry.bytes).decode(errors="replace") == entry.token
        assert len(entry.top_logprobs) <= 2


async def test_fields_of_other_servers_are_served(client):
    extra = {
        "top_k": 5,
        "min_p": 0.01,
        "min_tokens": 2,
        "skip_special_tokens": False,
        "stop_token_ids": [3],
        "cache_salt": "pepper",
        "priority": 1,
        "slo": {"class": "chat", "ttft_ms": 500},
        "ttft_slo_ms": 400,
        "add_generation_prompt": True,
        "chat_template_kwargs": {"thinking": False},
    }
    answer = await chat(client, temperature=0.5, top_p=0.9, extra_body=extra)
    assert answer.choices[0].message.content is not None


async def test_harmless_fields_are_accepted(client):
    raw = await client.chat.completions.with_raw_response.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=2,
        user="someone",
        metadata={"a": "b"},
        store=False,
        presence_penalty=0,
        frequency_penalty=0,
        n=1,
        response_format={"type": "text"},
        tool_choice="none",
        parallel_tool_calls=False,
        modalities=["text"],
    )
    assert raw.parse().usage.completion_tokens <= 2
    assert "x-appliance-ignored" not in raw.headers


async def test_text_parts_and_a_system_message(client):
    parts: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    joined: Any = [parts[0], {"role": "user", "content": "ab"}]
    one = await chat(client, messages=parts, seed=1)
    two = await chat(client, messages=joined, seed=1)
    assert one.choices[0].message.content == two.choices[0].message.content


async def test_a_repeated_prompt_is_found_in_the_cache(client):
    messages: Any = [{"role": "user", "content": "one two three four five six seven " * 12}]
    await chat(client, messages=messages)
    again = await chat(client, messages=messages)
    assert again.usage.prompt_tokens_details.cached_tokens >= 16


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"presence_penalty": 2.5}, "presence_penalty", "invalid_value"),
        ({"frequency_penalty": -3}, "frequency_penalty", "invalid_value"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "invalid_value"),
        ({"logit_bias": {"1024": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"5": 1, "05": 2}}, "logit_bias", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"extra_body": {"best_of": 2}}, "best_of", "unsupported_parameter"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "invalid_value"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"tool_choice": "sometimes"}, "tool_choice", "unsupported_value"),
        ({"modalities": ["audio"]}, "modalities", "unsupported_parameter"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "unsupported_parameter"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction",
         "unsupported_parameter"),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"top_p": 2}, "top_p", "invalid_value"),
        ({"n": 1000}, "n", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 100_000}, "max_tokens", "context_length_exceeded"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]},
         "messages[0].tool_call_id", "invalid_value"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url",
                                                     "image_url": {"url": "x"}}]}]},
         "messages[0].content[0].type", "unsupported_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"extra_body": {"slo": "gold"}}, "slo", "invalid_value"),
        ({"extra_headers": {"x-slo-ttft-ms": "-1"}}, "x-slo-ttft-ms", "invalid_value"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
async def test_chat_refusals_name_the_field(client, fields, param, code, stream):
    if stream and "stream_options" not in fields:
        fields = {**fields, "stream": True}
    with pytest.raises(openai.BadRequestError) as caught:
        await chat(client, **fields)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert caught.value.type == "invalid_request_error"


async def test_an_over_long_prompt_is_refused_at_once(client):
    for words in (3000, 200_000):
        messages: Any = [{"role": "user", "content": "hello " * words}]
        with pytest.raises(openai.BadRequestError) as caught:
            await chat(client, messages=messages)
        assert caught.value.code == "context_length_exceeded"
        assert caught.value.param == "messages"


# --- completions ----------------------------------------------------------------------------------


async def post_json(client: AsyncOpenAI, path: str, **body: Any) -> Any:
    root = str(client.base_url).removesuffix("v1/").rstrip("/")
    return await client.post(root + path, body=body, cast_to=object)


async def test_a_completion_in_one_piece(client):
    answer = await complete(client, max_tokens=None)
    assert answer.id.startswith("cmpl-")
    assert answer.object == "text_completion"
    assert answer.usage.completion_tokens == 16  # the API's default
    assert answer.choices[0].finish_reason == "length"


async def test_a_completion_as_a_stream_says_the_same(client):
    whole = await complete(client, seed=2)
    chunks = await gather(await complete(client, seed=2, stream=True))
    assert texts(chunks) == {0: whole.choices[0].text}
    assert reasons(chunks) == [(0, "length")]


async def test_a_text_and_its_ids_are_the_same_prompt(client):
    ids = (await post_json(client, "/tokenize", prompt="red fox"))["tokens"]
    by_text = await complete(client, prompt="red fox", seed=4)
    by_ids = await complete(client, prompt=ids, seed=4)
    assert by_text.choices[0].text == by_ids.choices[0].text
    assert by_text.usage.prompt_tokens == by_ids.usage.prompt_tokens == len(ids)


@pytest.mark.parametrize("stream", [False, True])
async def test_choices_of_several_prompts_are_numbered_prompt_by_prompt(client, stream):
    alone = [
        (await complete(client, prompt=prompt, n=2, seed=9)).choices for prompt in ("red", "blue")
    ]
    expected = [choice.text for choices in alone for choice in choices]
    answer = await complete(client, prompt=["red", "blue"], n=2, seed=9, stream=stream)
    if stream:
        found = texts(await gather(answer))
        assert [found[index] for index in range(4)] == expected
    else:
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert [choice.text for choice in answer.choices] == expected
        assert answer.usage.completion_tokens == 32


async def test_lists_of_ids_are_prompts(client):
    answer = await complete(client, prompt=[[1, 20, 21], [1, 30]])
    assert len(answer.choices) == 2
    assert answer.usage.prompt_tokens == 5


async def test_completion_logprobs_are_columns(client):
    answer = await complete(client, logprobs=2, seed=8)
    columns = answer.choices[0].logprobs
    assert len(columns.tokens) == len(columns.token_logprobs) == len(columns.top_logprobs) == 8
    assert "".join(columns.tokens) == answer.choices[0].text
    assert columns.text_offset[:2] == [0, len(columns.tokens[0])]
    assert all(
        token in top for token, top in zip(columns.tokens, columns.top_logprobs, strict=True)
    )


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"echo": True, "logprobs": 1}, "echo", "unsupported_parameter"),
        ({"best_of": 3}, "best_of", "unsupported_parameter"),
        ({"suffix": "end"}, "suffix", "unsupported_parameter"),
        ({"prompt": []}, "prompt", "invalid_value"),
        ({"prompt": [1, 5000]}, "prompt", "invalid_value"),
        ({"prompt": [[1], []]}, "prompt[1]", "invalid_value"),
        ({"prompt": ["x"] * 100, "n": 100}, "prompt", "invalid_value"),
        ({"prompt": [5] * 5000}, "prompt", "context_length_exceeded"),
        ({"prompt": "x", "max_tokens": 2048}, "max_tokens", "context_length_exceeded"),
        ({"logprobs": 50}, "logprobs", "invalid_value"),
        ({"stop": [""]}, "stop", "invalid_value"),
        ({"extra_body": {"repetition_penalty": 0}}, "repetition_penalty", "invalid_value"),
        ({"extra_body": {"guided_regex": "a*"}}, "ignore_eos", "unsupported_parameter"),
        ({"extra_body": {"stop_token_ids": [99999]}}, "stop_token_ids", "invalid_value"),
    ],
)  # fmt: skip
async def test_completion_refusals_name_the_field(client, fields, param, code):
    with pytest.raises(openai.BadRequestError) as caught:
        await complete(client, **fields)
    assert (caught.value.param, caught.value.code) == (param, code)


@pytest.mark.parametrize("n", [1, 2])
async def test_echo_puts_the_prompt_before_each_answer(client, n):
    prompts: Any = ["red fox", "blue"]
    fields = {"prompt": prompts, "n": n, "seed": 3, "best_of": n}
    plain = await complete(client, **fields)
    echoed = await complete(client, echo=True, **fields)
    want = [prompts[i // n] + choice.text for i, choice in enumerate(plain.choices)]
    assert [choice.text for choice in echoed.choices] == want
    assert echoed.usage == plain.usage
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await gather(
        await complete(client, echo=True, stream=True, stream_options=options, **fields)
    )
    assert texts(chunks) == dict(enumerate(want))
    assert all(chunk.usage is not None for chunk in chunks)


async def test_echo_of_ids_is_their_text(client):
    ids = (await post_json(client, "/tokenize", prompt="red fox"))["tokens"]
    answer = await complete(client, prompt=ids, echo=True, seed=1)
    assert answer.choices[0].text.startswith("red fox")


async def test_tokenize_and_detokenize_are_inverse(client):
    tokens = await post_json(client, "/tokenize", prompt="red fox", model="tiny")
    assert tokens["count"] == len(tokens["tokens"])
    assert tokens["max_model_len"] == 2048
    back = await post_json(client, "/detokenize", tokens=tokens["tokens"])
    assert back == {"prompt": "red fox"}
    named = await post_json(client, "/tokenize", messages=MESSAGES, return_token_strs=True)
    assert named["token_strs"][0] == "<|bos|>"
    usage = (await chat(client)).usage
    assert usage.prompt_tokens == named["count"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": MESSAGES}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {"tokens": [1, 1_000_000]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
    ],
)
async def test_token_routes_refuse_by_name(client, path, body, param):
    with pytest.raises(openai.BadRequestError) as caught:
        await post_json(client, path, **body)
    assert caught.value.param == param
