"""Workload specifications: classes of requests with their shares, lengths and targets.

"five" is built in; a file (TOML, or JSON with the same keys) gives any other:

    name = "mine"
    arrivals = "gamma:4"
    length_scale = 1.0
    max_len = 8192
    [[class]]
    name = "chat"
    share = 0.4
    lengths = "azure23_conv"
    ttft_ms = 1000
    tpot_ms = 50

Targets are absolute, in milliseconds. `relative_ttft` and `relative_tpot` ("tight", "normal",
"loose") say what they become where a calibration of the unloaded server is given: measured by the
client, or written down, `calibration = { a_ms = 8.0, b_ms = 0.03, tpot0_ms = 5.0 }`.
"""

import difflib
import hashlib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from appliance.core.types import OnMiss, Record, Slo
from appliance.workload.arrivals import ArrivalsError, parse_arrivals
from appliance.workload.lengths import (
    FixedLengths,
    Lengths,
    LengthTable,
    LognormalLengths,
    length_tables,
)

Tightness = Literal["tight", "normal", "loose"]
TTFT_FACTORS: Mapping[str, float] = {"tight": 3.0, "normal": 5.0, "loose": 10.0}
"""Times the unloaded prefill of the same prompt."""
TPOT_FACTORS: Mapping[str, float] = {"tight": 1.2, "normal": 2.0, "loose": 5.0}
"""Times the unloaded time of a token."""
TTFT_GRACE = 0.05
"""Seconds that every relative TTFT target has on top."""


class SpecError(ValueError):
    """A specification cannot be used; the text names the field and what to write instead."""


class Calibration(Record, frozen=True, kw_only=True):
    """The unloaded server, in seconds: TTFT of a prompt of n tokens is `a + b * n`, one further
    token takes `tpot0`."""

    a: float
    b: float
    tpot0: float

    def unloaded_ttft(self, prompt_tokens: int) -> float:
        """Seconds to the first token on an idle server."""
        return self.a + self.b * prompt_tokens


class ClassSpec(Record, frozen=True, kw_only=True):
    """One class: its share of the requests (shares are weights, they need not sum to 1), its
    lengths, and its targets in seconds (None: none)."""

    name: str
    share: float
    lengths: Lengths
    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None
    weight: float = 1.0
    relative_ttft: Tightness | None = None
    relative_tpot: Tightness | None = None
    on_miss: OnMiss = OnMiss.SERVE

    def slo(
        self,
        prompt_tokens: int = 0,
        *,
        calibration: Calibration | None = None,
        scale: float = 1.0,
    ) -> Slo:
        """The targets of one request, times `scale`; relative ones where a calibration is given and
        the class has such words. The end-to-end target stays absolute."""
        ttft, tpot = self.ttft, self.tpot
        if calibration is not None and self.relative_ttft is not None:
            factor = TTFT_FACTORS[self.relative_ttft]
            ttft = factor * calibration.unloaded_ttft(prompt_tokens) + TTFT_GRACE
        if calibration is not None and self.relative_tpot is not None:
            tpot = TPOT_FACTORS[self.relative_tpot] * calibration.tpot0
        return Slo(
            class_name=self.name,
            ttft=None if ttft is None else ttft * scale,
            tpot=None if tpot is None else tpot * scale,
            e2e=None if self.e2e is None else self.e2e * scale,
            weight=self.weight,
            on_miss=self.on_miss,
        )


class WorkloadSpec(Record, frozen=True, kw_only=True):
    """A workload. `length_scale` multiplies all lengths, then `max_len` bounds prompt and answer
    together (0: no bound). `max_tokens` 0 asks for exactly the true length; a larger number is
    asked for by every request (at least its true length, at most what `max_len` leaves), so that it
    says nothing about the length. `slo_scale` multiplies every target. Requests that arrive in
    the first `warm_up_seconds` of a run are sent and not counted."""

    name: str
    classes: tuple[ClassSpec, ...]
    arrivals: str = "poisson"
    length_scale: float = 1.0
    max_len: int = 0
    max_tokens: int = 0
    slo_scale: float = 1.0
    warm_up_seconds: float = 5.0
    calibration: Calibration | None = None
    """Where relative targets are wanted whatever the client measures."""

    def named(self, name: str) -> ClassSpec | None:
        """The class of that name."""
        return next((one for one in self.classes if one.name == name), None)


_Positive = Annotated[float, msgspec.Meta(gt=0)]
_Count = Annotated[int, msgspec.Meta(ge=0)]
_Tokens = Annotated[int, msgspec.Meta(ge=1)]
_Sigma = Annotated[float, msgspec.Meta(ge=0, le=5)]


class _ClassFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: Annotated[str, msgspec.Meta(min_length=1)]
    share: _Positive
    lengths: str | dict[str, Any]
    ttft_ms: _Positive | None = None
    tpot_ms: _Positive | None = None
    e2e_ms: _Positive | None = None
    weight: _Positive = 1.0
    relative_ttft: Tightness | None = None
    relative_tpot: Tightness | None = None
    on_miss: OnMiss = OnMiss.SERVE


class _SpecFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str = ""
    classes: tuple[dict[str, Any], ...] = msgspec.field(name="class")
    arrivals: str = "poisson"
    length_scale: _Positive = 1.0
    max_len: _Count = 0
    max_tokens: _Count = 0
    slo_scale: _Positive = 1.0
    warm_up_seconds: Annotated[float, msgspec.Meta(ge=0)] = 5.0
    calibration: dict[str, Any] | None = None


class _CalibrationFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    a_ms: Annotated[float, msgspec.Meta(ge=0)]
    b_ms: Annotated[float, msgspec.Meta(ge=0)]
    tpot0_ms: _Positive


_FileT = TypeVar("_FileT", bound=msgspec.Struct)


class _LognormalFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    prompt_median: _Positive
    prompt_sigma: _Sigma
    output_median: _Positive
    output_sigma: _Sigma


class _FixedFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    prompt: _Tokens
    output: _Tokens


FIVE: Mapping[str, object] = {
    "name": "five",
    "max_len": 16384,
    "class": (
        {
            "name": "chat",
            "share": 0.40,
            "lengths": "azure23_conv",
            "ttft_ms": 1000.0,
            "tpot_ms": 50.0,
            "relative_ttft": "normal",
            "relative_tpot": "normal",
        },
        {
            "name": "code",
            "share": 0.20,
            "lengths": "azure23_code",
            "ttft_ms": 500.0,
            "tpot_ms": 30.0,
            "relative_ttft": "tight",
            "relative_tpot": "tight",
        },
        {
            "name": "summarisation",
            "share": 0.15,
            "lengths": "arxiv_summ_lengths",
            "ttft_ms": 4000.0,
            "tpot_ms": 150.0,
            "relative_ttft": "loose",
            "relative_tpot": "loose",
        },
        {
            "name": "reasoning",
            "share": 0.10,
            "lengths": {
                "prompt_median": 400.0,
                "prompt_sigma": 1.2,
                "output_median": 600.0,
                "output_sigma": 0.9,
            },
            "ttft_ms": 2000.0,
            "tpot_ms": 30.0,
            "relative_ttft": "normal",
            "relative_tpot": "tight",
        },
        {"name": "batch", "share": 0.15, "lengths": "azure23_conv", "e2e_ms": 120000.0},
    ),
}
"""The specification "five", as a file would give it."""


def load_spec(name: str) -> WorkloadSpec:
    """The built-in specification of that name, or the one in the TOML or JSON file of that name.

    Raises `SpecError` naming the file, the field and the fix."""
    if name == "five":
        return spec_from_table(FIVE)
    path = Path(name)
    if not path.is_file():
        raise SpecError(f'--workload {name}: no such file, and the built-in one is called "five"')
    try:
        data = path.read_bytes()
        table = (
            msgspec.json.decode(data) if path.suffix == ".json" else tomllib.loads(data.decode())
        )
    except (OSError, UnicodeDecodeError, msgspec.DecodeError) as error:
        raise SpecError(f"{path}: cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{path}: is not TOML: {error}") from error
    if not isinstance(table, dict):
        raise SpecError(f"{path}: must be a table with the classes under `class`")
    try:
        return spec_from_table({"name": path.stem} | table)
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from error


def spec_from_table(table: Mapping[str, object]) -> WorkloadSpec:
    """A checked specification from the keys of a file. Raises `SpecError` naming the field."""
    given = _converted(table, _SpecFile, where="")
    if not given.classes:
        raise SpecError("class: is empty; give at least one [[class]]")
    tables = length_tables()
    classes = tuple(
        _class(entry, where=f"class[{place}]", tables=tables)
        for place, entry in enumerate(given.classes)
    )
    names = [one.name for one in classes]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise SpecError(f"class: two are named {twice!r}; names must differ")
    try:
        parse_arrivals(given.arrivals)
    except ArrivalsError as error:
        raise SpecError(f"arrivals = {given.arrivals!r}: {error}") from error
    return WorkloadSpec(
        name=given.name,
        classes=classes,
        arrivals=given.arrivals,
        length_scale=given.length_scale,
        max_len=given.max_len,
        max_tokens=given.max_tokens,
        slo_scale=given.slo_scale,
        warm_up_seconds=given.warm_up_seconds,
        calibration=_calibration(given.calibration),
    )


def class_slos(spec: WorkloadSpec) -> dict[str, Slo]:
    """The absolute targets of each class, by name."""
    return {one.name: one.slo(scale=spec.slo_scale) for one in spec.classes}


def digest(value: object) -> str:
    """A short name for what a record, or a sequence of them, says: equal for equal ones, whatever
    process computes it."""
    return hashlib.sha256(msgspec.json.encode(value)).hexdigest()[:16]


def _calibration(given: Mapping[str, object] | None) -> Calibration | None:
    if given is None:
        return None
    known = _converted(given, _CalibrationFile, where="calibration.")
    return Calibration(a=known.a_ms / 1000, b=known.b_ms / 1000, tpot0=known.tpot0_ms / 1000)


def _class(
    entry: Mapping[str, object], *, where: str, tables: Mapping[str, LengthTable]
) -> ClassSpec:
    given = _converted(entry, _ClassFile, where=f"{where}.")
    return ClassSpec(
        name=given.name,
        share=given.share,
        lengths=_lengths(given.lengths, where=f"{where}.lengths", tables=tables),
        ttft=_seconds(given.ttft_ms),
        tpot=_seconds(given.tpot_ms),
        e2e=_seconds(given.e2e_ms),
        weight=given.weight,
        relative_ttft=given.relative_ttft,
        relative_tpot=given.relative_tpot,
        on_miss=given.on_miss,
    )


def _lengths(
    given: str | Mapping[str, object], *, where: str, tables: Mapping[str, LengthTable]
) -> Lengths:
    if isinstance(given, str):
        table = tables.get(given)
        if table is None:
            raise SpecError(
                f"{where} = {given!r}: {_nearest(given, tables)}; or give a table with"
                " prompt_median, prompt_sigma, output_median and output_sigma, or with prompt and"
                " output"
            )
        return table
    if "prompt" in given or "output" in given:
        fixed = _converted(given, _FixedFile, where=f"{where}.")
        return FixedLengths(prompt=fixed.prompt, output=fixed.output)
    drawn = _converted(given, _LognormalFile, where=f"{where}.")
    return LognormalLengths(**msgspec.structs.asdict(drawn))


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def _converted(table: Mapping[str, object], kind: type[_FileT], *, where: str) -> _FileT:
    """`table` as the record `kind`; what does not fit is named with `where` before it."""
    fields = msgspec.structs.fields(kind)
    known = [field.encode_name for field in fields]
    for name in table:
        if name not in known:
            raise SpecError(f"{where}{name}: there is no such field; {_nearest(name, known)}")
    for field in fields:
        if field.required and field.encode_name not in table:
            raise SpecError(f"{where}{field.encode_name}: is missing")
    for field in fields:
        if field.encode_name in table:
            value = table[field.encode_name]
            try:
                msgspec.convert(value, field.type)
            except msgspec.ValidationError as error:
                raise SpecError(f"{where}{field.encode_name} = {value!r}: {error}") from error
    return msgspec.convert(dict(table), kind)


def _nearest(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
