"""GET /admin/state and /admin/requests/{id}: for the operator at this machine only."""

from ipaddress import ip_address

from aiohttp import web

from appliance.api.context import CONTEXT
from appliance.api.errors import ApiError, shown
from appliance.api.models import json_answer


def check_peer(request: web.Request) -> None:
    """Raise `ApiError` 403 unless the peer is this machine (loopback or a Unix socket)."""
    peer = request.transport.get_extra_info("peername") if request.transport else None
    if peer is None or not is_local(peer):
        raise ApiError(
            "Admin routes answer only to this machine; ask over 127.0.0.1.",
            status=403,
            code="forbidden",
        )


def is_local(peer: object) -> bool:
    """Whether a socket's peer name is a loopback address or a Unix socket's."""
    if isinstance(peer, str | bytes):
        return True
    if not isinstance(peer, tuple) or not peer:
        return False
    try:
        address = ip_address(str(peer[0]).partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


async def handle_state(request: web.Request) -> web.Response:
    """Workers, blocks, queues."""
    check_peer(request)
    return json_answer(request.app[CONTEXT].node.state())


async def handle_request(request: web.Request) -> web.Response:
    """The story of one request, by its `x-request-id` or the id of its answer."""
    check_peer(request)
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
