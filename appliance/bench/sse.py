"""Where one server-sent event ends and the next begins.

Events end with an empty line. Lines end with LF, CR LF or CR, and what comes is cut anywhere, also
between CR and LF. Nearly always a read is exactly one event with LF ends; that costs a count.
"""

from collections.abc import Sequence

LF = 10


class EventSplitter:
    """Cuts a stream into blocks: one event each, line ends as LF, without its empty line."""

    def __init__(self) -> None:
        self._rest = b""
        self._held_cr = False
        """The last byte was CR: whether LF follows is not known yet."""

    def feed(self, data: bytes) -> Sequence[bytes]:
        """The events that are complete now, first one first."""
        if self._held_cr or b"\r" in data:
            data = self._plain(data)
        if self._rest:
            data, self._rest = self._rest + data, b""
        elif data.endswith(b"\n\n") and data.find(b"\n\n") == len(data) - 2 and data[0] != LF:
            return (data[:-2],)
        *blocks, self._rest = data.split(b"\n\n")
        return [block for block in (each.lstrip(b"\n") for each in blocks) if block]

    def end(self) -> Sequence[bytes]:
        """What is left when the stream is over: an event without its empty line, or nothing."""
        blocks = list(self.feed(b"\n\n"))
        self._rest, self._held_cr = b"", False
        return blocks

    def _plain(self, data: bytes) -> bytes:
        if self._held_cr:
            data = b"\r" + data
        self._held_cr = data.endswith(b"\r")
        if self._held_cr:
            data = data[:-1]
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def data_of(block: bytes) -> bytes | None:
    """The data of an event, `None` where it has none (a comment, a name alone)."""
    if block.startswith(b"data: ") and b"\n" not in block:
        return block[6:]
    found: list[bytes] = []
    for line in block.split(b"\n"):
        name, _, value = line.partition(b":")
        if name == b"data":
            found.append(value.removeprefix(b" "))
    return b"\n".join(found) if found else None
