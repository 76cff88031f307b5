"""Errors as the OpenAI API words them: `{"error": {"message", "type", "param", "code"}}`.

Every answer that is not a success has this body, whoever noticed the failure. `code` is meant for
programs and never changes; `message` names the field and what to do about it.
"""

import math
from collections.abc import Mapping

import msgspec
from aiohttp import web

from appliance.core.types import ErrorKind


class ErrorBody(msgspec.Struct, frozen=True):
    """The inner object. `type` is the family that clients map to an exception class."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorDocument(msgspec.Struct, frozen=True):
    """The whole body."""

    error: ErrorBody


class ApiError(Exception):
    """A request that is answered with `status` and an error object."""

    def __init__(
        self,
        message: str,
        *,
        code: str,
        status: int = 400,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.body = ErrorBody(message=message, type=family_of(status), param=param, code=code)

    def rename(self, old: str, new: str) -> None:
        """Speak of the field `old` by its name in another API."""
        message = self.body.message.replace(f"'{old}'", f"'{new}'")
        self.body = msgspec.structs.replace(self.body, message=message, param=new)

    def encoded(self) -> bytes:
        """The error document as JSON."""
        return msgspec.json.encode(ErrorDocument(self.body))

    def response(self) -> web.Response:
        """The whole HTTP answer."""
        return web.Response(
            status=self.status,
            body=self.encoded(),
            content_type="application/json",
            headers=self.headers,
        )


def family_of(status: int) -> str:
    """The `type` of an error object for an HTTP status."""
    if status == 403:
        return "permission_error"
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"


STATUS: Mapping[ErrorKind, int] = {
    ErrorKind.CANCELLED: 499,
    ErrorKind.QUEUE_FULL: 429,
    ErrorKind.DRAINING: 503,
    ErrorKind.TOO_LONG: 400,
    ErrorKind.NO_WORKER: 503,
    ErrorKind.WORKER_LOST: 503,
    ErrorKind.POISON: 500,
    ErrorKind.SLOW_READER: 499,
    ErrorKind.DRAIN_TIMEOUT: 503,
    ErrorKind.BUDGET: 429,
    ErrorKind.GRAMMAR: 400,
    ErrorKind.INTERNAL: 500,
}
"""499 is only ever seen in logs: the client it would be sent to has gone."""


def error_of(kind: ErrorKind, message: str, *, retry_after: float | None = None) -> ApiError:
    """The error object for a request that the node refused or ended.

    A 429 or 503 always says when to come back (one second unless the node knows better). A request
    that kills workers must not be sent again, and official clients obey the header that says so."""
    status = STATUS[kind]
    headers = {}
    if status in (429, 503):
        headers["Retry-After"] = str(max(1, math.ceil(retry_after or 1.0)))
    if kind is ErrorKind.POISON:
        headers["x-should-retry"] = "false"
    return ApiError(message or kind.value, code=kind.value, status=status, headers=headers)


def shown(value: object, *, limit: int = 80) -> str:
    """What a client sent, as printable ASCII short enough for a message."""
    text = ascii(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
