"""POST /v1/responses"""

from typing import Any

import msgspec
from aiohttp import web

from appliance.api.context import CONTEXT
from appliance.api.conversation import Conversation
from appliance.api.decode import BodyDecoder
from appliance.api.dialect import Dialect
from appliance.api.errors import ApiError, shown
from appliance.api.generate import Job
from appliance.api.ids import item_id
from appliance.api.responses.dialect import Envelope, ResponsesDialect
from appliance.api.responses.items import turns_of_input
from appliance.api.responses.schemas import FlatTool, ResponsesBody, TextFormat
from appliance.api.schemas import ChatBody, JsonSchemaFormat, ResponseFormat
from appliance.api.speech import Reading, Speech
from appliance.api.talk import Route, answer, chat_body_of
from appliance.api.tools import Tool, check_kind, choice_of, gathered, tool_use
from appliance.api.validate import invalid

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
    return await answer(request, ROUTE)


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
        gathered(body.tools, _tool, name_at="tools[{}].name"),
        choice_of(body.tool_choice, flat=True),
        parallel=body.parallel_tool_calls,
        speech=speech,
    )
    return Conversation(turns=turns_of_input(body), use=use, variables=variables)


def _tool(given: FlatTool, at: str) -> Tool:
    check_kind(given.type, at)
    if given.name is None:
        raise invalid(f"{at}.name", "is missing; name the function.")
    return Tool(
        name=given.name,
        description=given.description,
        parameters=given.parameters,
        strict=bool(given.strict),
    )


def chat_body(body: ResponsesBody) -> ChatBody:
    """What the request says of drawing tokens, as a chat request would say it."""
    form = None if body.text is None else body.text.format
    return chat_body_of(
        body,
        form=None if form is None or form.type == "text" else _format(form),
        form_name="text.format",
        parallel_tool_calls=None,
        max_completion_tokens=body.max_output_tokens,
    )


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


def _dialect(request: web.Request, body: ResponsesBody, job: Job, reading: Reading) -> Dialect:
    model = request.app[CONTEXT].node.info.model
    return ResponsesDialect(Envelope(job.name, model, echo_of(body)), reading)


ROUTE = Route(
    decoder=DECODER,
    check=check_fields,
    conversation_of=conversation_of,
    chat_body=chat_body,
    new_name=lambda: item_id("resp"),
    dialect=_dialect,
    names=NAMES,
)
