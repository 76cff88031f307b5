"""POST /v1/embeddings: not served, and says so."""

from typing import NoReturn

from aiohttp import web

from appliance.api.context import CONTEXT
from appliance.api.errors import ApiError, shown


async def handle(request: web.Request) -> NoReturn:
    """Raise `ApiError` 404: the one model here writes text."""
    model = request.app[CONTEXT].node.info.model
    raise ApiError(
        f"No embedding model is served here; {shown(model)} answers at /v1/chat/completions.",
        status=404,
        code="no_embedding_model",
        param="model",
    )
