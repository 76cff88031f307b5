"""Results as JSON: one document for a whole sweep, or one line per run for a sweep that resumes."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from appliance.core.types import Record
from appliance.metrics.score import Summary

SummaryT = TypeVar("SummaryT", bound=Summary)


class DocumentError(ValueError):
    """A file of results cannot be used; the text names it and the place."""


class Document(Record, frozen=True, kw_only=True):
    """What was asked (`spec`: workload, devices, seeds and so on, as plain values) and what came
    of it."""

    spec: Mapping[str, Any]
    runs: tuple[Summary, ...]


def check_output(path: Path, *, flag: str) -> None:
    """Asked before the work is done: can a file of this name be written? Raises `DocumentError`
    that begins with the flag."""
    folder = path.absolute().parent
    if path.is_dir():
        raise DocumentError(f"{flag} {path}: is a directory; name a file in it")
    if not folder.is_dir():
        raise DocumentError(
            f"{flag} {path}: there is no directory {folder}; make it, or name another file"
        )
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise DocumentError(f"{flag} {path}: may not be written; name another file")


def write_document(path: Path, document: Document) -> None:
    """Write it whole; a reader never sees half of it."""
    data = msgspec.json.format(msgspec.json.encode(document), indent=1)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_bytes(data + b"\n")
    unfinished.replace(path)


def read_document(path: Path) -> Document:
    """Raises `DocumentError` naming the file and what is wrong in it."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Document)
    except (OSError, msgspec.DecodeError) as error:
        raise DocumentError(f"{path}: {error}") from error


def holds_results(path: Path) -> bool:
    """Whether it is a file of results, be it of another version."""
    try:
        found = msgspec.json.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError):
        return False
    return isinstance(found, dict) and {"spec", "runs"} <= set(found)


def append_line(path: Path, record: msgspec.Struct) -> None:
    """Append a record as one line of JSON, in place of a last line that was cut off."""
    append_lines(path, [record])


def append_lines(path: Path, records: Iterable[msgspec.Struct]) -> None:
    """Append records, a line of JSON each, in place of a last line that was cut off."""
    if path.exists():
        data = path.read_bytes()
        if not data.endswith(b"\n"):
            with path.open("ab") as file:
                file.truncate(data.rfind(b"\n") + 1)
    with path.open("ab") as file:
        file.writelines(msgspec.json.encode(record) + b"\n" for record in records)


def read_lines(path: Path, kind: type[SummaryT]) -> list[SummaryT]:
    """Summaries (`kind`) of a file of lines; a last line that was cut off is left out, since the
    run that was being written then counts as not done. Raises `DocumentError`."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    found: list[SummaryT] = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            found.append(msgspec.json.decode(line, type=kind))
        except msgspec.DecodeError as error:
            raise DocumentError(f"{path}: line {number}: {error}") from error
    return found


def by_policy(runs: Sequence[Summary]) -> dict[str, list[Summary]]:
    """Runs that count (not void) of each policy, in order of load."""
    found: dict[str, list[Summary]] = {}
    for run in sorted(runs, key=lambda run: (run.load, run.seed)):
        if not run.void:
            found.setdefault(run.policy, []).append(run)
    return found
