"""Latency targets of one request: from its class, its body, its headers.

Precedence, target by target: the `slo` object, the flat field (`ttft_slo_ms` ...), the header, the
class. The class is the one that the body names, else the header, else that of the caller's key,
else "default". Targets travel as seconds from here on.
"""

import math
from collections.abc import Mapping

from appliance.api.errors import ApiError, shown
from appliance.api.schemas import GenerationBody, SloBody
from appliance.core.types import Slo

CUSTOM = "custom"
"""Class of a request that gives targets of its own and names no class."""
MAX_MS = 1e9


def slo_of(
    body: GenerationBody, headers: Mapping[str, str], *, classes: Mapping[str, Slo], default: str
) -> Slo:
    """The targets of this request; `default` is the class of those that name none. Raises
    `ApiError` naming the field or header."""
    given = body.slo if isinstance(body.slo, SloBody) else SloBody()
    base, named = _class(body, headers, classes, default=default)
    ttft = _first(
        _seconds("slo.ttft_ms", given.ttft_ms),
        _seconds("ttft_slo_ms", body.ttft_slo_ms),
        _header(headers, "x-slo-ttft-ms"),
    )
    tpot = _first(
        _seconds("slo.tpot_ms", given.tpot_ms),
        _seconds("tpot_slo_ms", body.tpot_slo_ms),
        _header(headers, "x-slo-tpot-ms"),
    )
    e2e = _first(_seconds("slo.e2e_ms", given.e2e_ms), _seconds("ttlt_slo_ms", body.ttlt_slo_ms))
    if ttft is None and tpot is None and e2e is None:
        return base
    return Slo(
        class_name=base.class_name if named else CUSTOM,
        ttft=_first(ttft, base.ttft),
        tpot=_first(tpot, base.tpot),
        e2e=_first(e2e, base.e2e),
        weight=base.weight,
        on_miss=base.on_miss,
    )


def _class(
    body: GenerationBody, headers: Mapping[str, str], classes: Mapping[str, Slo], *, default: str
) -> tuple[Slo, bool]:
    """The class and whether the request named it."""
    named: str | None
    if isinstance(body.slo, str):
        field, named = "slo", body.slo
    elif body.slo is not None and body.slo.class_name is not None:
        field, named = "slo.class", body.slo.class_name
    else:
        field, named = "x-slo-class", headers.get("x-slo-class")
    usual = classes.get("default", Slo())
    if named is None:
        return classes.get(default, usual), False
    if named != "default" and named not in classes:
        known = ", ".join(sorted({"default", *classes}))
        raise ApiError(
            f"'{field}' names the class {shown(named)}, which is not configured; known: {known}.",
            code="invalid_value",
            param=field,
        )
    return classes.get(named, usual), True


def _seconds(name: str, value: float | None) -> float | None:
    if value is None:
        return None
    if not 0 < value <= MAX_MS:
        raise ApiError(
            f"'{name}' must be a positive number of milliseconds, not {shown(value)}.",
            code="invalid_value",
            param=name,
        )
    return value / 1000.0


def _header(headers: Mapping[str, str], name: str) -> float | None:
    text = headers.get(name)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    return _seconds(name, value)


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)
