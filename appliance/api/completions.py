"""POST /v1/completions"""

from collections.abc import Sequence
from typing import Any

import msgspec
from aiohttp import web

from appliance.api.context import CONTEXT, Context, new_id
from appliance.api.decode import BodyDecoder, beside, decode_beside, read_body
from appliance.api.dialect import Dialect, PlainDialect
from appliance.api.generate import Job, ignored_header, serve, unused_fields
from appliance.api.grammars import DESK
from appliance.api.observe import Meter
from appliance.api.plans import note_asked, plan_for, refusals_counted
from appliance.api.prompts import Prompt, encode_prompt, prompts_of, room_for
from appliance.api.render import END, ChunkTemplate
from appliance.api.schemas import CompletionBody
from appliance.api.sinks import BaseSink, CollectSink, EventStream, Exchange
from appliance.api.structured import constrained
from appliance.api.validate import Plan, check_model, check_total

DECODER = web.AppKey("completion_decoder", BodyDecoder[CompletionBody])


async def handle(request: web.Request) -> web.StreamResponse:
    """Continue one or several prompts, in one piece or as a stream."""
    with refusals_counted(request):
        job, dialect = await _prepared(request)
    return await serve(request.app[CONTEXT], request, job=job, dialect=dialect)


async def _prepared(request: web.Request) -> tuple[Job, Dialect]:
    context = request.app[CONTEXT]
    raw = await read_body(request, max_bytes=context.settings.max_body_bytes)
    decoded = await decode_beside(context.node.text, request.app[DECODER], raw)
    body = decoded.body
    check_model(body.model, context.node.info.model)
    plan = plan_for(request, body)
    settled = await constrained(request.app[DESK], body, plan)
    headers = ignored_header((*decoded.ignored, *settled.ignored, *unused_fields(context, plan)))
    prompts = await beside(
        context.node.text, len(raw), lambda: prompts_of(body.prompt, context.limits)
    )
    note_asked(request, plan, num_prompts=len(prompts))
    job = await _job(context, body, headers, plan=settled.plan, prompts=prompts)
    dialect = PlainDialect(context, job.plan, name=job.name, chat=False)
    if body.echo:
        echoes = await _echoes(context, prompts, job)
        dialect = EchoDialect(context, job.plan, name=job.name, echoes=echoes)
    return job, dialect


class EchoDialect(PlainDialect):
    """Answers that begin with their prompt."""

    def __init__(self, context: Context, plan: Plan, *, name: str, echoes: Sequence[str]) -> None:
        """`echoes`: the text of each prompt."""
        super().__init__(context, plan, name=name, chat=False)
        self._echoes = [text for text in echoes for _ in range(plan.n)]
        self._running_usage = plan.streaming is not None and plan.streaming.continuous_usage
        self._null_usage = plan.streaming is not None and plan.streaming.include_usage

    def stream_sink(
        self, stream: EventStream, *, index: int, meter: Meter, leads: bool
    ) -> BaseSink:
        template = ChunkTemplate(self.identity, index, chat=False, null_usage=self._null_usage)
        usage = msgspec.json.encode(stream.usage.document()) if self._running_usage else None
        text = template.head + msgspec.json.encode(self._echoes[index]) + template.middle
        stream.write(text + b"null" + template.unfinished + template.usage(usage) + END)
        return super().stream_sink(stream, index=index, meter=meter, leads=leads)

    def document(self, exchange: Exchange, collected: Sequence[CollectSink]) -> dict[str, Any]:
        document = super().document(exchange, collected)
        for choice, echo in zip(document["choices"], self._echoes, strict=True):
            choice["text"] = echo + choice["text"]
        return document


async def _echoes(context: Context, prompts: Sequence[Prompt], job: Job) -> list[str]:
    """Each prompt as it was written; ids as text, with markup only where the answer shows it."""
    skip = job.plan.sampling.skip_special_tokens
    return [
        prompt
        if isinstance(prompt, str)
        else await context.node.text.decode(prompt, skip_special_tokens=skip)
        for prompt in prompts
    ]


async def _job(
    context: Context,
    body: CompletionBody,
    headers: dict[str, str],
    *,
    plan: Plan,
    prompts: Sequence[Prompt],
) -> Job:
    limits = context.limits
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
