"""The journal on disk, when the operator asked for it: a thread writes, the event loop never waits.

Lines are queued; when the disk is so slow that `max_queued` lines wait, further ones are dropped
and counted, because a full journal is worth less than a served request. A reader notices the gap
by the records' numbers.
"""

import logging
import queue
import threading
from pathlib import Path

log = logging.getLogger(__name__)


class JournalFileError(Exception):
    """The file cannot be opened. The message names the setting."""


class JournalFile:
    """Appends lines to one file from a thread of its own."""

    def __init__(self, path: Path, *, max_queued: int = 200_000) -> None:
        """Opens (and empties) the file. Raises `JournalFileError`."""
        try:
            self._file = path.open("wb")
        except OSError as error:
            raise JournalFileError(
                f"[journal] path {path}: {error.strerror}; name a file in a directory that exists"
            ) from error
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._max_queued = max_queued
        self.dropped = 0
        """Lines that were not written because too many waited."""
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def write(self, line: bytes) -> None:
        """Queue one line (without its newline)."""
        if self._queue.qsize() >= self._max_queued:
            self.dropped += 1
        else:
            self._queue.put(line)

    def close(self) -> None:
        """Write what is queued and close the file."""
        self._queue.put(None)
        self._thread.join()
        try:
            self._file.close()
        except OSError as error:
            log.error("the end of the journal file is lost", extra={"cause": str(error)})

    def _run(self) -> None:
        try:
            while (line := self._queue.get()) is not None:
                self._file.write(line)
                self._file.write(b"\n")
                if self._queue.empty():
                    self._file.flush()
        except OSError as error:
            log.error("the journal file ends here", extra={"cause": str(error)})
            self._max_queued = 0
            while self._queue.get() is not None:
                self.dropped += 1
