"""POST /v1/completions"""

from aiohttp import web

from appliance.api.context import CONTEXT, Context, new_id
from appliance.api.decode import BodyDecoder, read_body
from appliance.api.dialect import PlainDialect
from appliance.api.generate import Job, ignored_header, serve
from appliance.api.prompts import encode_prompt, prompts_of, room_for
from appliance.api.schemas import CompletionBody
from appliance.api.targets import slo_of
from appliance.api.validate import Plan, check_model, check_total, plan_of

DECODER = web.AppKey("completion_decoder", BodyDecoder[CompletionBody])


async def handle(request: web.Request) -> web.StreamResponse:
    """Continue one or several prompts, in one piece or as a stream."""
    context = request.app[CONTEXT]
    raw = await read_body(request, max_bytes=context.settings.max_body_bytes)
    decoded = request.app[DECODER].decode(raw)
    body = decoded.body
    check_model(body.model, context.node.info.model)
    slo = slo_of(body, request.headers, classes=context.settings.slo_classes)
    plan = plan_of(body, slo, context.limits)
    job = await _job(context, body, ignored_header(decoded.ignored), plan)
    dialect = PlainDialect(context, job.plan, name=job.name, chat=False)
    return await serve(context, request, job=job, dialect=dialect)


async def _job(context: Context, body: CompletionBody, headers: dict[str, str], plan: Plan) -> Job:
    limits = context.limits
    prompts = prompts_of(body.prompt, limits)
    check_total(len(prompts), plan.n, limits)
    encoded = [
        await encode_prompt(
            context.node.text,
            prompt,
            add_special_tokens=body.add_special_tokens is not False,
            salt=plan.salt,
        )
        for prompt in prompts
    ]
    least = plan.sampling.min_tokens
    rooms = [
        room_for(len(prompt.ids), plan.max_tokens, limits, chat=False, least=least)
        for prompt in encoded
    ]
    return Job(
        name=new_id("cmpl"),
        prompts=tuple(encoded),
        max_tokens=tuple(rooms),
        plan=plan,
        headers=headers,
    )
