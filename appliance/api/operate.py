"""What operators change while the node serves: roles, parking, more workers, and why it decided.

    POST /admin/workers/{id}/role   {"role": "prefill" | "decode" | "mixed"}
    POST /admin/roles               {"0": "decode", "1": "prefill"}: all or none
    POST /admin/workers/{id}/park, POST /admin/workers/{id}/wake
    POST /admin/workers/{id}/restart   a quarantined worker
    POST /admin/workers             {"device", "role", "parked"}, each optional
    GET  /admin/decisions?limit=N   newest first

Each POST answers when what was asked for has ended: 200 with `outcome` "done" or "rolled_back"
(then `reason` says why), 409 when it was not begun because it is impossible or something else is
under way, 503 when the server is shutting down. A client that leaves undoes nothing.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from appliance.api.context import CONTEXT
from appliance.api.decode import BodyDecoder, read_body
from appliance.api.errors import ApiError, error_of, shown
from appliance.api.models import json_answer
from appliance.core.asks import Answered, Decided, Outcome
from appliance.core.lifecycle import WorkerState
from appliance.core.types import ErrorKind, Role, WorkerId
from appliance.live.node import Node

B = TypeVar("B", bound=msgspec.Struct)

MAX_DECISIONS = 1000
MAX_BODY_BYTES = 64 * 1024
MAX_WORKERS = 64
"""Of one node, parked ones too."""


class RoleBody(msgspec.Struct, frozen=True):
    """Body of POST /admin/workers/{id}/role."""

    role: str


class WorkerBody(msgspec.Struct, frozen=True):
    """Body of POST /admin/workers."""

    device: str | None = None
    role: str = Role.MIXED.value
    parked: bool = False


ROLE = web.AppKey("role_decoder", BodyDecoder[RoleBody])
WORKER = web.AppKey("worker_decoder", BodyDecoder[WorkerBody])


def set_up(app: web.Application) -> None:
    """Add the routes of this file."""
    app[ROLE] = BodyDecoder(RoleBody, refused={})
    app[WORKER] = BodyDecoder(WorkerBody, refused={})
    app.add_routes(
        [
            web.post("/admin/workers/{worker}/role", handle_role),
            web.post("/admin/roles", handle_roles),
            web.post("/admin/workers/{worker}/park", handle_park),
            web.post("/admin/workers/{worker}/wake", handle_wake),
            web.post("/admin/workers/{worker}/restart", handle_restart),
            web.post("/admin/workers", handle_add),
            web.get("/admin/decisions", handle_decisions),
        ]
    )


async def handle_role(request: web.Request) -> web.Response:
    """Another role for one worker."""
    node = request.app[CONTEXT].node
    worker = _worker(request, node)
    body = _known(request.app[ROLE], await _body(request))
    answer = await node.asks.roles([(worker, _role(body.role, "role"))])
    return _answered(answer, node)


async def handle_roles(request: web.Request) -> web.Response:
    """Other roles for several workers, as one."""
    node = request.app[CONTEXT].node
    wanted = _table(await _body(request))
    roles = [
        (_worker_named(name, node), _role(role, name)) for name, role in sorted(wanted.items())
    ]
    return _answered(await node.asks.roles(roles), node)


async def handle_park(request: web.Request) -> web.Response:
    """One worker out of service, its process kept."""
    node = request.app[CONTEXT].node
    return _answered(await node.asks.park(_worker(request, node)), node)


async def handle_wake(request: web.Request) -> web.Response:
    """A parked worker back in service."""
    node = request.app[CONTEXT].node
    return _answered(await node.asks.wake(_worker(request, node)), node)


async def handle_restart(request: web.Request) -> web.Response:
    """The end of a quarantine: the worker is started again, and its deaths are forgotten."""
    node = request.app[CONTEXT].node
    worker = _worker(request, node)
    state = node.dispatcher.view.workers[worker].state
    if state is not WorkerState.QUARANTINED:
        raise ApiError(
            f"Worker {worker} is {state.value}, not quarantined; there is nothing to end.",
            status=409,
            code="not_quarantined",
        )
    return _answered(await node.asks.wake(worker), node)


async def handle_add(request: web.Request) -> web.Response:
    """One more worker."""
    node = request.app[CONTEXT].node
    raw = await _body(request)
    body = _known(request.app[WORKER], raw) if raw.strip() else WorkerBody()
    role, device = _role(body.role, "role"), _device(body.device, node)
    if len(node.specs) >= MAX_WORKERS:
        raise ApiError(
            f"This node has {len(node.specs)} workers, the most there may be; wake a parked one.",
            status=409,
            code="too_many_workers",
        )
    worker, answer = await node.asks.worker((device,), role=role, parked=body.parked)
    return _answered(answer, node, worker=worker)


async def handle_decisions(request: web.Request) -> web.Response:
    """Why roles changed, or did not, and all else that the node decided about itself."""
    raw = request.query.get("limit", "100")
    if not raw.isascii() or not raw.isdecimal() or not 1 <= int(raw[:9]) <= MAX_DECISIONS:
        raise ApiError(
            f"'limit' = {shown(raw)} is not valid: give an integer from 1 to {MAX_DECISIONS}.",
            code="invalid_value",
            param="limit",
        )
    node = request.app[CONTEXT].node
    return json_answer(
        {"decisions": [_shown(each, node) for each in node.asks.decisions(int(raw))]}
    )


def _shown(decision: Decided, node: Node) -> dict[str, Any]:
    """`age` is in seconds; an empty outcome means that it is not known yet."""
    return {
        "id": decision.decision,
        "age": node.now() - decision.at,
        "kind": decision.kind,
        "by": decision.by,
        "workers": decision.workers,
        "trigger": decision.trigger,
        "prediction": decision.prediction,
        "cost": decision.cost,
        "outcome": decision.outcome,
    }


def _answered(answer: Answered, node: Node, **more: Any) -> web.Response:
    if answer.outcome is Outcome.REFUSED:
        if node.broken:
            raise error_of(ErrorKind.INTERNAL, node.broken)
        if node.is_ending:
            raise error_of(ErrorKind.DRAINING, "The server is shutting down.")
        raise ApiError(_sentence(answer.reason), status=409, code="conflict")
    document = {
        **more,
        "outcome": answer.outcome.value,
        "seconds": answer.seconds,
        "migrated": answer.migrated,
        "reason": answer.reason,
    }
    return json_answer(document)


def _sentence(words: str) -> str:
    return f"{words[:1].upper()}{words[1:].rstrip('.')}."


async def _body(request: web.Request) -> bytes:
    """What was sent; nothing is nothing, whatever it is declared as."""
    if not request.can_read_body:
        return b""
    return await read_body(request, max_bytes=MAX_BODY_BYTES)


def _known(decoder: BodyDecoder[B], raw: bytes) -> B:
    """The body, without any field that is not looked at: a misspelt one must not pass for done."""
    decoded = decoder.decode(raw)
    if decoded.ignored:
        name = decoded.ignored[0]
        raise ApiError(
            f"'{name}' is not known here; leave it out.", code="unknown_parameter", param=name
        )
    return decoded.body


def _table(raw: bytes) -> Mapping[str, str]:
    try:
        table = msgspec.json.decode(raw or b"{}", type=dict[str, str])
    except msgspec.MsgspecError as error:
        raise ApiError(
            'The body must be an object from worker ids to roles, such as {"0": "decode"}.',
            code="invalid_type",
        ) from error
    if not table:
        raise ApiError(
            'The body names no worker; give for example {"0": "decode", "1": "prefill"}.',
            code="invalid_value",
        )
    return table


def _role(word: str, param: str) -> Role:
    try:
        return Role(word)
    except ValueError as error:
        raise ApiError(
            f"'{param}' is not valid: {shown(word)} is not a role; use prefill, decode or mixed.",
            code="invalid_value",
            param=param,
        ) from error


def _worker(request: web.Request, node: Node) -> WorkerId:
    return _worker_named(request.match_info["worker"], node)


def _worker_named(name: str, node: Node) -> WorkerId:
    known = node.dispatcher.view.workers
    for worker in known:
        if str(worker) == name:
            return worker
    raise ApiError(
        f"There is no worker {shown(name)}; there are {', '.join(map(str, sorted(known)))}.",
        status=404,
        code="worker_not_found",
    )


def _device(wanted: str | None, node: Node) -> str:
    """The device of a new worker: of the kind that this node computes on."""
    engine = node.settings.engine
    if wanted is None:
        return f"paced:{max(node.specs) + 1}" if engine == "paced" else "cpu"
    kind, _, number = wanted.partition(":")
    if engine == "paced":
        fits, example = kind == "paced" and number.isascii() and number.isdecimal(), "paced:7"
    else:
        fits, example = wanted == "cpu", "cpu"
    if not fits:
        raise ApiError(
            f"'device' is not valid: {shown(wanted)} is not a device of this node; use "
            f"{example!r}, or leave it out.",
            code="invalid_value",
            param="device",
        )
    return wanted
