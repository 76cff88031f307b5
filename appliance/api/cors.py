"""Cross-origin requests: which web pages may call this server and read its answers.

None by default: a browser then lets no page read anything here. Keys travel in a header that a
page must be given on purpose, never in cookies, so credentials are not allowed. Admin routes take
no part in this: their protection may be that the caller is this machine, and every page in its
browser is.
"""

import re
from collections.abc import Awaitable, Callable, Sequence

from aiohttp import web

from appliance.api.errors import ApiError, shown

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

METHODS = "GET, HEAD, POST"
EXPOSED = "Retry-After, x-appliance-ignored, x-request-id, x-should-retry"
"""Beside those that browsers always show to a page."""
MAX_AGE = "600"
"""Seconds for which a browser may remember the answer to its preflight."""
_NAMES = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+(?:\s*,\s*[A-Za-z0-9!#$%&'*+.^_`|~-]+)*")


class Cors:
    """The origins of one application."""

    def __init__(self, origins: Sequence[str]) -> None:
        """`origins` as browsers write them ("https://chat.example:8080"); "*" for all."""
        self._origins = frozenset(origin.lower() for origin in origins)
        self._all = "*" in self._origins

    def allowed(self, origin: str) -> str | None:
        """What `Access-Control-Allow-Origin` says to this origin; None: nothing."""
        if self._all:
            return "*"
        return origin if origin.lower() in self._origins else None

    def sign(self, request: web.Request, response: web.StreamResponse) -> None:
        """Say in an answer that the page which asked may read it, where it may."""
        if not self._origins or request.path.startswith("/admin"):
            return
        if not self._all:
            response.headers.add("Vary", "Origin")
        allow = self.allowed(request.headers.get("Origin", ""))
        if allow is not None and "Origin" in request.headers:
            response.headers["Access-Control-Allow-Origin"] = allow
            response.headers["Access-Control-Expose-Headers"] = EXPOSED

    def preflight(self, request: web.Request) -> web.Response | None:
        """The answer to a browser's question whether it may send a request; None when this is not
        such a question. Raises `ApiError` 403 when it may not."""
        if (
            not self._origins
            or request.method != "OPTIONS"
            or "Access-Control-Request-Method" not in request.headers
            or "Origin" not in request.headers
        ):
            return None
        origin = request.headers["Origin"]
        if self.allowed(origin) is None or request.path.startswith("/admin"):
            raise ApiError(
                f"Pages of {shown(origin)} may not call this; the origins that may are "
                "configured as cors.origins.",
                status=403,
                code="origin_not_allowed",
            )
        headers = {"Access-Control-Allow-Methods": METHODS, "Access-Control-Max-Age": MAX_AGE}
        wanted = request.headers.get("Access-Control-Request-Headers", "").strip()
        if _NAMES.fullmatch(wanted):
            headers["Access-Control-Allow-Headers"] = wanted
            headers["Vary"] = "Access-Control-Request-Headers"
        return web.Response(status=204, headers=headers)


CORS = web.AppKey("cors", Cors)


@web.middleware
async def preflights(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer preflights of allowed origins, which never carry a key."""
    answer = request.app[CORS].preflight(request)
    return answer if answer is not None else await handler(request)
