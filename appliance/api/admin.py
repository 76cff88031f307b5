"""GET /admin/state and /admin/requests/{id}: for the operator (who may come in: `auth`)."""

from aiohttp import web

from appliance.api.context import CONTEXT
from appliance.api.errors import ApiError, shown
from appliance.api.models import json_answer


async def handle_state(request: web.Request) -> web.Response:
    """Workers, blocks, queues."""
    return json_answer(request.app[CONTEXT].node.state())


async def handle_request(request: web.Request) -> web.Response:
    """The story of one request, by its `x-request-id` or the id of its answer."""
    name = request.match_info["name"]
    context = request.app[CONTEXT]
    stories = [context.node.story(each) for each in context.names.of(name)]
    answers = [answer for story in stories if story is not None for answer in story["answers"]]
    if not answers:
        raise ApiError(
            f"No request {shown(name)} is known; stories are kept for recent requests only.",
            status=404,
            code="request_not_found",
        )
    return json_answer({"name": name, "answers": answers})
