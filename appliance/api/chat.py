"""POST /v1/chat/completions"""

from aiohttp import web

from appliance.api.context import CONTEXT, Context, new_id
from appliance.api.decode import BodyDecoder, read_body
from appliance.api.dialect import PlainDialect
from appliance.api.generate import Job, ignored_header, serve
from appliance.api.prompts import encode_messages, room_for
from appliance.api.schemas import ChatBody
from appliance.api.targets import slo_of
from appliance.api.validate import Plan, check_model, invalid, plan_of

DECODER = web.AppKey("chat_decoder", BodyDecoder[ChatBody])


async def handle(request: web.Request) -> web.StreamResponse:
    """Answer a conversation, in one piece or as a stream."""
    context = request.app[CONTEXT]
    raw = await read_body(request, max_bytes=context.settings.max_body_bytes)
    decoded = request.app[DECODER].decode(raw)
    body = decoded.body
    check_model(body.model, context.node.info.model)
    if body.add_special_tokens:
        raise invalid("add_special_tokens", "must be false: the chat template writes them.")
    slo = slo_of(body, request.headers, classes=context.settings.slo_classes)
    job = await _job(
        context, body, ignored_header(decoded.ignored), plan_of(body, slo, context.limits)
    )
    dialect = PlainDialect(context, job.plan, name=job.name, chat=True)
    return await serve(context, request, job=job, dialect=dialect)


async def _job(context: Context, body: ChatBody, headers: dict[str, str], plan: Plan) -> Job:
    prompt = await encode_messages(
        context.node.text,
        body.messages,
        add_generation_prompt=body.add_generation_prompt is not False,
        template_kwargs=body.chat_template_kwargs,
        salt=plan.salt,
    )
    room = room_for(
        len(prompt.ids),
        plan.max_tokens,
        context.limits,
        chat=True,
        least=plan.sampling.min_tokens,
    )
    return Job(
        name=new_id("chatcmpl"),
        prompts=(prompt,),
        max_tokens=(room,),
        plan=plan,
        headers=headers,
    )
