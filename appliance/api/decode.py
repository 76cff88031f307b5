"""From the bytes of a body to a checked struct, and every way in which that fails.

The body is read twice, both times in C: once into the struct (types, syntax, depth, surrogates),
once into its top-level fields as raw bytes, because the struct does not show duplicate keys nor the
fields that it does not know. Only what contains objects is looked into for duplicates, so a prompt
of a hundred thousand ids costs no more than it must.
"""

import asyncio
import json
import re
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any, Generic, NoReturn, TypeVar

import msgspec
from aiohttp import web
from aiohttp.web_protocol import RequestPayloadError

from appliance.api.errors import ApiError, shown
from appliance.api.limits import ReceivingBudget
from appliance.api.schemas import REFUSED, Refused, SloBody, StructuredOutputs, fields_of
from appliance.api.settings import ConnectionLimits
from appliance.api.unknown import kinds_of, unknown_fields
from appliance.live.tokenise import TextService

B = TypeVar("B", bound=msgspec.Struct)
T = TypeVar("T")

MAX_NAMED = 32
LARGE_BODY_BYTES = 128 * 1024
"""A larger body is neither decoded nor checked on the event loop."""
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
_AT = re.compile(r"^(?P<what>.*?)(?: - at `(?P<path>[^`]*)`)?$", re.DOTALL)
_KEY = re.compile(rb'\s*("(?:[^"\\]|\\.)*")\s*:\s*', re.DOTALL)
_END = re.compile(rb"\s*[,}]")
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<name>[^`]+)`")
_MISSING = re.compile(r"Object missing required field `(?P<name>[^`]+)`")

_STRICT: Mapping[str, type[msgspec.Struct]] = {
    "slo": SloBody,
    "structured_outputs": StructuredOutputs,
}
"""Objects in which an unknown field is refused: a target or a constraint must not be lost."""


class Decoded(msgspec.Struct, Generic[B], frozen=True):
    """A body that has the right shape, and the names of the fields nobody looked at."""

    body: B
    ignored: tuple[str, ...]


class _DuplicateKey(Exception):
    """An object names a key twice: which value is meant is anybody's guess."""


class Receiving:
    """What bodies may take of one application while they arrive."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.seconds = limits.receive_seconds
        self.budget = ReceivingBudget(limits.max_receiving_bytes)


RECEIVING = web.AppKey("receiving", Receiving)


async def read_body(request: web.Request, *, max_bytes: int) -> bytes:
    """The whole body. Raises `ApiError`: 413 when it is over `max_bytes`, 415 when it is not JSON,
    408 when it does not arrive in time, 503 when too many large ones arrive at one time."""
    kind = request.headers.get("Content-Type")
    media = request.content_type
    if kind is not None and media != "application/json" and not media.endswith("+json"):
        raise ApiError(
            f"The body is declared as {shown(media)}; send `Content-Type: application/json`.",
            status=415,
            code="unsupported_media_type",
        )
    if request.content_length is not None and request.content_length > max_bytes:
        raise too_large(max_bytes)
    receiving = request.app[RECEIVING]
    try:
        async with asyncio.timeout(receiving.seconds):
            return await _receive(request, receiving.budget, max_bytes=max_bytes)
    except TimeoutError as error:
        raise ApiError(
            f"The body did not arrive within {receiving.seconds:g} s (limits.receive_seconds).",
            status=408,
            code="request_timeout",
            headers={"Connection": "close"},
        ) from error
    except RequestPayloadError as error:
        raise _malformed(
            "The body cannot be read; its transfer or content encoding is broken."
        ) from error


async def _receive(request: web.Request, budget: ReceivingBudget, *, max_bytes: int) -> bytes:
    """What `request.read` does, with a bound on what all requests hold meanwhile."""
    request.content.set_read_chunk_size(max_bytes)  # decompress in large pieces
    body, counted = bytearray(), 0
    try:
        while chunk := await request.content.readany():
            body += chunk
            if len(body) > max_bytes:
                raise too_large(max_bytes)
            if not budget.grow(counted, len(body)):
                raise ApiError(
                    "Too many large bodies are being received (limits.max_receiving_bytes); "
                    "try again.",
                    status=503,
                    code="overloaded",
                    headers={"Retry-After": "1", "Connection": "close"},
                )
            counted = len(body)
        return bytes(body)
    finally:
        budget.release(counted)


def too_large(max_bytes: int) -> ApiError:
    """The error for a body over the limit."""
    return ApiError(
        f"The request body is over the limit of {max_bytes} bytes; send less, "
        "or raise server.max_body_bytes.",
        status=413,
        code="request_too_large",
    )


class BodyDecoder(Generic[B]):
    """Decodes the bodies of one route."""

    def __init__(self, schema: type[B], *, refused: Refused = REFUSED) -> None:
        """`refused`: known fields that are not served, with what makes them harmless."""
        self._decoder: msgspec.json.Decoder[B] = msgspec.json.Decoder(schema)
        self._fields: msgspec.json.Decoder[dict[str, msgspec.Raw]] = msgspec.json.Decoder(
            dict[str, msgspec.Raw]
        )
        self._known = fields_of(schema)
        self._kinds = kinds_of(schema)
        self._refused = refused

    def decode(self, data: bytes) -> Decoded[B]:
        """Raises `ApiError` 400 naming the field for anything that is not a well-formed body, and
        for a field that is known and not served."""
        if not data.strip():
            raise _malformed("The request body is empty; send a JSON object.")
        try:
            data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _malformed(f"The body is not valid UTF-8 (byte {error.start}).") from error
        try:
            fields = self._fields.decode(data)
            objects = check_duplicates(data, fields)
            refuse_unsupported(fields, known=self._known, refused=self._refused)
            body = self._decoder.decode(data)
        except msgspec.ValidationError as error:
            _raise_invalid(str(error))
        except _DuplicateKey as error:
            raise ApiError(
                f"{shown(str(error))} is given twice in one object; give it once.",
                code="duplicate_key",
                param=str(error) if _PLAIN_NAME.fullmatch(str(error)) else None,
            ) from error
        except RecursionError as error:
            raise _malformed("The body is nested too deeply.") from error
        except (msgspec.DecodeError, ValueError) as error:
            raise _malformed(
                f"The body is not valid JSON: {shown(str(error), limit=160)}"
            ) from error
        return Decoded(body, self._ignored(fields, objects))

    def _ignored(
        self, fields: Mapping[str, msgspec.Raw], objects: Mapping[str, Any]
    ) -> tuple[str, ...]:
        known = self._known | self._refused.keys()
        names = dict.fromkeys(name for name in fields if name not in known)
        for name, value in objects.items():
            if name in self._kinds:
                names.update(dict.fromkeys(unknown_fields(value, self._kinds[name], name)))
        plain = (name if _PLAIN_NAME.fullmatch(name) else "?" for name in names)
        return tuple(islice(plain, MAX_NAMED))


async def decode_beside(text: TextService, decoder: BodyDecoder[B], data: bytes) -> Decoded[B]:
    """Decode a large body in a thread of `text`, a small one at once. Raises like `decode`, and
    `TooBusy`."""
    return await beside(text, len(data), lambda: decoder.decode(data))


async def beside(text: TextService, num_bytes: int, work: Callable[[], T]) -> T:
    """What `work` makes of a body of so many bytes: in a thread of `text` where it is large, else
    at once. Raises what it raises, and `TooBusy`."""
    if num_bytes <= LARGE_BODY_BYTES:
        return work()
    return await text.run(work, num_bytes=num_bytes)


def check_duplicates(data: bytes, fields: Mapping[str, msgspec.Raw]) -> dict[str, Any]:
    """Raise unless every key of every object in `data` is given once; the values, as plain Python,
    of those top-level fields that have objects in them.

    `fields` are the top-level fields of `data`, for a key given twice the last one; so each key's
    value must be found in `data` right behind the key."""
    position, seen = data.index(b"{") + 1, set()
    objects: dict[str, Any] = {}
    while key := _KEY.match(data, position):
        name = str(msgspec.json.decode(key[1]))
        value = bytes(fields[name])
        position = key.end() + len(value)
        end = _END.match(data, position)
        if name in seen or not data.startswith(value, key.end()) or end is None:
            raise _DuplicateKey(name)
        seen.add(name)
        position = end.end()
        if value[:1] in b"[{" and b"{" in value:
            objects[name] = json.loads(
                value, object_pairs_hook=_without_duplicates, parse_constant=_no_constant
            )
    return objects


def refuse_unsupported(
    fields: Mapping[str, msgspec.Raw], *, known: frozenset[str], refused: Refused
) -> None:
    """Raise `ApiError` for the first field that would change the answer and is not built."""
    for name, raw in fields.items():
        if name in known or name not in refused:
            continue
        value = msgspec.json.decode(raw)
        if value is not None and not refused[name](value):
            raise ApiError(
                f"'{name}' is not supported with the value {shown(value)}; leave it out.",
                code="unsupported_parameter",
                param=name,
            )


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise _DuplicateKey(name)
            seen.add(name)
    return fields


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def convert_at(value: object, kind: type[B], at: str) -> B:
    """`value`, a part of a body that was decoded without its type, as `kind`. Raises `ApiError`
    naming the place below `at`."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        _raise_invalid(str(error), at)


def _malformed(message: str) -> ApiError:
    return ApiError(message, code="invalid_json")


def _raise_invalid(message: str, at: str = "") -> NoReturn:
    """Word a validation error of msgspec for a client: its path, below `at`, becomes `param`."""
    match = _AT.match(message)
    what, path = (match["what"], match["path"] or "$") if match else (message, "$")
    param = (at + path.removeprefix("$")).removeprefix(".") or None
    missing = _MISSING.match(what)
    if missing:
        name = f"{param}.{missing['name']}" if param else missing["name"]
        raise ApiError(
            f"'{name}' is missing; it is required.", code="missing_required_parameter", param=name
        )
    named = f"'{param}'" if param else "The body"
    unknown = _UNKNOWN.match(what)
    strict = _STRICT.get(param or "")
    if unknown and strict is not None:
        known = ", ".join(strict.__struct_encode_fields__)
        what = f"it has no field {shown(unknown['name'])}; known: {known}"
    raise ApiError(
        f"{named} is not valid: {what[:1].lower()}{what[1:]}.", code="invalid_type", param=param
    )
