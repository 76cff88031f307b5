"""A checked plan for a body, with what the caller's key adds: its class, its part of the cache."""

from aiohttp import web

from appliance.api.auth import CALLER
from appliance.api.context import CONTEXT
from appliance.api.schemas import ChatBody, CompletionBody
from appliance.api.targets import slo_of
from appliance.api.validate import Plan, plan_of


def plan_for(request: web.Request, body: ChatBody | CompletionBody) -> Plan:
    """The plan of this request. Raises `ApiError`."""
    context, caller = request.app[CONTEXT], request[CALLER]
    slo = slo_of(
        body,
        request.headers,
        classes=context.settings.slo_classes,
        default=caller.slo_class,
    )
    return plan_of(body, slo, context.limits, scope=caller.cache_scope)
