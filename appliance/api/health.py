"""GET /health and /ready: whether the node makes progress, whether a request would be served."""

from aiohttp import web

from appliance.api.context import CONTEXT
from appliance.api.models import json_answer


async def handle_health(request: web.Request) -> web.Response:
    """200 while the node makes progress or has nothing to do, 503 with the reason otherwise."""
    health = request.app[CONTEXT].node.health()
    if health.ok:
        return json_answer({"status": "ok", "reason": health.reason})
    return json_answer({"status": "unhealthy", "reason": health.reason}, status=503)


async def handle_ready(request: web.Request) -> web.Response:
    """200 only when a request sent now would be served, 503 with the reason otherwise."""
    ready, reason = request.app[CONTEXT].node.ready()
    if ready:
        return json_answer({"status": "ready", "reason": reason})
    return json_answer({"status": "not ready", "reason": reason}, status=503)
