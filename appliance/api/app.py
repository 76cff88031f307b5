"""The application: routes, and what is true of every answer whatever route it comes from."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from aiohttp import web

from appliance.api import (
    admin,
    chat,
    completions,
    embeddings,
    health,
    metrics,
    models,
    operate,
    tokens,
)
from appliance.api.auth import GATE, Gate, guard
from appliance.api.connection import ConnectionRunner
from appliance.api.context import CONTEXT, REQUEST_ID, Context, Names, stamp
from appliance.api.cors import CORS, Cors, preflights
from appliance.api.decode import RECEIVING, BodyDecoder, Receiving, too_large
from appliance.api.errors import STATUS, ApiError, error_of, shown
from appliance.api.grammars import DESK, GrammarDesk
from appliance.api.messages import handler as messages
from appliance.api.messages.errors import response as anthropic_error
from appliance.api.messages.schemas import MESSAGES_REFUSED, MessagesBody
from appliance.api.metrics import Metrics
from appliance.api.observe import ApiStats
from appliance.api.responses import handler as responses
from appliance.api.responses.schemas import RESPONSES_REFUSED, ResponsesBody
from appliance.api.schemas import (
    COMPLETIONS_REFUSED,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
)
from appliance.api.settings import ApiSettings
from appliance.api.speech import SPEECH, speech_of
from appliance.core.types import ErrorKind
from appliance.live.node import Node
from appliance.live.tokenise import TooBusy

logger = logging.getLogger(__name__)
ANTHROPIC = "/v1/messages"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def build_app(node: Node, settings: ApiSettings) -> web.Application:
    """The HTTP surface of `node`. Serve it with `make_runner`."""
    app = web.Application(
        middlewares=[errors_as_json, preflights, guard], client_max_size=settings.max_body_bytes
    )
    names = Names(node.settings.journal_records)  # a name outlives no story in the journal
    context = Context(node=node, settings=settings, stats=ApiStats(), names=names)
    app[CONTEXT] = context
    app[CORS] = Cors(settings.cors_origins)
    app[GATE] = gate = Gate(
        settings.keys, metrics_need_key=settings.metrics_need_key, now=time.monotonic()
    )
    app[RECEIVING] = Receiving(settings.connections)
    app[SPEECH] = speech_of(node.text, settings)
    app[DESK] = GrammarDesk(
        Path(node.settings.model_dir) / "tokenizer.json",
        vocab_size=node.info.vocab_size,
        ends=node.info.eos_token_ids,
    )
    app.on_cleanup.append(_close_desk)
    app[chat.DECODER] = BodyDecoder(ChatBody)
    app[completions.DECODER] = BodyDecoder(CompletionBody, refused=COMPLETIONS_REFUSED)
    app[responses.DECODER] = BodyDecoder(ResponsesBody, refused=RESPONSES_REFUSED)
    app[messages.DECODER] = BodyDecoder(MessagesBody, refused=MESSAGES_REFUSED)
    app[tokens.TOKENIZE] = BodyDecoder(TokenizeBody)
    app[tokens.DETOKENIZE] = BodyDecoder(DetokenizeBody)
    app[metrics.METRICS] = Metrics(node, context.stats, gate.accounts)
    app.on_response_prepare.append(_finish_headers)
    app.cleanup_ctx.append(_sample_loop_lag)
    app.add_routes(
        [
            web.post("/v1/chat/completions", chat.handle),
            web.post("/v1/completions", completions.handle),
            web.post("/v1/responses", responses.handle),
            web.post(ANTHROPIC, messages.handle),
            web.post(ANTHROPIC + "/count_tokens", messages.handle_count),
            web.post("/v1/embeddings", embeddings.handle),
            web.get("/v1/models", models.handle_list),
            web.get("/v1/models/{model:.+}", models.handle_one),
            web.post("/tokenize", tokens.handle_tokenize),
            web.post("/detokenize", tokens.handle_detokenize),
            web.get("/health", health.handle_health),
            web.get("/ready", health.handle_ready),
            web.get("/metrics", metrics.handle),
            web.get("/version", models.handle_version),
            web.get("/admin/state", admin.handle_state),
            web.get("/admin/requests/{name}", admin.handle_request),
        ]
    )
    operate.set_up(app)
    return app


def make_runner(app: web.Application) -> web.AppRunner:
    """A runner that cancels a handler as soon as its client has gone, as every route here needs."""
    return ConnectionRunner(app, app[CONTEXT].settings.connections)


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give the request its id, and every failure its error object."""
    stamp(request)
    try:
        response = await handler(request)
    except ApiError as error:
        response = _worded(request, error)
    except web.HTTPException as error:
        response = _worded(request, _routing_error(request, error))
    except TooBusy as error:
        words = f"{str(error).capitalize()} (limits.max_tokenising_bytes); try again."
        busy = error_of(ErrorKind.QUEUE_FULL, words, retry_after=error.retry_after)
        response = _worded(request, busy)
    except ConnectionError:  # the client has gone in mid-answer: counted, and said to nobody
        response = web.Response(status=STATUS[ErrorKind.CANCELLED])
    except Exception:
        logger.exception(
            "%s %s failed", request.method, request.path, extra={"request_id": request[REQUEST_ID]}
        )
        broken = ApiError(
            f"Something broke in the server; its log names the request {request[REQUEST_ID]}.",
            status=500,
            code="internal_error",
        )
        response = _worded(request, broken)
    _count(request, response.status)
    return response


def _worded(request: web.Request, error: ApiError) -> web.Response:
    """The error in the words of the API that was asked."""
    if is_anthropic(request):
        return anthropic_error(error, request[REQUEST_ID])
    return error.response()


def is_anthropic(request: web.Request) -> bool:
    """Whether the route speaks as Anthropic's API."""
    return request.path == ANTHROPIC or request.path.startswith(ANTHROPIC + "/")


def _routing_error(request: web.Request, error: web.HTTPException) -> ApiError:
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        return ApiError(
            f"{request.method} is not allowed for {shown(request.path)}; use {allowed}.",
            status=405,
            code="method_not_allowed",
            headers={"Allow": allowed},
        )
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return too_large(request.app[CONTEXT].settings.max_body_bytes)
    if error.status == 404:
        return ApiError(
            f"There is no {request.method} {shown(request.path)}; API routes begin with /v1.",
            status=404,
            code="unknown_url",
        )
    return ApiError(error.reason, status=error.status, code="bad_request")


def _count(request: web.Request, status: int) -> None:
    resource = request.match_info.route.resource
    route = resource.canonical if resource is not None else "unknown"
    request.app[CONTEXT].stats.responses[route, status] += 1


async def _finish_headers(request: web.Request, response: web.StreamResponse) -> None:
    if REQUEST_ID not in request:
        stamp(request)  # refused before any middleware
    response.headers["x-request-id"] = request[REQUEST_ID]
    if is_anthropic(request):
        response.headers["request-id"] = request[REQUEST_ID]  # where their clients look for it
    response.headers["Server"] = "appliance"
    request.app[CORS].sign(request, response)


async def _close_desk(app: web.Application) -> None:
    await app[DESK].close()


async def _sample_loop_lag(app: web.Application) -> AsyncIterator[None]:
    context = app[CONTEXT]
    task = asyncio.create_task(_measure_lag(context.stats, context.settings.loop_lag_interval))
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _measure_lag(stats: ApiStats, interval: float) -> None:
    """How much later than asked the loop wakes a sleeper, again and again."""
    clock = asyncio.get_running_loop().time
    while True:
        due = clock() + interval
        await asyncio.sleep(interval)
        stats.loop_lag.observe(max(0.0, clock() - due))
