"""Programs that use one client each as its manual says; `tools.try_clients` runs them.

Each begins with `PRELUDE`, which finds the server in the environment and says of every thing tried
what came of it. The questions are those that the bundled model answers, so that not only the form
of an answer is looked at but its words too, where they are known.
"""

PRELUDE = """
import os
BASE, MODEL = os.environ["BASE_URL"], os.environ["MODEL"]
ASK = [{"role": "user", "content": "Spell ocean letter by letter."}]
NEED = [{"role": "user", "content": "What is the weather in harbor?"}]
FORM = "Make a JSON object with name turtle, color green and count 12."
SUM = [{"role": "user", "content": "What is 47 + 38?"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {
    "name": "get_weather", "description": "Weather in a city", "parameters": PARAMETERS}}]
NAMED = {"type": "function", "function": {"name": "get_weather"}}
CALLED, RESULT = ("get_weather", {"city": "harbor"}), '{"degrees": 21}'
REPLY = "It is 21 degrees in harbor."
def same(found, expected):
    assert found == expected, found
    return found
def check(name, function):
    try:
        words, outcome = function(), "ok"
    except Exception as error:
        words, outcome = f"{type(error).__name__}: {error}", "FAILED"
    print("@", outcome, name, " ".join(str(words).split())[:300], sep="\\t", flush=True)
def raises(kind, function):
    try:
        function()
    except kind as error:
        return f"{type(error).__name__} {getattr(error, 'code', None) or ''}"
    raise AssertionError("nothing was raised")
"""
OPENAI = """
import json, openai
from openai import OpenAI
from pydantic import BaseModel
client = OpenAI(base_url=BASE, api_key="none")
chat, completions = client.chat.completions.create, client.completions.create
settings = {"model": MODEL, "messages": ASK, "temperature": 0}
class Thing(BaseModel):
    name: str
    color: str
    count: int
THING = Thing(name="turtle", color="green", count=12)
wanted = {"model": MODEL, "messages": NEED, "tools": TOOLS, "temperature": 0, "max_tokens": 200}
def streamed():
    chunks = list(chat(stream=True, stream_options={"include_usage": True}, **settings))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert chunks[-1].usage.completion_tokens > 0 and not chunks[-1].choices
    return text
def helper():
    with client.chat.completions.stream(**settings) as stream:
        for _ in stream:
            pass
        return stream.get_final_completion().choices[0].message.content
def responded():
    with client.responses.stream(model=MODEL, input="Spell ocean letter by letter.") as stream:
        for _ in stream:
            pass
        return stream.get_final_response().output_text
def of(calls):
    (call,) = calls
    return call.function.name, json.loads(call.function.arguments)
def called(choice):
    answer = chat(tool_choice=choice, **wanted).choices[0]
    assert answer.finish_reason == "tool_calls"
    return same(of(answer.message.tool_calls), CALLED)
def called_in_pieces(choice):
    with client.chat.completions.stream(tool_choice=choice, **wanted) as stream:
        for _ in stream:
            pass
        return same(of(stream.get_final_completion().choices[0].message.tool_calls), CALLED)
def answered(stream):
    first = chat(**wanted).choices[0].message
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": RESULT}
    messages = [*NEED, first.model_dump(exclude_none=True), result]
    if not stream:
        return same(chat(**{**wanted, "messages": messages}).choices[0].message.content, REPLY)
    chunks = chat(stream=True, **{**wanted, "messages": messages})
    return same("".join(c.choices[0].delta.content or "" for c in chunks), REPLY)
def responded_with_tools():
    fixed = {"model": MODEL, "tools": [{"type": "function", **TOOLS[0]["function"]}],
             "temperature": 0}
    (call,) = client.responses.create(input=NEED, **fixed).output
    same((call.name, json.loads(call.arguments)), CALLED)
    output = {"type": "function_call_output", "call_id": call.call_id, "output": RESULT}
    items = [*NEED, call.model_dump(exclude_none=True), output]
    return same(client.responses.create(input=items, **fixed).output_text, REPLY)
check("models", lambda: [m.id for m in client.models.list()] + [client.models.retrieve(MODEL).id])
check("chat", lambda: chat(**settings).choices[0].message.content)
check("chat, streamed, with usage", streamed)
check("chat, stream helper", helper)
check("completion, n=2, logprobs", lambda: len(completions(
    model=MODEL, prompt="repeat ox", n=2, logprobs=2, max_tokens=8, temperature=0.7).choices))
check("completion of token ids", lambda: completions(
    model=MODEL, prompt=[5, 6, 7], max_tokens=4).usage.completion_tokens)
check("unknown model", lambda: raises(openai.NotFoundError, lambda: chat(
    **{**settings, "model": "x"})))
check("prompt too long", lambda: raises(openai.BadRequestError, lambda: completions(
    model=MODEL, prompt="word " * 9000)))
check("embeddings refused by name", lambda: raises(openai.NotFoundError, lambda:
    client.embeddings.create(model=MODEL, input="x")))
check("responses", lambda: client.responses.create(
    model=MODEL, input="Spell ocean letter by letter.", temperature=0).output_text)
check("responses, streamed", responded)
check("JSON schema (parse)", lambda: same(client.chat.completions.parse(
    model=MODEL, messages=[{"role": "user", "content": FORM}], response_format=Thing,
    temperature=0, max_tokens=300).choices[0].message.parsed, THING))
for choice in ("auto", "required", NAMED):
    shown = choice if isinstance(choice, str) else "named"
    check(f"tool call, {shown}", lambda: called(choice))
    check(f"tool call, {shown}, streamed", lambda: called_in_pieces(choice))
check("tools on offer, none needed", lambda: same(
    chat(**{**wanted, "messages": SUM}).choices[0].message.content, "85"))
check("tool result, answered", lambda: answered(False))
check("tool result, answered, streamed", lambda: answered(True))
check("responses, tool call and result", responded_with_tools)
"""
LITELLM = """
import asyncio, json, litellm
at = {"api_base": BASE, "api_key": "none"}
settings = {"model": "openai/" + MODEL, "messages": ASK, "temperature": 0, **at}
complete = litellm.completion
check("chat", lambda: complete(**settings).choices[0].message.content)
check("chat, streamed", lambda: "".join(c.choices[0].delta.content or "" for c in complete(
    stream=True, stream_options={"include_usage": True}, **settings)))
check("chat, async", lambda: asyncio.run(litellm.acompletion(**settings)).usage.total_tokens)
check("chat as hosted_vllm", lambda: complete(
    **{**settings, "model": "hosted_vllm/" + MODEL}).choices[0].message.content)
check("text completion", lambda: litellm.text_completion(
    model="text-completion-openai/" + MODEL, prompt="repeat ox", max_tokens=8, **at).usage)
check("prompt too long", lambda: raises(litellm.ContextWindowExceededError, lambda: complete(
    **{**settings, "messages": [{"role": "user", "content": "word " * 9000}]})))
check("unknown model", lambda: raises(litellm.NotFoundError, lambda: complete(
    **{**settings, "model": "openai/other"})))
schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"],
          "additionalProperties": False}
wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
check("JSON schema", lambda: json.loads(complete(
    response_format=wanted, max_tokens=200, **settings).choices[0].message.content)["a"])
need = {**settings, "messages": NEED, "tools": TOOLS}
def of(message):
    (call,) = message.tool_calls
    return call.function.name, json.loads(call.function.arguments)
def called_in_pieces():
    chunks = list(complete(stream=True, **need))
    return same(of(litellm.stream_chunk_builder(chunks).choices[0].message), CALLED)
def answered():
    first = complete(**need).choices[0].message
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": RESULT}
    messages = [*NEED, first.model_dump(exclude_none=True), result]
    return same(complete(**{**need, "messages": messages}).choices[0].message.content, REPLY)
for choice in ("auto", "required", NAMED):
    shown = choice if isinstance(choice, str) else "named"
    check(f"tool call, {shown}", lambda: same(
        of(complete(tool_choice=choice, **need).choices[0].message), CALLED))
check("tool call, streamed", called_in_pieces)
check("tool result, answered", answered)
"""
LANGCHAIN = """
import asyncio, functools
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel
class Thing(BaseModel):
    name: str
    color: str
    count: int
THING = Thing(name="turtle", color="green", count=12)
at = {"model": MODEL, "base_url": BASE, "api_key": "none"}
chat = ChatOpenAI(temperature=0, **at)
words = ASK[0]["content"]
async def streamed():
    return "".join([chunk.content async for chunk in chat.astream(words)])
check("invoke", lambda: chat.invoke(words).content)
check("stream", lambda: "".join(chunk.content for chunk in chat.stream(words)))
check("stream, async", lambda: asyncio.run(streamed()))
check("batch", lambda: [m.content for m in chat.batch([words, SUM[0]["content"]])])
check("usage", lambda: chat.invoke(words).usage_metadata)
check("completion", lambda: repr(OpenAI(max_tokens=6, **at).invoke("repeat ox")))
check("structured output, JSON schema", lambda: same(ChatOpenAI(
    temperature=0, max_tokens=300, **at).with_structured_output(
        Thing, method="json_schema").invoke(FORM), THING))
@tool
def get_weather(city: str) -> str:
    "Weather in a city"
    return RESULT
need = NEED[0]["content"]
def of(message):
    (call,) = message.tool_calls
    return call["name"], call["args"]
def whole(stream):
    pieces = list(stream)
    return functools.reduce(lambda left, right: left + right, pieces)
def answered():
    armed = chat.bind_tools([get_weather])
    first = armed.invoke(need)
    result = get_weather.invoke(first.tool_calls[0])
    return same(armed.invoke([HumanMessage(need), first, result]).content, REPLY)
for choice in ("auto", "any", "get_weather"):
    check(f"bind_tools, {choice}", lambda: same(of(chat.bind_tools(
        [get_weather], tool_choice=choice).invoke(need)), CALLED))
check("bind_tools, streamed", lambda: same(
    of(whole(chat.bind_tools([get_weather]).stream(need))), CALLED))
check("tool run, result answered", answered)
check("structured output, function calling", lambda: ChatOpenAI(
    temperature=0, max_tokens=300, **at).with_structured_output(
        Thing, method="function_calling").invoke(FORM))
"""
INSTRUCTOR = """
import instructor
from openai import OpenAI
from pydantic import BaseModel
class Thing(BaseModel):
    name: str
    color: str
    count: int
THING = Thing(name="turtle", color="green", count=12)
def ask(mode):
    client = instructor.from_openai(OpenAI(base_url=BASE, api_key="none"), mode=mode)
    return client.chat.completions.create(
        model=MODEL, response_model=Thing, max_retries=0, temperature=0, max_tokens=300,
        messages=[{"role": "user", "content": FORM}])
class get_weather(BaseModel):
    "Weather in a city"
    city: str
def known():
    client = instructor.from_openai(
        OpenAI(base_url=BASE, api_key="none"), mode=instructor.Mode.TOOLS)
    return same(client.chat.completions.create(
        model=MODEL, response_model=get_weather, max_retries=0, temperature=0, max_tokens=300,
        messages=NEED).city, "harbor")
check("Mode.JSON_SCHEMA", lambda: same(
    ask(instructor.Mode.JSON_SCHEMA).model_dump(), THING.model_dump()))
check("Mode.TOOLS", lambda: ask(instructor.Mode.TOOLS))
check("Mode.TOOLS, a function that the model knows", known)
"""
