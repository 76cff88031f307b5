"""Who calls: keys, what is open without one, and the gate that every request passes.

With keys configured every route needs one, except probes (`/health`, `/ready`, `/version`, and
`/metrics` unless `metrics_need_key`). A client gives its key as `Authorization: Bearer KEY` or as
`x-api-key: KEY`. `/admin/...` needs a key with admin rights; where no such key is configured it
answers to this machine only, without a key: the peer is a loopback address, no proxy says that it
speaks for another, the client asked for an address and not for a name that somebody else may point
here, and it is no web page of another server.

Keys are compared by digest, against every entry and without an early exit, so the time taken says
nothing about which entry was nearly met.
"""

import hashlib
import hmac
import math
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address

from aiohttp import web

from appliance.api.errors import ApiError
from appliance.api.limits import Account, LimitReached
from appliance.api.settings import ApiKey

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

PROBES = frozenset({"/health", "/ready", "/version"})
METRICS = "/metrics"
ADMIN = "/admin/"
FORWARDED = ("Forwarded", "X-Forwarded-For", "X-Real-IP")
_HOST = re.compile(r"(?P<host>\[[^\]]*\]|[^:]*)(?::\d*)?")


@dataclass(frozen=True)
class Caller:
    """Whoever sent a request: the owner of a key, or anybody (the empty name)."""

    name: str = ""
    slo_class: str = "default"
    cache_scope: str = ""
    """What the salts of this caller's cached blocks begin with. It ends with a line feed, which no
    configured name has, so no `cache_salt` leads into another caller's scope."""
    account: Account | None = None


ANYBODY = Caller()


class Gate:
    """The keys of one application, and the accounts of their owners."""

    def __init__(self, keys: Sequence[ApiKey], *, metrics_need_key: bool, now: float) -> None:
        self._keys = tuple(keys)
        self._has_admin = any(key.admin for key in keys)
        self._probes = PROBES if metrics_need_key else PROBES | {METRICS}
        self._callers = {key.name: _caller(key, now) for key in keys}

    @property
    def accounts(self) -> Mapping[str, Account]:
        """What each key has used, by its name."""
        return {
            name: caller.account
            for name, caller in self._callers.items()
            if caller.account is not None
        }

    def admit(self, request: web.Request) -> Caller:
        """Who sent this. Raises `ApiError` 401 or 403 when they may not come in here."""
        resource = request.match_info.route.resource
        route = "" if resource is None else resource.canonical
        if route in self._probes:
            return ANYBODY
        if route.startswith(ADMIN) and not self._has_admin:
            check_local(request)
            return ANYBODY
        if not self._keys:
            return ANYBODY
        key = self._identify(request.headers)
        if route.startswith(ADMIN) and not key.admin:
            raise ApiError(
                f"The key {key.name!r} has no admin rights; give one that has.",
                status=403,
                code="forbidden",
            )
        return self._callers[key.name]

    def _identify(self, headers: Mapping[str, str]) -> ApiKey:
        presented = presented_keys(headers)
        for text in presented:
            key = self.find(text)
            if key is not None:
                return key
        words = "The API key is not known here" if presented else "An API key is needed"
        raise ApiError(
            f"{words}; send one as 'Authorization: Bearer KEY' or 'x-api-key: KEY'.",
            status=401,
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )

    def find(self, text: str) -> ApiKey | None:
        """The entry of this key. All entries are looked at, wherever it is."""
        digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(digest, key.digest):
                found = key
        return found


GATE = web.AppKey("gate", Gate)
CALLER = web.RequestKey("caller", Caller)


@web.middleware
async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Let in whoever may come in, and within the limits of their key."""
    caller = request.app[GATE].admit(request)
    request[CALLER] = caller
    account = caller.account
    if account is None or request.method != "POST":
        return await handler(request)
    try:
        account.enter(time.monotonic())
    except LimitReached as reached:
        raise too_many(caller, reached) from reached
    try:
        return await handler(request)
    finally:
        account.leave()


def charge(request: web.Request, prompt_tokens: int) -> None:
    """Take the tokens of a request's prompts from its key. Raises `ApiError` 429."""
    caller = request[CALLER]
    if caller.account is None:
        return
    try:
        caller.account.charge(prompt_tokens, time.monotonic())
    except LimitReached as reached:
        raise too_many(caller, reached) from reached


def settle(
    request: web.Request, prompt_tokens: int, *, generated_tokens: int, accepted: bool
) -> None:
    """Take the tokens of the answers; give those of the prompts back if the node refused it."""
    account = request[CALLER].account
    if account is None:
        return
    now = time.monotonic()
    if accepted:
        account.settle(prompt_tokens, generated_tokens, now)
    else:
        account.refund(prompt_tokens, now)


def presented_keys(headers: Mapping[str, str]) -> list[str]:
    """What a client gave as its key, the bearer token first."""
    scheme, _, token = headers.get("Authorization", "").partition(" ")
    given = [token.strip() if scheme.lower() == "bearer" else "", headers.get("x-api-key", "")]
    return [text for text in given if text]


def too_many(caller: Caller, reached: LimitReached) -> ApiError:
    """The error for a request over a limit of its key; `param` is the limit's name."""
    seconds = max(1, math.ceil(reached.retry_after))
    return ApiError(
        f"The key {caller.name!r} has reached its limit {reached}; try again in {seconds} s.",
        status=429,
        code="rate_limit_exceeded",
        param=reached.limit,
        headers={"Retry-After": str(seconds)},
    )


def check_local(request: web.Request) -> None:
    """Raise `ApiError` 403 unless the request comes from this machine, directly, and names an
    address."""
    peer = request.transport.get_extra_info("peername") if request.transport else None
    direct = not any(name in request.headers for name in FORWARDED)
    named = names_address(request.headers.get("Host", ""))
    if peer is None or not (direct and named and is_local(peer)) or is_foreign(request):
        raise ApiError(
            "Admin routes answer only to this machine; ask over 127.0.0.1, or configure a key "
            "with admin rights.",
            status=403,
            code="forbidden",
        )


def is_foreign(request: web.Request) -> bool:
    """Whether a browser sent this for a page that another server gave it."""
    origin = request.headers.get("Origin")
    return origin is not None and origin.partition("://")[2] != request.headers.get("Host", "")


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


def names_address(host: str) -> bool:
    """Whether a Host header is an IP address or "localhost" (or missing, as in HTTP/1.0): a web
    page that was brought here by a name of its own cannot send these."""
    match = _HOST.fullmatch(host.strip())
    if match is None:
        return False
    name = match["host"].strip("[]").lower()
    if name in ("", "localhost"):
        return True
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _caller(key: ApiKey, now: float) -> Caller:
    return Caller(
        name=key.name,
        slo_class=key.slo_class,
        cache_scope=(key.cache_group or key.name) + "\n",
        account=Account(key.limits, now),
    )
