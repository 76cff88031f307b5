"""Errors as Anthropic's API words them: `{"type": "error", "error": {"type", "message"}}`.

`param` and `code` are those of every other route and say more than the type does."""

import msgspec
from aiohttp import web

from appliance.api.errors import ApiError

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def encoded(error: ApiError, request_id: str) -> bytes:
    """The error document as JSON."""
    inner = {
        "type": TYPES.get(error.status, "api_error"),
        "message": error.body.message,
        "param": error.body.param,
        "code": error.body.code,
    }
    return msgspec.json.encode({"type": "error", "error": inner, "request_id": request_id})


def response(error: ApiError, request_id: str) -> web.Response:
    """The whole HTTP answer."""
    return web.Response(
        status=error.status,
        body=encoded(error, request_id),
        content_type="application/json",
        headers=error.headers,
    )
