"""POST /v1/chat/completions"""

from aiohttp import web

from appliance.api.chat_parts import PartsDialect
from appliance.api.constraints import settled
from appliance.api.context import CONTEXT, new_id
from appliance.api.conversation import Conversation, prepare
from appliance.api.decode import BodyDecoder, beside, decode_beside, read_body
from appliance.api.dialect import Dialect, PlainDialect
from appliance.api.errors import ApiError, shown
from appliance.api.generate import ignored_header, serve, unused_fields
from appliance.api.grammars import DESK
from appliance.api.plans import plan_for
from appliance.api.schemas import ChatBody
from appliance.api.speech import SPEECH, Speech
from appliance.api.tools import choice_of, tool_use, tools_of
from appliance.api.turns import turns_of
from appliance.api.validate import check_model, invalid

DECODER = web.AppKey("chat_decoder", BodyDecoder[ChatBody])


async def handle(request: web.Request) -> web.StreamResponse:
    """Answer a conversation, in one piece or as a stream."""
    context = request.app[CONTEXT]
    raw = await read_body(request, max_bytes=context.settings.max_body_bytes)
    decoded = await decode_beside(context.node.text, request.app[DECODER], raw)
    body = decoded.body
    check_model(body.model, context.node.info.model)
    if body.add_special_tokens:
        raise invalid("add_special_tokens", "must be false: the chat template writes them.")
    speech = request.app[SPEECH]
    plan = plan_for(request, body)
    conversation = await beside(context.node.text, len(raw), lambda: conversation_of(body, speech))
    form = await settled(
        request.app[DESK],
        body,
        plan=plan,
        conversation=conversation,
        speech=speech,
    )
    job, reading = await prepare(
        context,
        speech,
        form.conversation,
        name=new_id("chatcmpl"),
        plan=form.plan,
        headers=ignored_header((*decoded.ignored, *form.ignored, *unused_fields(context, plan))),
    )
    dialect: Dialect
    if reading.plain:
        dialect = PlainDialect(context, job.plan, name=job.name, chat=True)
    else:
        dialect = PartsDialect(context, job.plan, reading, name=job.name)
    return await serve(context, request, job=job, dialect=dialect)


def conversation_of(body: ChatBody, speech: Speech) -> Conversation:
    """Turns, tools and template variables. Raises `ApiError`."""
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        if body.reasoning_effort != "none":
            raise ApiError(
                f"'reasoning_effort' is not supported with the value "
                f"{shown(body.reasoning_effort)}; leave it out, or give 'none'.",
                code="unsupported_parameter",
                param="reasoning_effort",
            )
        variables |= speech.quiet("reasoning_effort")
    use = tool_use(
        tools_of(body.tools),
        choice_of(body.tool_choice),
        parallel=body.parallel_tool_calls,
        speech=speech,
    )
    return Conversation(
        turns=turns_of(body.messages),
        use=use,
        variables=variables,
        add_generation_prompt=body.add_generation_prompt is not False,
    )
