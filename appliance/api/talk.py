"""The frame of every route that holds conversations: from the bytes of a body to its answer.

A `Route` says what is its own: which fields it takes, how it words turns, tools and drawing, and in
which dialect it answers. Within the frame everything speaks of fields as chat completions do;
errors are renamed on the way out.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from aiohttp import web

from appliance.api.constraints import settled
from appliance.api.context import CONTEXT
from appliance.api.conversation import Conversation, fields_named, prepare
from appliance.api.decode import BodyDecoder, beside, decode_beside, read_body
from appliance.api.dialect import Dialect
from appliance.api.generate import Job, ignored_header, serve, unused_fields
from appliance.api.grammars import DESK
from appliance.api.plans import plan_for, refusals_counted
from appliance.api.schemas import ChatBody, GenerationBody, ResponseFormat
from appliance.api.speech import SPEECH, Reading, Speech
from appliance.api.validate import check_model, invalid

B = TypeVar("B", bound=GenerationBody)


def no_wishes(body: GenerationBody, speech: Speech) -> tuple[str, ...]:
    """Every field of the body counts."""
    del body, speech
    return ()


@dataclass(frozen=True)
class Route(Generic[B]):
    """What is the route's own. Everything may raise `ApiError`."""

    decoder: web.AppKey[BodyDecoder[B]]
    check: Callable[[B], None]
    """Refuse values that are not served."""
    conversation_of: Callable[[B, Speech], Conversation]
    chat_body: Callable[[B], ChatBody]
    """What the request says of drawing tokens, as a chat request would say it."""
    new_name: Callable[[], str]
    """The public id of an answer."""
    dialect: Callable[[web.Request, B, Job, Reading], Dialect]
    names: Mapping[str, str] = field(default_factory=dict)
    """Fields of chat completions by the names that they have here."""
    wishes: Callable[[B, Speech], tuple[str, ...]] = no_wishes
    """Names of fields that are taken and do nothing."""


async def answer(request: web.Request, route: Route[B]) -> web.StreamResponse:
    """Answer a conversation, in one piece or as a stream. Raises `ApiError`."""
    with refusals_counted(request):
        job, dialect = await _prepared(request, route)
    return await serve(request.app[CONTEXT], request, job=job, dialect=dialect)


async def _prepared(request: web.Request, route: Route[B]) -> tuple[Job, Dialect]:
    context, speech = request.app[CONTEXT], request.app[SPEECH]
    raw = await read_body(request, max_bytes=context.settings.max_body_bytes)
    decoded = await decode_beside(context.node.text, request.app[route.decoder], raw)
    body = decoded.body
    check_model(body.model, context.node.info.model)
    route.check(body)
    conversation = await beside(
        context.node.text, len(raw), lambda: route.conversation_of(body, speech)
    )
    wishes = route.wishes(body, speech)
    with fields_named(route.names):
        chat = route.chat_body(body)
        plan = plan_for(request, chat)
        form = await settled(
            request.app[DESK], chat, plan=plan, conversation=conversation, speech=speech
        )
        unused = (*decoded.ignored, *form.ignored, *unused_fields(context, plan), *wishes)
        job, reading = await prepare(
            context,
            speech,
            form.conversation,
            name=route.new_name(),
            plan=form.plan,
            headers=ignored_header(unused),
        )
    return job, route.dialect(request, body, job, reading)


def chat_body_of(
    body: GenerationBody, *, form: ResponseFormat | None, form_name: str, **own: Any
) -> ChatBody:
    """A chat request that draws as `body` says, whose answers have this form: `form_name` is what
    the route calls `response_format`, `own` are the fields that it words itself."""
    shared: dict[str, Any] = {
        name: getattr(body, name) for name in GenerationBody.__struct_fields__
    }
    shared["stream_options"] = None
    if form is not None:
        if body.response_format is not None:
            raise invalid("response_format", f"is called '{form_name}' here.")
        shared["response_format"] = form
    return ChatBody(messages=[], **{**shared, **own})
