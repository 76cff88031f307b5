"""What an operator may set: frozen sections, strict TOML, overrides from the command line.

A configuration is a table of tables. Every key is a field below, with its unit in its name and its
default; `config.toml` shows them all with words. A key that does not exist is refused by name, with
the nearest key that does; a wrong type or range is refused as `section.key`. Sizes may be written
"256MiB". No package below this one sees the whole: `startup` hands each its own numbers.

Order of search: the file given with `--config`, `./config.toml`, the defaults written here.
"""

import difflib
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from appliance.config_sections import (
    BatchSection,
    CorsSection,
    DevicesSection,
    EngineSection,
    FaultsSection,
    JournalSection,
    KeySection,
    KvSection,
    LimitsSection,
    LogSection,
    ModelSection,
    PolicySection,
    QueueSection,
    RolesSection,
    Section,
    ServerSection,
    SloSection,
    StandbySection,
    StreamSection,
    TransferSection,
    WeightsSection,
    WorkersSection,
)
from appliance.config_words import expected_words
from appliance.core.faults import FaultPlan, FaultPlanError, FaultRule
from appliance.core.types import WorkerId


class ConfigError(Exception):
    """The configuration cannot be used; the text names the key and what to write instead."""


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """All sections; the defaults are a complete configuration."""

    server: ServerSection = ServerSection()
    model: ModelSection = ModelSection()
    devices: DevicesSection = DevicesSection()
    engine: EngineSection = EngineSection()
    weights: WeightsSection = WeightsSection()
    kv: KvSection = KvSection()
    batch: BatchSection = BatchSection()
    policy: PolicySection = PolicySection()
    queue: QueueSection = QueueSection()
    workers: WorkersSection = WorkersSection()
    roles: RolesSection = RolesSection()
    transfer: TransferSection = TransferSection()
    standby: StandbySection = StandbySection()
    stream: StreamSection = StreamSection()
    limits: LimitsSection = LimitsSection()
    cors: CorsSection = CorsSection()
    key: tuple[KeySection, ...] = ()
    slo: dict[str, SloSection] = msgspec.field(default_factory=lambda: {"default": SloSection()})
    log: LogSection = LogSection()
    journal: JournalSection = JournalSection()
    faults: FaultsSection = FaultsSection()


SectionT = TypeVar("SectionT", bound=Section)
Override = tuple[str, str, Any]
"""(section, key, value): wins over the file."""

_ORIGIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/\s?#@]+")
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?\s*", re.IGNORECASE)
_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12} | {
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}


def parse_size(text: str) -> int:
    """Bytes meant by "4096", "256MiB", "1.5 GB". Raises `ValueError` with an example otherwise."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f'{text!r} is not a size; write bytes or for example "256MiB"')
    return int(float(match[1]) * _FACTORS[(match[2] or "").lower()])


def find_file(given: str | None, *, directory: Path) -> Path | None:
    """The file to read by the order of search, or None for the defaults.

    Raises `ConfigError` when the given file does not exist."""
    if given is not None:
        path = Path(given)
        if not path.is_file():
            raise ConfigError(f"--config {given}: no such file")
        return path
    path = directory / "config.toml"
    return path if path.is_file() else None


def load(
    path: Path | None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    flags: Mapping[str, str] | None = None,
) -> Config:
    """Read `path` (None: nothing), lay `overrides` (section -> key -> value) over it, check all.

    Raises `ConfigError` that says where the mistake is: in the file, or, if that is fine by itself,
    on the command line (`flags`: the flag that set "section.key", otherwise it was `--set`)."""
    table: dict[str, Any] = {}
    if path is not None:
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read: {error}") from error
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path}: is not TOML: {error}") from error
    try:
        return from_table(_merged(table, overrides or {}))
    except ConfigError as error:
        given = flags if flags is not None else {}
        culprit = path if _is_refused(table) else given.get(str(error).partition(" = ")[0], "--set")
        raise ConfigError(f"{culprit}: {error}") from error


def _is_refused(table: Mapping[str, Any]) -> bool:
    try:
        from_table(table)
    except ConfigError:
        return True
    return False


def from_table(table: Mapping[str, Any]) -> Config:
    """A checked configuration from nested tables; what is not named keeps its default."""
    kinds = {field.name: field.type for field in msgspec.structs.fields(Config)}
    _refuse_unknown(table, kinds, prefix="")
    sections: dict[str, Any] = {}
    for name, value in table.items():
        if name == "key":
            sections[name] = _keys(value)
            continue
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name}: is a section; write [{name}] and its keys below it")
        if name == "slo":
            sections[name] = {"default": SloSection()} | {
                label: _section(SloSection, entry, prefix=f"slo.{label}")
                for label, entry in value.items()
            }
        else:
            sections[name] = _section(kinds[name], value, prefix=name)
    config = Config(**sections)
    _check_together(config)
    return config


def parse_assignment(text: str) -> Override:
    """`section.key=value` of `--set`, the value as TOML (a bare word is a string).

    Raises `ConfigError` when it has another form."""
    name, equals, raw = text.partition("=")
    section, dot, key = name.strip().rpartition(".")
    if not (equals and dot and section and key):
        raise ConfigError(f"--set {text}: write --set section.key=value")
    try:
        value: Any = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()
    return section, key, value


def bundled_models() -> Path:
    """The directory of the models that come along: `_models` in a wheel, `models` in a checkout."""
    package = Path(__file__).resolve().parent
    shipped = package / "_models"
    return shipped if shipped.is_dir() else package.parent / "models"


def default_text() -> str:
    """The commented default configuration, as `config.toml` has it."""
    package = Path(__file__).resolve().parent
    shipped = package / "_config.toml"
    source = shipped if shipped.is_file() else package.parent / "config.toml"
    return source.read_text(encoding="utf-8")


def _merged(table: Mapping[str, Any], overrides: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    merged = dict(table)
    for dotted, values in overrides.items():
        section, _, label = dotted.partition(".")
        if section == "key":
            raise ConfigError("key: entries are written in the file only, each as [[key]]")
        inner = merged.get(section, {})
        if not isinstance(inner, Mapping):
            raise ConfigError(f"{section}: is a section; write [{section}] and its keys below it")
        if label:
            old = inner.get(label, {})
            values = {label: {**(old if isinstance(old, Mapping) else {}), **values}}
        merged[section] = {**inner, **values}
    return merged


def _refuse_unknown(table: Mapping[str, Any], known: Mapping[str, Any], *, prefix: str) -> None:
    for key in table:
        if key in known:
            continue
        full = f"{prefix}.{key}" if prefix else key
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
        what = "key" if prefix else "section"
        if near:
            hint = f"did you mean {prefix + '.' if prefix else ''}{near[0]}?"
        else:
            hint = f"known: {', '.join(known)}"
        raise ConfigError(f"unknown {what} {full}; {hint}")


def _section(kind: type[SectionT], table: Any, *, prefix: str) -> SectionT:
    if not isinstance(table, Mapping):
        raise ConfigError(f"{prefix}: is a section; write [{prefix}] and its keys below it")
    types = {field.name: field.type for field in msgspec.structs.fields(kind)}
    _refuse_unknown(table, types, prefix=prefix)
    return kind(**{key: _value(types[key], raw, f"{prefix}.{key}") for key, raw in table.items()})


def _keys(entries: Any) -> tuple[KeySection, ...]:
    if not isinstance(entries, list):
        raise ConfigError("key: write each key as an entry [[key]]; `appliance key` makes one")
    keys, fields = [], dict.fromkeys(KeySection.__struct_fields__)
    for index, entry in enumerate(entries):
        prefix = f"key[{index}]"
        if isinstance(entry, Mapping):
            _refuse_unknown(entry, fields, prefix=prefix)
            for name in ("name", "sha256"):
                if name not in entry:
                    raise ConfigError(f"{prefix}.{name}: is missing; `appliance key` writes both")
        keys.append(_section(KeySection, entry, prefix=prefix))
    return tuple(keys)


def _value(kind: Any, raw: Any, name: str) -> Any:
    try:
        if isinstance(raw, str) and raw != "auto" and _is_size(kind):
            raw = parse_size(raw)
        return msgspec.convert(raw, kind, strict=True)
    except (ValueError, msgspec.ValidationError) as error:
        schema = isinstance(error, msgspec.ValidationError)
        expected = expected_words(msgspec.inspect.type_info(kind)) if schema else ""
        reason = f"expected {expected}" if expected else str(error).replace("`", "")
        shown = str(raw).lower() if isinstance(raw, bool) else repr(raw)
        raise ConfigError(f"{name} = {shown}: {reason[0].lower() + reason[1:]}") from error


def _is_size(kind: Any) -> bool:
    return any(getattr(part, "__metadata__", None) and _unit(part) for part in (kind, *_args(kind)))


def _args(kind: Any) -> tuple[Any, ...]:
    return tuple(getattr(kind, "__args__", ()))


def _unit(kind: Any) -> bool:
    return any((meta.extra or {}).get("unit") == "bytes" for meta in kind.__metadata__)


def _check_together(config: Config) -> None:
    """Rules between keys."""
    workers, batch = config.workers, config.batch
    if workers.stop_detect_ms < 2 * workers.heartbeat_ms:
        raise ConfigError(
            f"workers.stop_detect_ms = {workers.stop_detect_ms}: must be at least twice "
            f"workers.heartbeat_ms = {workers.heartbeat_ms}"
        )
    if workers.respawn_backoff_max_ms < workers.respawn_backoff_ms:
        raise ConfigError(
            f"workers.respawn_backoff_max_ms = {workers.respawn_backoff_max_ms}: must not be below "
            f"workers.respawn_backoff_ms = {workers.respawn_backoff_ms}"
        )
    if batch.max_batch_tokens < batch.max_num_seqs:
        raise ConfigError(
            f"batch.max_batch_tokens = {batch.max_batch_tokens}: must not be below "
            f"batch.max_num_seqs = {batch.max_num_seqs}, one token of each per step"
        )
    _check_keys(config)
    _check_origins(config.cors.origins)


def _check_keys(config: Config) -> None:
    names: set[str] = set()
    digests: dict[str, str] = {}
    for index, key in enumerate(config.key):
        if key.name in names:
            raise ConfigError(f"key[{index}].name = {key.name!r}: is taken by an earlier entry")
        names.add(key.name)
        other = digests.setdefault(key.sha256.lower(), key.name)
        if other != key.name:
            raise ConfigError(f"key[{index}].sha256: is that of the key {other!r} too")
        if key.slo_class not in config.slo:
            known = ", ".join(sorted(config.slo))
            raise ConfigError(
                f"key[{index}].slo_class = {key.slo_class!r}: is not configured; known: {known}"
            )
        if key.cache_group and key.cache_group != key.name and _owned(config, key.cache_group):
            raise ConfigError(
                f"key[{index}].cache_group = {key.cache_group!r}: is the name of a key that shares "
                "its cache with nobody; give both the same cache_group"
            )


def _owned(config: Config, group: str) -> bool:
    """Whether this is the cache group of a key that names none."""
    return any(key.name == group and not key.cache_group for key in config.key)


def _check_origins(origins: tuple[str, ...]) -> None:
    for index, origin in enumerate(origins):
        if origin == "*" and len(origins) > 1:
            raise ConfigError('cors.origins: "*" allows all; write it alone or leave it out')
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise ConfigError(
                f"cors.origins[{index}] = {origin!r}: is not an origin; write scheme and host "
                'without a path, for example "https://chat.example:8080"'
            )


def fault_rules(config: Config, *, environ: Mapping[str, str]) -> tuple[FaultRule, ...]:
    """The fault plan: `faults.plan` or the environment variable APPLIANCE_FAULTS (it wins), each
    either a JSON list of rules or the path of a file with one. Empty: no faults.

    Raises `ConfigError` when it cannot be read or names what does not exist."""
    source = environ.get("APPLIANCE_FAULTS") or config.faults.plan
    if not source:
        return ()
    try:
        text = source if source.lstrip().startswith("[") else Path(source).read_text("utf-8")
        rules = msgspec.json.decode(text, type=tuple[FaultRule, ...])
        FaultPlan(rules, worker=WorkerId(0), epoch=0)
    except OSError as error:
        raise ConfigError(
            f"faults.plan = {source!r}: is neither a JSON list nor a file that can be read: {error}"
        ) from error
    except (msgspec.MsgspecError, FaultPlanError) as error:
        raise ConfigError(f"faults.plan: {error}") from error
    return rules
