"""POST /v1/chat/completions"""

from aiohttp import web

from appliance.api.chat_parts import PartsDialect
from appliance.api.context import CONTEXT, new_id
from appliance.api.conversation import Conversation
from appliance.api.decode import BodyDecoder
from appliance.api.dialect import Dialect, PlainDialect
from appliance.api.errors import ApiError, shown
from appliance.api.generate import Job
from appliance.api.schemas import ChatBody
from appliance.api.speech import Reading, Speech
from appliance.api.talk import Route, answer
from appliance.api.tools import choice_of, tool_use, tools_of
from appliance.api.turns import turns_of
from appliance.api.validate import invalid

DECODER = web.AppKey("chat_decoder", BodyDecoder[ChatBody])


async def handle(request: web.Request) -> web.StreamResponse:
    """Answer a conversation, in one piece or as a stream."""
    return await answer(request, ROUTE)


def check_fields(body: ChatBody) -> None:
    """Raise `ApiError` for values that are not served."""
    if body.add_special_tokens:
        raise invalid("add_special_tokens", "must be false: the chat template writes them.")


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


def _dialect(request: web.Request, body: ChatBody, job: Job, reading: Reading) -> Dialect:
    del body
    context = request.app[CONTEXT]
    if reading.plain:
        return PlainDialect(context, job.plan, name=job.name, chat=True)
    return PartsDialect(context, job.plan, reading, name=job.name)


ROUTE = Route(
    decoder=DECODER,
    check=check_fields,
    conversation_of=conversation_of,
    chat_body=lambda body: body,
    new_name=lambda: new_id("chatcmpl"),
    dialect=_dialect,
)
