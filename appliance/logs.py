"""What the node writes to stderr: one line per event, for people or for programs.

A record is an event in words and fields (`logger.info("worker is ready", extra={"worker": 1})`);
fields are ids and numbers, never prompts or answers. As text the fields follow as `key=value`; as
JSON every field is a member beside `time` (UTC, ISO 8601), `level`, `logger` and `message`.
"""

import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

import msgspec

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """What the caller gave as `extra`."""
    return {key: value for key, value in record.__dict__.items() if key not in _STANDARD}


class HumanFormatter(logging.Formatter):
    """`18:04:05.123 warning live.workers: worker has died  worker=1 cause="killed by SIGKILL"`"""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line; a traceback follows on further lines."""
        moment = datetime.fromtimestamp(record.created).astimezone()
        clock = f"{moment:%H:%M:%S}.{int(record.msecs):03d}"
        name = record.name.removeprefix("appliance.")
        line = f"{clock} {record.levelname.lower():7} {name}: {record.getMessage()}"
        pairs = [f"{key}={_shown(value)}" for key, value in fields_of(record).items()]
        if pairs:
            line += "  " + " ".join(pairs)
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line without line breaks."""
        document = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **fields_of(record),
        }
        if record.exc_info:
            document["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(document, enc_hook=str).decode()


def set_up(*, style: Literal["human", "json"], level: str, stream: TextIO | None = None) -> None:
    """Send our records of `level` and above to `stream` (stderr); replaces an earlier set-up."""
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else HumanFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("appliance").setLevel(LEVELS[level])


def _shown(value: Any) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    plain = text.isprintable() and text and not any(mark in text for mark in ' ="')
    return text if plain else msgspec.json.encode(text).decode()
