"""What an answer is held to: a fixed form that was asked for, or the form of tool calls.

Calls are held to a grammar where one is required, where a tool is `strict`, and where they may come
in place of a JSON document; otherwise the model writes them as it likes and they are read from its
text.
"""

import msgspec

from appliance.api.call_grammar import CallSpec, CallTool
from appliance.api.conversation import Conversation
from appliance.api.grammars import GrammarDesk, Wanted
from appliance.api.schemas import GenerationBody
from appliance.api.speech import Speech
from appliance.api.structured import check_end, constrained, spoken_plainly, wanted_of
from appliance.api.validate import Plan
from appliance.core.types import Record


class Settled(Record, frozen=True, kw_only=True):
    """Plan and conversation with the grammar, if there is one; and fields whose wishes are not all
    enforced (for the header of ignored fields)."""

    plan: Plan
    conversation: Conversation
    ignored: tuple[str, ...] = ()


async def settled(
    desk: GrammarDesk,
    body: GenerationBody,
    *,
    plan: Plan,
    conversation: Conversation,
    speech: Speech,
) -> Settled:
    """Find the grammar of the answers. Raises `ApiError`."""
    spec, wanted = call_spec(body, conversation, speech), wanted_of(body)
    if spec is None:
        form = await constrained(desk, body, plan)
        quiet = spoken_plainly(conversation, form.plan, speech)
        return Settled(plan=form.plan, conversation=quiet, ignored=form.ignored)
    param = "tools" if conversation.use.choice.mode == "auto" else "tool_choice"
    check_end(body, param)
    if not spec.prose:
        reason = wanted.param if wanted is not None and spec.document else param
        variables = {**conversation.variables, **speech.quiet(reason)}
        conversation = msgspec.structs.replace(conversation, variables=variables)
    text = msgspec.json.encode(spec).decode()
    known = await desk.compiled(Wanted(param="tools", kind="tool_calls", text=text))
    sampling = msgspec.structs.replace(plan.sampling, grammar=known.grammar)
    return Settled(
        plan=msgspec.structs.replace(plan, sampling=sampling),
        conversation=conversation,
        ignored=("tools",) if known.ignored else (),
    )


def call_spec(body: GenerationBody, conversation: Conversation, speech: Speech) -> CallSpec | None:
    """The answers that there may be, where calls are held to a grammar; None where they are not.
    Raises `ApiError`."""
    use, wanted = conversation.use, wanted_of(body)
    required = use.choice.mode == "required"
    strict = any(tool.strict for tool in use.tools)
    if not use.active or speech.tool_format is None:
        return None
    document = wanted if wanted is not None and not required else None
    if document is not None and document.kind != "json_schema":
        return None  # a form that does not go with calls, and is refused beside them
    if not (required or strict or document):
        return None
    return CallSpec(
        format=speech.tool_format.name,
        tools=tuple(
            CallTool(
                name=tool.name,
                parameters=None if tool.parameters is None else dict(tool.parameters),
                strict=tool.strict,
            )
            for tool in use.tools
            if tool.name in use.names
        ),
        parallel=use.parallel,
        prose=not required and document is None,
        document="" if document is None else document.text,
        lenient=document is not None and document.lenient,
        special=tuple(sorted(speech.special)),
    )
