"""POST /v1/messages and POST /v1/messages/count_tokens"""

from aiohttp import web

from appliance.api.context import CONTEXT, REQUEST_ID
from appliance.api.conversation import Conversation, encode
from appliance.api.decode import BodyDecoder, beside, decode_beside, read_body
from appliance.api.dialect import Dialect
from appliance.api.errors import ApiError, shown
from appliance.api.generate import Job
from appliance.api.ids import item_id
from appliance.api.messages.blocks import turns_of_messages
from appliance.api.messages.dialect import Heading, MessagesDialect
from appliance.api.messages.schemas import (
    MessagesBody,
    OutputFormat,
    SchemaTool,
    ToolChoiceBody,
)
from appliance.api.models import json_answer
from appliance.api.schemas import ChatBody, JsonSchemaFormat, ResponseFormat
from appliance.api.speech import SPEECH, SWITCH, Reading, Speech
from appliance.api.talk import Route, answer, chat_body_of
from appliance.api.tools import Choice, Tool, gathered, tool_use
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
    return await answer(request, ROUTE)


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
        gathered(body.tools, _tool, name_at="tools[{}].name"),
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


def _tool(given: SchemaTool, at: str) -> Tool:
    if given.type not in (None, "custom"):
        raise ApiError(
            f"'{at}.type' is {shown(given.type)}; only tools that the client runs are served.",
            code="unsupported_value",
            param=f"{at}.type",
        )
    return Tool(
        name=given.name,
        description=given.description,
        parameters=given.input_schema,
        strict=bool(given.strict),
    )


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
    form = body.output_format
    if body.output_config is not None and body.output_config.format is not None:
        form = body.output_config.format
    return chat_body_of(
        body,
        form=None if form is None else _format(form),
        form_name="output_config.format",
        stop=body.stop_sequences or None,
    )


def _format(form: OutputFormat) -> ResponseFormat:
    schema = JsonSchemaFormat(schema=form.schema, strict=True)
    return ResponseFormat(type=form.type, json_schema=schema)


def _check(body: MessagesBody) -> None:
    check_fields(body)
    if body.max_tokens is None:
        raise ApiError(
            "'max_tokens' is missing; it is required.",
            code="missing_required_parameter",
            param="max_tokens",
        )


def _dialect(request: web.Request, body: MessagesBody, job: Job, reading: Reading) -> Dialect:
    del body
    model = request.app[CONTEXT].node.info.model
    heading = Heading(name=job.name, model=model, request_id=request[REQUEST_ID])
    return MessagesDialect(heading, reading)


ROUTE = Route(
    decoder=DECODER,
    check=_check,
    conversation_of=conversation_of,
    chat_body=chat_body,
    new_name=lambda: item_id("msg"),
    dialect=_dialect,
    names=NAMES,
    wishes=wishes_of,
)
