"""POST /v1/messages and POST /v1/messages/count_tokens"""

from typing import Any

from aiohttp import web

from appliance.api.constraints import settled
from appliance.api.context import CONTEXT, REQUEST_ID
from appliance.api.conversation import Conversation, encode, fields_named, prepare
from appliance.api.decode import BodyDecoder, beside, decode_beside, read_body
from appliance.api.errors import ApiError, shown
from appliance.api.generate import ignored_header, serve, unused_fields
from appliance.api.grammars import DESK
from appliance.api.ids import item_id
from appliance.api.messages.blocks import turns_of_messages
from appliance.api.messages.dialect import Heading, MessagesDialect
from appliance.api.messages.schemas import MessagesBody, OutputFormat, ToolChoiceBody
from appliance.api.models import json_answer
from appliance.api.plans import plan_for
from appliance.api.schemas import ChatBody, GenerationBody, JsonSchemaFormat, ResponseFormat
from appliance.api.speech import SPEECH, SWITCH, Speech
from appliance.api.tools import Choice, Tool, check_names, tool_use
from appliance.api.validate import check_model, invalid

DECODER = web.AppKey("messages_decoder", BodyDecoder[MessagesBody])
THINKING = ("adaptive", "disabled", "enabled")
NAMES = {
    "max_completion_tokens": "max_tokens",
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "response_format.type": "output_config.format.type",
    "response_format.json_schema.schema": "output_config.format.schema",
}
"""Fields of chat completions by the names that they have here."""


async def handle(request: web.Request) -> web.StreamResponse:
    """Answer a conversation, in one piece or as a stream of events."""
    context = request.app[CONTEXT]
    raw = await read_body(request, max_bytes=context.settings.max_body_bytes)
    decoded = await decode_beside(context.node.text, request.app[DECODER], raw)
    body = decoded.body
    check_model(body.model, context.node.info.model)
    check_fields(body)
    if body.max_tokens is None:
        raise ApiError(
            "'max_tokens' is missing; it is required.",
            code="missing_required_parameter",
            param="max_tokens",
        )
    speech = request.app[SPEECH]
    conversation = await beside(context.node.text, len(raw), lambda: conversation_of(body, speech))
    wishes = wishes_of(body, speech)
    with fields_named(NAMES):
        chat = chat_body(body)
        plan = plan_for(request, chat)
        form = await settled(
            request.app[DESK],
            chat,
            plan=plan,
            conversation=conversation,
            speech=speech,
        )
        name = item_id("msg")
        job, reading = await prepare(
            context,
            speech,
            form.conversation,
            name=name,
            plan=form.plan,
            headers=ignored_header(
                (*decoded.ignored, *form.ignored, *unused_fields(context, plan), *wishes)
            ),
        )
    heading = Heading(name=name, model=context.node.info.model, request_id=request[REQUEST_ID])
    return await serve(context, request, job=job, dialect=MessagesDialect(heading, reading))


async def handle_count(request: web.Request) -> web.Response:
    """How many tokens the prompt of this conversation has."""
    context = request.app[CONTEXT]
    raw = await read_body(request, max_bytes=context.settings.max_body_bytes)
    body = (await decode_beside(context.node.text, request.app[DECODER], raw)).body
    check_model(body.model, context.node.info.model)
    check_fields(body)
    speech = request.app[SPEECH]
    conversation = await beside(context.node.text, len(raw), lambda: conversation_of(body, speech))
    prompt = await encode(context, conversation, salt="")
    return json_answer({"input_tokens": len(prompt.ids)})


def check_fields(body: MessagesBody) -> None:
    """Raise `ApiError` for values that are not served."""
    if body.n not in (None, 1):
        raise invalid("n", "must be 1: there is one message.")
    if body.stop is not None:
        raise invalid("stop", "is called 'stop_sequences' here.")
    if body.thinking is not None and body.thinking.type not in THINKING:
        raise ApiError(
            f"'thinking.type' is {shown(body.thinking.type)}; served are {', '.join(THINKING)}.",
            code="unsupported_value",
            param="thinking.type",
        )
    config = body.output_config
    if config is not None and config.effort not in (None, "high"):
        raise ApiError(
            f"'output_config.effort' is not supported with the value {shown(config.effort)}; "
            "leave it out.",
            code="unsupported_parameter",
            param="output_config.effort",
        )


def conversation_of(body: MessagesBody, speech: Speech) -> Conversation:
    """Turns, tools and template variables. Raises `ApiError`."""
    variables = dict(body.chat_template_kwargs or {})
    if body.thinking is not None and body.thinking.type == "disabled":
        variables |= speech.quiet("thinking")
    elif body.thinking is not None and body.thinking.type == "enabled" and speech.switch:
        variables[SWITCH] = True
    use = tool_use(
        tools_of(body),
        choice_of(body.tool_choice),
        parallel=body.tool_choice is None or body.tool_choice.disable_parallel_tool_use is not True,
        speech=speech,
    )
    return Conversation(
        turns=turns_of_messages(body),
        use=use,
        variables=variables,
        stops=tuple(body.stop_sequences or ()),
    )


def wishes_of(body: MessagesBody, speech: Speech) -> tuple[str, ...]:
    """Names of fields that are taken and do nothing: how long to think, or to think at all where
    the model cannot."""
    if body.thinking is None or body.thinking.type != "enabled":
        return ()
    return ("thinking.budget_tokens",) if speech.reasons else ("thinking",)


def tools_of(body: MessagesBody) -> tuple[Tool, ...]:
    """The tools on offer. Raises `ApiError`."""
    tools = []
    for index, given in enumerate(body.tools or ()):
        at = f"tools[{index}]"
        if given.type not in (None, "custom"):
            raise ApiError(
                f"'{at}.type' is {shown(given.type)}; only tools that the client runs are served.",
                code="unsupported_value",
                param=f"{at}.type",
            )
        tools.append(
            Tool(
                name=given.name,
                description=given.description,
                parameters=given.input_schema,
                strict=bool(given.strict),
            )
        )
    check_names([tool.name for tool in tools], "tools[{}].name")
    return tuple(tools)


def choice_of(value: ToolChoiceBody | None) -> Choice:
    """`tool_choice` of this route. Raises `ApiError`."""
    match value:
        case None | ToolChoiceBody(type="auto"):
            return Choice()
        case ToolChoiceBody(type="none"):
            return Choice(mode="none")
        case ToolChoiceBody(type="any"):
            return Choice(mode="required")
        case ToolChoiceBody(type="tool", name=str(name)):
            return Choice(mode="required", name=name)
    raise ApiError(
        '\'tool_choice\' is not one of {"type": "auto"}, {"type": "any"}, '
        '{"type": "tool", "name": ...} and {"type": "none"}.',
        code="unsupported_value",
        param="tool_choice",
    )


def chat_body(body: MessagesBody) -> ChatBody:
    """What the request says of drawing tokens, as a chat request would say it."""
    shared: dict[str, Any] = {
        name: getattr(body, name) for name in GenerationBody.__struct_fields__
    }
    shared |= {"stream_options": None, "stop": body.stop_sequences or None}
    form = body.output_format
    if body.output_config is not None and body.output_config.format is not None:
        form = body.output_config.format
    if form is not None:
        if body.response_format is not None:
            raise invalid("response_format", "is called 'output_config.format' here.")
        shared["response_format"] = _format(form)
    return ChatBody(messages=[], **shared)


def _format(form: OutputFormat) -> ResponseFormat:
    schema = JsonSchemaFormat(schema=form.schema, strict=True)
    return ResponseFormat(type=form.type, json_schema=schema)
