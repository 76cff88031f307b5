"""Tasks with tools: call a listed function, then answer from its result.

The functions come from a small catalog; which of them a conversation lists, and how it writes
their schemas, varies. A function is only asked for where it is listed; requests that need none
are the tasks of `tools.model_tasks`. A call has the form that Hermes and Qwen models write, a JSON
object between `<tool_call>` lines; it is compared by value.
"""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import msgspec

from tools.task_record import (
    COLORS,
    WORDS,
    Message,
    Split,
    Task,
    checksum_holds_out,
    draw_number,
    user_message,
)

MAX_TOOLS = 4
CALL_START, CALL_END = "<tool_call>\n", "\n</tool_call>"
_DESCRIPTION_FRACTION = 0.7
_DETAIL_FRACTION = 0.2
_SYSTEM_FRACTION = 0.4


class Parameter(msgspec.Struct, frozen=True):
    """A parameter: its name and what it holds (`word`, `color` or `number`)."""

    name: str
    kind: str


class Function(msgspec.Struct, frozen=True, kw_only=True):
    """A function of the catalog: `requests` hold the arguments as {0} and {1}; `reply` also {r},
    the number that the call returns under `result` (none: the call returns that it is done)."""

    name: str
    description: str
    parameters: tuple[Parameter, ...]
    requests: tuple[str, ...]
    reply: str
    result: str = ""


_CATALOG: Mapping[str, Function] = MappingProxyType(
    {
        "weather": Function(
            name="get_weather",
            description="Weather in a city",
            parameters=(Parameter("city", "word"),),
            requests=(
                "What is the weather in {0}?",
                "How is the weather in {0} today?",
                "weather in {0}",
            ),
            result="degrees",
            reply="It is {r} degrees in {0}.",
        ),
        "time": Function(
            name="get_time",
            description="Time of day in a country",
            parameters=(Parameter("country", "word"),),
            requests=("What time is it in {0}?", "Tell me the time in {0}.", "time in {0}"),
            result="hour",
            reply="It is {r} o'clock in {0}.",
        ),
        "light": Function(
            name="set_light",
            description="Change the color of a light",
            parameters=(
                Parameter("room", "word"),
                Parameter("color", "color"),
            ),
            requests=(
                "Make the light in the {0} {1}.",
                "Set the light in the {0} to {1}.",
                "light in the {0}: {1}",
            ),
            reply="The light is {1}.",
        ),
        "timer": Function(
            name="set_timer",
            description="Start a timer",
            parameters=(Parameter("minutes", "number"),),
            requests=(
                "Set a timer for {0} minutes.",
                "Start a timer of {0} minutes",
                "timer: {0} minutes",
            ),
            reply="The timer runs for {0} minutes.",
        ),
        "order": Function(
            name="order_item",
            description="Order things",
            parameters=(
                Parameter("item", "word"),
                Parameter("count", "number"),
            ),
            requests=(
                "I order {1} of the {0}.",
                "Please order the {0}, {1} of it.",
                "order {0}: {1}",
            ),
            result="order",
            reply="Order {r} is on its way.",
        ),
        "price": Function(
            name="get_price",
            description="Price of a thing",
            parameters=(Parameter("product", "word"),),
            requests=(
                "Tell me the price of the {0}.",
                "What is the price of the {0}?",
                "price of {0}",
            ),
            result="price",
            reply="The {0} costs {r}.",
        ),
        "message": Function(
            name="send_message",
            description="Send a message to someone",
            parameters=(
                Parameter("recipient", "word"),
                Parameter("text", "word"),
            ),
            requests=(
                "Send a message to {0}: {1}",
                "Send the message {1} to {0}, please.",
                "message to {0}: {1}",
            ),
            reply="Sent to {0}.",
        ),
        "song": Function(
            name="play_song",
            description="Play music",
            parameters=(Parameter("title", "word"),),
            requests=("Play the song {0}.", "I want to hear the song {0}.", "song: {0}"),
            reply="Playing {0}.",
        ),
        "multiply": Function(
            name="multiply",
            description="Multiply two numbers",
            parameters=(
                Parameter("first", "number"),
                Parameter("second", "number"),
            ),
            requests=(
                "Please multiply {0} by {1}.",
                "I want to multiply {0} and {1}.",
                "multiply {0} {1}",
            ),
            result="product",
            reply="The product is {r}.",
        ),
        "route": Function(
            name="find_route",
            description="Route between two places",
            parameters=(
                Parameter("start", "word"),
                Parameter("goal", "word"),
            ),
            requests=(
                "What is the route from {0} to {1}?",
                "Find a route from {0} to {1}.",
                "route from {0} to {1}",
            ),
            result="kilometers",
            reply="It is {r} kilometers to {1}.",
        ),
        "table": Function(
            name="book_table",
            description="Book a table in a restaurant",
            parameters=(
                Parameter("people", "number"),
                Parameter("hour", "number"),
            ),
            requests=(
                "Book a table for {0} people at {1}.",
                "A table for {0} at {1}, please.",
                "table for {0}, hour {1}",
            ),
            result="table",
            reply="You have table {r}.",
        ),
        "notes": Function(
            name="search_notes",
            description="Search the notes",
            parameters=(Parameter("query", "word"),),
            requests=(
                "Search my notes for {0}.",
                "Which notes have the word {0}?",
                "notes about {0}",
            ),
            result="found",
            reply="I found {r} notes about {0}.",
        ),
    }
)


class Offer(msgspec.Struct, frozen=True):
    """A function of the catalog as one conversation lists it."""

    kind: str
    schema: Message


def _value(kind: str, rng: random.Random) -> str | int:
    match kind:
        case "word":
            return rng.choice(WORDS)
        case "color":
            return rng.choice(COLORS)
        case _:
            return draw_number(rng)


def _shuffled(fields: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """The fields as written, or in another order: clients differ."""
    names = list(fields)
    if rng.random() < 0.3:
        rng.shuffle(names)
    return {name: fields[name] for name in names}


def _offer(kind: str, rng: random.Random) -> Offer:
    function = _CATALOG[kind]
    properties: dict[str, Any] = {}
    for parameter in function.parameters:
        detail: dict[str, Any] = {"type": "integer" if parameter.kind == "number" else "string"}
        if rng.random() < _DETAIL_FRACTION:
            detail["description"] = f"The {parameter.name}"
        properties[parameter.name] = _shuffled(detail, rng)
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if rng.random() < 0.85:
        parameters["required"] = list(properties)
    if rng.random() < 0.15:
        parameters["additionalProperties"] = False
    schema: dict[str, Any] = {"name": function.name}
    if rng.random() < _DESCRIPTION_FRACTION:
        schema["description"] = function.description + rng.choice((".", ""))
    schema["parameters"] = _shuffled(parameters, rng)
    return Offer(kind, {"type": "function", "function": schema})


def draw_offers(rng: random.Random, *, max_tools: int = MAX_TOOLS) -> tuple[Offer, ...]:
    """One to `max_tools` functions, as a conversation lists them."""
    return tuple(
        _offer(kind, rng) for kind in rng.sample(list(_CATALOG), rng.randint(1, max_tools))
    )


def call_text(name: str, arguments: Mapping[str, Any]) -> str:
    """A call as the model writes it."""
    return f"{CALL_START}{json.dumps({'name': name, 'arguments': dict(arguments)})}{CALL_END}"


def parse_call(text: str) -> Mapping[str, Any] | None:
    """The object (`name`, `arguments`) in a text that is one call and nothing else, or None."""
    stripped = text.strip()
    start, end = CALL_START.strip(), CALL_END.strip()
    if not (stripped.startswith(start) and stripped.endswith(end)):
        return None
    try:
        call = json.loads(stripped[len(start) : -len(end)])
    except ValueError:
        return None
    return call if isinstance(call, dict) else None


class Exchange(msgspec.Struct, frozen=True, kw_only=True):
    """A request for a catalog function, the call for it, what the call returns, the reply."""

    request: str
    call: Mapping[str, Any]
    result: str
    reply: str
    key: str
    is_held_out: bool

    def messages(self) -> tuple[Message, ...]:
        """The messages up to the result, in the form of the chat completions API."""
        function = {"name": self.call["name"], "arguments": json.dumps(self.call["arguments"])}
        call = {"id": "call_1", "type": "function", "function": function}
        return (
            user_message(self.request),
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": self.result},
        )


def draw_exchange(offer: Offer, rng: random.Random) -> Exchange:
    """A request for the function that `offer` lists, with all that follows from it."""
    function = _CATALOG[offer.kind]
    values = [_value(parameter.kind, rng) for parameter in function.parameters]
    names = [parameter.name for parameter in function.parameters]
    arguments = dict(zip(names, values, strict=True))
    returned = draw_number(rng)
    key = " ".join(map(str, (offer.kind, *values)))
    return Exchange(
        request=rng.choice(function.requests).format(*values),
        call={"name": function.name, "arguments": arguments},
        result=json.dumps({function.result: returned} if function.result else {"status": "done"}),
        reply=function.reply.format(*values, r=returned),
        key=key,
        is_held_out=checksum_holds_out("tool", key),
    )


def draw_exchange_in(offers: Sequence[Offer], rng: random.Random, *, split: Split) -> Exchange:
    """A request of `split` for one of `offers`."""
    while True:
        exchange = draw_exchange(rng.choice(offers), rng)
        if split == "any" or exchange.is_held_out == (split == "held_out"):
            return exchange


def system_messages(
    rng: random.Random, draw: Callable[[random.Random], str]
) -> tuple[Message, ...]:
    """Sometimes a system message drawn with `draw`, before the list of functions."""
    if rng.random() < _SYSTEM_FRACTION:
        return ({"role": "system", "content": draw(rng)},)
    return ()


def tool_task(name: str, rng: random.Random, draw_system: Callable[[random.Random], str]) -> Task:
    """A task of the kind `tool_call` or `tool_result`."""
    offers = draw_offers(rng)
    messages = system_messages(rng, draw_system)
    exchange = draw_exchange(rng.choice(offers), rng)
    match name:
        case "tool_call":
            messages += (user_message(exchange.request),)
            answer = call_text(exchange.call["name"], exchange.call["arguments"])
        case "tool_result":
            messages += exchange.messages()
            answer = exchange.reply
        case _:
            raise ValueError(f"name: {name!r} is not a task with tools")
    return Task(
        name=name,
        prompt=exchange.request,
        answer=answer,
        key=exchange.key,
        is_held_out=exchange.is_held_out,
        messages=messages,
        tools=tuple(offer.schema for offer in offers),
    )
