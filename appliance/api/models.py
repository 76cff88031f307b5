"""GET /v1/models, GET /v1/models/{id}, GET /version"""

from typing import Any

import msgspec
from aiohttp import web

from appliance.api.context import CONTEXT, Context
from appliance.api.validate import check_model


def json_answer(document: Any, *, status: int = 200) -> web.Response:
    """A JSON document."""
    return web.Response(
        status=status, body=msgspec.json.encode(document), content_type="application/json"
    )


def card(context: Context) -> dict[str, Any]:
    """The served model as the API lists it."""
    info = context.node.info
    return {
        "id": info.model,
        "object": "model",
        "created": info.created,
        "owned_by": "appliance",
        "max_model_len": info.max_model_len,
        "dtype": info.dtype,
        "fingerprint": info.fingerprint,
    }


async def handle_list(request: web.Request) -> web.Response:
    """All models: one."""
    return json_answer({"object": "list", "data": [card(request.app[CONTEXT])]})


async def handle_one(request: web.Request) -> web.Response:
    """The model of this name. Raises `ApiError` 404 for another."""
    context = request.app[CONTEXT]
    check_model(request.match_info["model"], context.node.info.model)
    return json_answer(card(context))


async def handle_version(request: web.Request) -> web.Response:
    """The version of this server."""
    return json_answer({"version": request.app[CONTEXT].node.info.version})
