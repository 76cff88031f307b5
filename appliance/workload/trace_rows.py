"""Request traces: JSON lines, plain or gzip'd, one request per line.

Keys: `arrival_s` (seconds, or null where only lengths are known), `prompt_tokens`, `output_tokens`;
optional `prefix_ids` (ids of the prompt's successive blocks), `class`, `slo`, and others, which are
ignored. The tokens of a block are not in the rows: `block_tokens` infers them from the counts."""

import gzip
import zlib
from collections.abc import Sequence
from itertools import pairwise
from math import ceil
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import msgspec

_Tokens = Annotated[int, msgspec.Meta(ge=0)]


class TraceError(ValueError):
    """A trace cannot be used; the text names file, line and key."""


class TraceRow(msgspec.Struct, frozen=True, kw_only=True):
    """One request of a trace."""

    prompt_tokens: _Tokens
    output_tokens: _Tokens
    arrival_s: float | None = None
    prefix_ids: tuple[int, ...] = ()
    class_name: str | None = msgspec.field(name="class", default=None)
    slo: Any = None


def read_trace(path: Path) -> list[TraceRow]:
    """The rows in the order of the file. Raises `TraceError` naming the line."""
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or error
        raise TraceError(f"{path}: cannot be read: {why}") from error
    decoder = msgspec.json.Decoder(TraceRow)
    rows = []
    for number, line in enumerate(data.splitlines(), 1):
        if line.strip():
            try:
                rows.append(decoder.decode(line))
            except msgspec.DecodeError as error:
                raise TraceError(f"{path}: line {number}: {error}") from error
    if not rows:
        raise TraceError(f"{path}: has no rows; one JSON object per line is expected")
    return rows


def block_tokens(rows: Sequence[TraceRow]) -> int:
    """Tokens of one prefix block, from prompts and their numbers of ids; 0 without ids.

    A prompt of n tokens has ceil(n / size) ids, so each row bounds the size from both sides."""
    low, high = 1, 1 << 30
    seen = False
    for row in rows:
        count = len(row.prefix_ids)
        if count == 0:
            continue
        seen = True
        low = max(low, ceil(row.prompt_tokens / count))
        if count > 1:
            high = min(high, ceil(row.prompt_tokens / (count - 1)) - 1)
    if not seen:
        return 0
    for step in (512, 256, 128, 64, 32, 16, 8, 4, 2):
        size = ceil(low / step) * step
        if size <= high:
            return size
    return low


def spread_seconds(rows: Sequence[TraceRow]) -> float:
    """The step in which arrivals were recorded, where it is coarse: many rows share each time, and
    all times are a whole number of steps apart (within 1 %), and the step is at least a second. 0
    otherwise."""
    times = sorted({row.arrival_s for row in rows if row.arrival_s is not None})
    if len(times) < 2 or len(times) * 2 > len(rows):
        return 0.0
    gaps = [right - left for left, right in pairwise(times)]
    step = round(median(gaps), 3)
    if step < 1.0:
        return 0.0
    whole = all(abs(gap / step - round(gap / step)) < 0.01 for gap in gaps)
    return step if whole else 0.0
