"""From turns and tools to a job, and to how its answers are to be read: what all routes that hold
conversations share.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec

from appliance.api.context import Context
from appliance.api.errors import ApiError
from appliance.api.generate import Job
from appliance.api.prompts import encode_turns, room_for
from appliance.api.speech import Reading, Speech, begins_inside
from appliance.api.tools import NO_TOOLS, ToolUse
from appliance.api.validate import Plan, invalid
from appliance.core.types import Record
from appliance.live.records import Encoded


class Conversation(Record, frozen=True, kw_only=True):
    """What a route made of its body."""

    turns: Sequence[Mapping[str, Any]]
    use: ToolUse = NO_TOOLS
    variables: Mapping[str, Any] = {}
    """For the chat template."""
    add_generation_prompt: bool = True
    stops: tuple[str, ...] = ()
    """The plan's stop strings, where the answer must tell which of them was hit."""


async def encode(context: Context, conversation: Conversation, *, salt: str) -> Encoded:
    """The prompt's ids. Raises `ApiError`."""
    use, most = conversation.use, context.limits.max_messages
    if len(conversation.turns) > most:
        raise invalid(
            "messages",
            f"has {len(conversation.turns)} messages; at most {most} are taken "
            "(limits.max_messages).",
        )
    return await encode_turns(
        context.node.text,
        conversation.turns,
        tools=[tool.for_template() for tool in use.tools] if use.active else None,
        add_generation_prompt=conversation.add_generation_prompt,
        template_kwargs=conversation.variables,
        salt=salt,
    )


async def prepare(
    context: Context,
    speech: Speech,
    conversation: Conversation,
    *,
    name: str,
    plan: Plan,
    headers: Mapping[str, str],
) -> tuple[Job, Reading]:
    """The job, and how its answers are read. Raises `ApiError`."""
    prompt = await encode(context, conversation, salt=plan.salt)
    room = room_for(
        len(prompt.ids),
        plan.max_tokens,
        context.limits,
        chat=True,
        least=plan.sampling.min_tokens,
    )
    use = conversation.use
    reading = Reading(
        tool_format=speech.tool_format if use.active else None,
        names=use.names,
        max_calls=None if use.parallel else 1,
        reasons=speech.reasons,
        inside=speech.reasons and await begins_inside(context.node.text, prompt),
        stops=conversation.stops,
    )
    sampling = plan.sampling
    if speech.special and not reading.plain:
        sampling = msgspec.structs.replace(sampling, skip_special_tokens=False)
    if reading.stops:
        sampling = msgspec.structs.replace(sampling, include_stop=True)
    job = Job(
        name=name,
        prompts=(prompt,),
        max_tokens=(room,),
        plan=msgspec.structs.replace(plan, sampling=sampling),
        headers=headers,
    )
    return job, reading


@contextmanager
def fields_named(names: Mapping[str, str]) -> Iterator[None]:
    """Errors raised within speak of fields by the names of another API: old name -> new name."""
    try:
        yield
    except ApiError as error:
        for old, new in names.items():
            if error.body.param == old:
                error.rename(old, new)
                break
        raise
