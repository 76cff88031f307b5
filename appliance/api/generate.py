"""One checked request through the node: submit, stream or collect, cancel when the client goes.

How answers are worded is the business of a `Dialect` (one per route); this module does not know
them apart. Whatever happens to the handler (the client disconnects, the server ends, a bug), the
`finally` of this module gives every ticket back, so nothing runs on for nobody.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence

import msgspec
from aiohttp import HttpVersion11, web

from appliance.api.auth import CALLER, charge, settle
from appliance.api.context import ARRIVED, REQUEST_ID, Context
from appliance.api.dialect import Dialect, Outlet
from appliance.api.errors import error_of
from appliance.api.observe import Meter
from appliance.api.render import Usage
from appliance.api.sinks import BaseSink, CollectSink, EventStream, Exchange
from appliance.api.validate import SEED_RANGE, Plan
from appliance.core.types import ErrorKind, OnMiss, Record, Slo
from appliance.live.records import Encoded, Rejected, Sink, Submission, Ticket

logger = logging.getLogger(__name__)


class Job(Record, frozen=True, kw_only=True):
    """A request that passed every check. `max_tokens[i]` bounds the answers to `prompts[i]`."""

    name: str
    prompts: tuple[Encoded, ...]
    max_tokens: tuple[int, ...]
    plan: Plan
    headers: Mapping[str, str]

    @property
    def num_answers(self) -> int:
        """Prompts times `n`; choices are numbered prompt by prompt."""
        return len(self.prompts) * self.plan.n

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts, each once."""
        return sum(len(prompt.ids) for prompt in self.prompts)


async def serve(
    context: Context, request: web.Request, *, job: Job, dialect: Dialect
) -> web.StreamResponse:
    """Answer `job` in the words of `dialect`. Raises `ApiError` as long as no byte was sent."""
    tickets: list[Ticket] = []
    exchange: Exchange | None = None
    charge(request, job.prompt_tokens)
    try:
        if job.plan.streaming is not None:
            stream = dialect.stream(_outlet(context, job, tickets))
            exchange = stream
            begun = _begun(context, job)
            make = _stream_sinks(
                context, request, job=job, dialect=dialect, stream=stream, begun=begun
            )
            _submit(context, request, job, make, tickets)
            if begun is not None:
                await asyncio.wait({begun, stream.over}, return_when=asyncio.FIRST_COMPLETED)
            return await _stream(request, job, stream)
        exchange = Exchange(job.num_answers, asyncio.get_running_loop())
        collected: list[CollectSink] = []
        make = _collect_sinks(
            context, request, job=job, dialect=dialect, exchange=exchange, collected=collected
        )
        _submit(context, request, job, make, tickets)
        await exchange.over
        if exchange.error is not None:
            raise exchange.error
        return web.Response(
            body=msgspec.json.encode(dialect.document(exchange, collected)),
            content_type="application/json",
            headers=job.headers,
        )
    finally:
        kind = None if exchange is None else exchange.error_kind
        for ticket in tickets:
            if not ticket.done.done():
                context.node.cancel(ticket, kind or ErrorKind.CANCELLED)
        generated = exchange.usage.completion_tokens if exchange is not None else 0
        settle(request, job.prompt_tokens, generated_tokens=generated, accepted=bool(tickets))
        _log_end(request, job, exchange)


MakeSinks = Callable[[int], list[BaseSink]]


def _submit(
    context: Context,
    request: web.Request,
    job: Job,
    make: MakeSinks,
    tickets: list[Ticket],
) -> None:
    """Hand all prompts over; the caller cancels what was accepted when a later one is refused."""
    plan = job.plan
    names = [job.name, *(f"{job.name}-{index}" for index in range(1, len(job.prompts)))]
    context.names.note(request[REQUEST_ID], names)
    for index, prompt in enumerate(job.prompts):
        seed = secrets.randbelow(SEED_RANGE) if plan.seed is None else plan.seed
        spec = Submission(
            name=names[index],
            prompt=prompt,
            sampling=msgspec.structs.replace(plan.sampling, seed=seed),
            max_tokens=job.max_tokens[index],
            slo=_slo(job),
            arrived=request[ARRIVED],
            salt=plan.salt,
            tenant=request[CALLER].name,
            priority=plan.priority,
        )
        sinks: Sequence[Sink] = make(index)
        try:
            tickets.append(context.node.submit(spec, sinks))
        except Rejected as error:
            others = (len(job.prompts) - 1) * plan.n
            context.node.stats.refused[plan.slo.class_name, error.kind.value] += others
            for ticket in tickets:  # counted just now
                context.node.cancel(ticket)
            raise error_of(error.kind, error.reason, retry_after=error.retry_after) from error


def _slo(job: Job) -> Slo:
    """Its targets. One of several answers is never refused alone, since the whole request would
    end with it."""
    slo = job.plan.slo
    if job.num_answers > 1 and slo.on_miss is OnMiss.REFUSE:
        return msgspec.structs.replace(slo, on_miss=OnMiss.SERVE)
    return slo


Begun = asyncio.Future[None]
"""Done with the first token of a request."""


def _begun(context: Context, job: Job) -> Begun | None:
    """For a stream that may be refused until its first token: its status line waits for that, so
    that the refusal has a status of its own."""
    if not context.node.info.judges_budgets or _slo(job).on_miss != OnMiss.REFUSE:
        return None
    return asyncio.get_running_loop().create_future()


def _meter(
    context: Context, request: web.Request, job: Job, *, begun: Begun | None = None
) -> Meter:
    """`begun` is done with the first token."""
    slo = job.plan.slo

    def on_first() -> None:
        if begun is not None and not begun.done():
            begun.set_result(None)

    return Meter(
        context.stats.latency(slo),
        request[ARRIVED],
        time.monotonic,
        slo=slo,
        on_first=None if begun is None else on_first,
    )


def _collect_sinks(
    context: Context,
    request: web.Request,
    *,
    job: Job,
    dialect: Dialect,
    exchange: Exchange,
    collected: list[CollectSink],
) -> MakeSinks:
    def make(index: int) -> list[BaseSink]:
        exchange.usage.prompt_tokens += len(job.prompts[index].ids)
        sinks = [
            dialect.collect_sink(exchange, meter=_meter(context, request, job), leads=choice == 0)
            for choice in range(job.plan.n)
        ]
        collected.extend(sinks)
        return list(sinks)

    return make


def _stream_sinks(
    context: Context,
    request: web.Request,
    *,
    job: Job,
    dialect: Dialect,
    stream: EventStream,
    begun: Begun | None,
) -> MakeSinks:
    def make(index: int) -> list[BaseSink]:
        stream.usage.prompt_tokens += len(job.prompts[index].ids)
        return [
            dialect.stream_sink(
                stream,
                index=index * job.plan.n + choice,
                meter=_meter(context, request, job, begun=begun),
                leads=choice == 0,
            )
            for choice in range(job.plan.n)
        ]

    return make


def _outlet(context: Context, job: Job, tickets: Sequence[Ticket]) -> Outlet:
    def give_up() -> None:
        for ticket in tickets:
            context.node.cancel(ticket, ErrorKind.SLOW_READER)

    return Outlet(
        num_answers=job.num_answers,
        loop=asyncio.get_running_loop(),
        max_buffer=context.settings.max_stream_buffer_bytes,
        on_slow=give_up,
    )


async def _stream(request: web.Request, job: Job, stream: EventStream) -> web.StreamResponse:
    if stream.error is not None:
        raise stream.error  # ended before the first byte: a plain error answer is still possible
    headers = {
        **job.headers,
        "Content-Type": "text/event-stream; charset=utf-8",
        "Cache-Control": "no-cache",
        "X-Accel-Buffering": "no",
    }
    response = web.StreamResponse(headers=headers)
    if request.version < HttpVersion11:
        response.force_close()  # without chunks only the end of the connection ends the body
    await response.prepare(request)  # sends the headers
    transport = request.transport
    if transport is None:
        raise ConnectionResetError("the client left before the first byte")
    stream.open(transport, chunked=request.version >= HttpVersion11)
    await stream.over
    if stream.writable or stream.error is not None:
        await response.write_eof()
    return response


def _log_end(request: web.Request, job: Job, exchange: Exchange | None) -> None:
    outcome = "abandoned"
    if isinstance(exchange, EventStream) and exchange.is_slow:
        outcome = ErrorKind.SLOW_READER.value
    elif exchange is not None and exchange.error is not None:
        outcome = exchange.error.body.code
    elif exchange is not None and exchange.over.done() and not exchange.over.cancelled():
        outcome = "completed"
    usage = exchange.usage if exchange is not None else Usage()
    logger.info(
        "request has ended",
        extra={
            "request_id": request[REQUEST_ID],
            "answer": job.name,
            "key": request[CALLER].name,
            "outcome": outcome,
            "prompt_tokens": usage.prompt_tokens,
            "generated_tokens": usage.completion_tokens,
            "seconds": time.monotonic() - request[ARRIVED],
        },
    )


def unused_fields(context: Context, plan: Plan) -> tuple[str, ...]:
    """Fields that were understood and that this node's policy does not look at."""
    return ("priority",) if plan.priority and not context.node.info.uses_priority else ()


def ignored_header(names: Sequence[str]) -> dict[str, str]:
    """The header that names the fields nobody looked at."""
    return {"x-appliance-ignored": ",".join(names)} if names else {}
