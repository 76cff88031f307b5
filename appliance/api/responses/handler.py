"""POST /v1/responses"""

from typing import Any

import msgspec
from aiohttp import web

from appliance.api.constraints import settled
from appliance.api.context import CONTEXT
from appliance.api.conversation import Conversation, fields_named, prepare
from appliance.api.decode import BodyDecoder, beside, decode_beside, read_body
from appliance.api.errors import ApiError, shown
from appliance.api.generate import ignored_header, serve, unused_fields
from appliance.api.grammars import DESK
from appliance.api.ids import item_id
from appliance.api.plans import plan_for
from appliance.api.responses.dialect import Envelope, ResponsesDialect
from appliance.api.responses.items import turns_of_input
from appliance.api.responses.schemas import ResponsesBody, TextFormat
from appliance.api.schemas import ChatBody, GenerationBody, JsonSchemaFormat, ResponseFormat
from appliance.api.speech import SPEECH, Speech
from appliance.api.tools import Choice, Tool, check_kind, check_names, tool_use
from appliance.api.validate import check_model, invalid

DECODER = web.AppKey("responses_decoder", BodyDecoder[ResponsesBody])
HARMLESS_INCLUDES = frozenset({"reasoning.encrypted_content"})
"""What is asked for here is in no answer anyway."""
NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "response_format.type": "text.format.type",
    "response_format.json_schema.schema": "text.format.schema",
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
    speech = request.app[SPEECH]
    conversation = await beside(context.node.text, len(raw), lambda: conversation_of(body, speech))
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
        name = item_id("resp")
        job, reading = await prepare(
            context,
            speech,
            form.conversation,
            name=name,
            plan=form.plan,
            headers=ignored_header(
                (*decoded.ignored, *form.ignored, *unused_fields(context, plan))
            ),
        )
    envelope = Envelope(name, context.node.info.model, echo_of(body))
    return await serve(context, request, job=job, dialect=ResponsesDialect(envelope, reading))


def check_fields(body: ResponsesBody) -> None:
    """Raise `ApiError` for values that are not served."""
    if body.n not in (None, 1):
        raise invalid("n", "must be 1: a response has one answer.")
    if body.max_tokens is not None:
        raise invalid("max_tokens", "is called 'max_output_tokens' here.")
    if body.store not in (None, False):
        raise _unsupported("store", body.store)  # no response can be asked for later
    for name in body.include or ():
        if name not in HARMLESS_INCLUDES:
            raise _unsupported("include", name)
    if body.truncation not in (None, "disabled"):
        raise _unsupported("truncation", body.truncation)
    if body.text is not None and body.text.verbosity not in (None, "medium"):
        raise _unsupported("text.verbosity", body.text.verbosity)
    if body.reasoning is not None and body.reasoning.effort not in (None, "none"):
        raise _unsupported("reasoning.effort", body.reasoning.effort)


def conversation_of(body: ResponsesBody, speech: Speech) -> Conversation:
    """Turns, tools and template variables. Raises `ApiError`."""
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning is not None and body.reasoning.effort == "none":
        variables |= speech.quiet("reasoning.effort")
    use = tool_use(
        tools_of(body),
        choice_of(body.tool_choice),
        parallel=body.parallel_tool_calls,
        speech=speech,
    )
    return Conversation(turns=turns_of_input(body), use=use, variables=variables)


def tools_of(body: ResponsesBody) -> tuple[Tool, ...]:
    """The tools on offer. Raises `ApiError`."""
    tools = []
    for index, given in enumerate(body.tools or ()):
        at = f"tools[{index}]"
        check_kind(given.type, at)
        if given.name is None:
            raise invalid(f"{at}.name", "is missing; name the function.")
        tools.append(
            Tool(
                name=given.name,
                description=given.description,
                parameters=given.parameters,
                strict=bool(given.strict),
            )
        )
    check_names([tool.name for tool in tools], "tools[{}].name")
    return tuple(tools)


def choice_of(value: str | dict[str, Any] | None) -> Choice:
    """`tool_choice` of this route. Raises `ApiError`."""
    match value:
        case None | "auto":
            return Choice()
        case "none":
            return Choice(mode="none")
        case "required":
            return Choice(mode="required")
        case {"type": "function", "name": str(name)}:
            return Choice(mode="required", name=name)
    raise ApiError(
        f"'tool_choice' is {shown(value)}; give 'none', 'auto', 'required' or "
        '{"type": "function", "name": ...}.',
        code="unsupported_value",
        param="tool_choice",
    )


def chat_body(body: ResponsesBody) -> ChatBody:
    """What the request says of drawing tokens, as a chat request would say it."""
    shared = {name: getattr(body, name) for name in GenerationBody.__struct_fields__}
    shared |= {"stream_options": None, "parallel_tool_calls": None}
    form = None if body.text is None else body.text.format
    if form is not None and form.type != "text":
        if body.response_format is not None:
            raise invalid("response_format", "is called 'text.format' here.")
        shared["response_format"] = _format(form)
    return ChatBody(messages=[], max_completion_tokens=body.max_output_tokens, **shared)


def _format(form: TextFormat) -> ResponseFormat:
    if form.type != "json_schema":
        return ResponseFormat(type=form.type)
    schema = JsonSchemaFormat(name=form.name, schema=form.schema, strict=form.strict)
    return ResponseFormat(type=form.type, json_schema=schema)


def echo_of(body: ResponsesBody) -> dict[str, Any]:
    """Members of the response object that repeat the request."""
    return {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata if isinstance(body.metadata, dict) else {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {
            "effort": None if body.reasoning is None else body.reasoning.effort,
            "summary": None,
        },
        "service_tier": "default",
        "store": False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": _echoed_format(body)},
        "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
        "tools": [msgspec.to_builtins(tool) for tool in body.tools or ()],
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "user": body.user,
    }


def _echoed_format(body: ResponsesBody) -> dict[str, Any]:
    form = None if body.text is None else body.text.format
    if form is None:
        return {"type": "text"}
    fields: dict[str, Any] = {"type": form.type}
    if form.type == "json_schema":
        fields |= {"name": form.name, "schema": form.schema, "strict": form.strict}
    return fields


def _unsupported(param: str, value: object) -> ApiError:
    return ApiError(
        f"'{param}' is not supported with the value {shown(value)}; leave it out.",
        code="unsupported_parameter",
        param=param,
    )
