"""A checked plan for a body, with what the caller's key adds: its class, its part of the cache; and
the count of what is turned away before the node hears of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from aiohttp import web

from appliance.api.auth import CALLER
from appliance.api.context import CONTEXT
from appliance.api.errors import ApiError
from appliance.api.schemas import ChatBody, CompletionBody, GenerationBody
from appliance.api.targets import slo_of
from appliance.api.validate import Plan, plan_of
from appliance.core.types import ErrorKind, Record, Slo
from appliance.live.tokenise import TooBusy


class Asked(Record, frozen=True, kw_only=True):
    """What is known of a request that may yet be turned away."""

    class_name: str
    num_answers: int = 1


ASKED = web.RequestKey("asked", Asked)


def plan_for(request: web.Request, body: ChatBody | CompletionBody) -> Plan:
    """The plan of this request. Raises `ApiError`."""
    slo = _slo(request, body)
    plan = plan_of(body, slo, request.app[CONTEXT].limits, scope=request[CALLER].cache_scope)
    note_asked(request, plan)
    return plan


def note_asked(request: web.Request, plan: Plan, *, num_prompts: int = 1) -> None:
    """Remember which and how many answers are asked for, for `refusals_counted`."""
    request[ASKED] = Asked(class_name=plan.slo.class_name, num_answers=num_prompts * plan.n)


@contextmanager
def refusals_counted(request: web.Request) -> Iterator[None]:
    """What the server itself turns away within (429, or a failure of its own) counts as refused, as
    it does at the node's door. Before the body is read only headers and key tell the class."""
    try:
        yield
    except TooBusy:
        _count(request, ErrorKind.QUEUE_FULL.value)
        raise
    except ApiError as error:
        if error.status == 429 or error.status >= 500:
            _count(request, error.body.code)
        raise


def _count(request: web.Request, reason: str) -> None:
    asked, stats = _asked(request), request.app[CONTEXT].node.stats
    stats.turned_away(asked.class_name, reason, num_answers=asked.num_answers)


def _asked(request: web.Request) -> Asked:
    if ASKED in request:
        return request[ASKED]
    try:
        return Asked(class_name=_slo(request, GenerationBody()).class_name)
    except ApiError:  # its headers name what there is not
        return Asked(class_name=Slo().class_name)


def _slo(request: web.Request, body: GenerationBody) -> Slo:
    return slo_of(
        body,
        request.headers,
        classes=request.app[CONTEXT].settings.slo_classes,
        default=request[CALLER].slo_class,
    )
