"""Latency targets of one request: from its body, its headers, its key, its class.

Precedence, target by target: the first of these that says something about it

    slo in the body         its own numbers, then the class that it names
    ttft_slo_ms, tpot_slo_ms, ttlt_slo_ms in the body
    x-slo-ttft-ms, x-slo-tpot-ms, then the class of x-slo-class
    the class of the caller's key
    the class "default"

Only one class counts, the first that is named: it gives the weight, the name, what becomes of a
budget that cannot be met, and every target that nobody said anything about. Targets travel as
seconds from here on.
"""

import math
from collections.abc import Mapping
from typing import Protocol

from appliance.api.errors import ApiError, shown
from appliance.api.schemas import GenerationBody, SloBody
from appliance.core.types import Slo

CUSTOM = "custom"
"""Class of a request that gives targets of its own and names no class."""
MAX_MS = 1e9


class Headers(Protocol):
    """The headers of a request: a name may be given more than once."""

    def getall(self, name: str, default: list[str], /) -> list[str]: ...


def slo_of(
    body: GenerationBody, headers: Headers, *, classes: Mapping[str, Slo], default: str
) -> Slo:
    """The targets of this request; `default` is the class of those that name none. Raises
    `ApiError` naming the field or header."""
    given = body.slo if isinstance(body.slo, SloBody) else SloBody()
    in_body, named = _class(body, headers, classes)
    base = _named(classes, default) if named is None else named
    strong = base if in_body else Slo()  # outranks the flat fields and headers
    own = (
        _seconds("slo.ttft_ms", given.ttft_ms),
        _seconds("slo.tpot_ms", given.tpot_ms),
        _seconds("slo.e2e_ms", given.e2e_ms),
    )
    later = (
        _first(_seconds("ttft_slo_ms", body.ttft_slo_ms), _header(headers, "x-slo-ttft-ms")),
        _first(_seconds("tpot_slo_ms", body.tpot_slo_ms), _header(headers, "x-slo-tpot-ms")),
        _seconds("ttlt_slo_ms", body.ttlt_slo_ms),
    )
    if all(value is None for value in (*own, *later)):
        return base
    return Slo(
        class_name=CUSTOM if named is None else base.class_name,
        ttft=_first(own[0], strong.ttft, later[0], base.ttft),
        tpot=_first(own[1], strong.tpot, later[1], base.tpot),
        e2e=_first(own[2], strong.e2e, later[2], base.e2e),
        weight=base.weight,
        on_miss=base.on_miss,
    )


def _named(classes: Mapping[str, Slo], name: str) -> Slo:
    return classes.get(name, classes.get("default", Slo()))


def _class(
    body: GenerationBody, headers: Headers, classes: Mapping[str, Slo]
) -> tuple[bool, Slo | None]:
    """The class that the request names, and whether its body does."""
    named: str | None
    header = _once(headers, "x-slo-class")
    if isinstance(body.slo, str):
        field, named = "slo", body.slo
    elif body.slo is not None and body.slo.class_name is not None:
        field, named = "slo.class", body.slo.class_name
    else:
        field, named = "x-slo-class", header
    if named is None:
        return False, None
    if named != "default" and named not in classes:
        known = ", ".join(sorted({"default", *classes}))
        raise ApiError(
            f"'{field}' names the class {shown(named)}, which is not configured; known: {known}.",
            code="invalid_value",
            param=field,
        )
    return field != "x-slo-class", _named(classes, named)


def _seconds(name: str, value: float | None, *, said: str | None = None) -> float | None:
    """`said`: what the client wrote, where that is not the value itself."""
    if value is None:
        return None
    if not 0 < value <= MAX_MS:
        given = shown(value if said is None else said)
        raise ApiError(
            f"'{name}' must be a number of milliseconds above 0 and up to 1e9, not {given}.",
            code="invalid_value",
            param=name,
        )
    return value / 1000.0


def _header(headers: Headers, name: str) -> float | None:
    text = _once(headers, name)
    if text is None:
        return None
    try:
        value = math.nan if "_" in text else float(text)
    except ValueError:
        value = math.nan
    return _seconds(name, value, said=text)


def _once(headers: Headers, name: str) -> str | None:
    """The value of a header; of two nobody knows which one is meant."""
    given = headers.getall(name, [])
    if len(given) > 1:
        raise ApiError(
            f"The header '{name}' is given {len(given)} times; give it once.",
            code="invalid_value",
            param=name,
        )
    return given[0] if given else None


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)
