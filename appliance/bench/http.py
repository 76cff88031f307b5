"""HTTP/1.1 responses, read from bytes: only what a client of a streaming API needs.

A general client spends most of its time per token on what this one does not do: tasks that are
woken, buffers, callbacks, cookies. Here the common case, a network read that is exactly one chunk,
costs one search, one comparison and one slice.
"""

from appliance.core.types import Record

MAX_HEAD = 64 * 1024


class BadResponse(ValueError):
    """What came is not an HTTP/1.1 response that this client understands."""


class Head(Record, frozen=True):
    """Status line and the headers that matter here."""

    status: int
    keep_alive: bool
    chunked: bool
    length: int | None
    """Bytes of the body where the head says so."""
    retry_after: str


def parse_head(raw: bytes) -> Head:
    """The head of a response, `raw` without its blank line. Raises `BadResponse`."""
    lines = raw.decode("latin-1").split("\r\n")
    version, _, rest = lines[0].partition(" ")
    code = rest[:3]
    if not version.startswith("HTTP/1.") or not code.isdigit():
        raise BadResponse(f"not an HTTP/1.1 response: {lines[0][:80]!r}")
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if not colon:
            raise BadResponse(f"a header line without a colon: {line[:80]!r}")
        headers[name.strip().lower()] = value.strip()
    status = int(code)
    connection = headers.get("connection", "").lower()
    keep = connection != "close" if version == "HTTP/1.1" else connection == "keep-alive"
    chunked = headers.get("transfer-encoding", "").lower().endswith("chunked")
    length = _length(headers.get("content-length"))
    if status in (204, 304):
        length, chunked = 0, False
    return Head(
        status=status,
        keep_alive=keep,
        chunked=chunked,
        length=None if chunked else length,
        retry_after=headers.get("retry-after", ""),
    )


def _length(text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isdigit():
        raise BadResponse(f"a content length that is no number: {text[:80]!r}")
    return int(text)


class ChunkedBody:
    """Takes the chunk frames away."""

    def __init__(self) -> None:
        self.over = False
        """The last chunk and its trailers have come."""
        self.rest = b""
        """After the end: what does not belong to this body. Before it: an incomplete frame line."""
        self._need = 0
        """Bytes still missing of the present chunk, its line end included."""
        self._last = False

    def feed(self, data: bytes) -> bytes:
        """The payload in `data`, joined. Raises `BadResponse`."""
        if not (self._need or self._last or self.rest):
            end = data.find(b"\r\n")
            if 0 < end < 9:
                try:
                    size = int(data[:end], 16)
                except ValueError:
                    size = 0  # an extension, or nonsense: the long way finds out
                if size and len(data) == end + 4 + size:
                    return data[end + 2 : -2]
        return b"".join(self._pieces(data))

    def _pieces(self, data: bytes) -> list[bytes]:
        if self.rest:
            data, self.rest = self.rest + data, b""
        pieces: list[bytes] = []
        at = 0
        while at < len(data):
            if self.over:
                self.rest = data[at:]
                break
            if self._need:
                at = self._take(data, at, pieces)
                continue
            end = data.find(b"\r\n", at)
            if end < 0:
                self.rest = data[at:]
                if len(self.rest) > MAX_HEAD:
                    raise BadResponse("a chunk's size line that never ends")
                break
            self._line(data[at:end])
            at = end + 2
        return pieces

    def _take(self, data: bytes, at: int, pieces: list[bytes]) -> int:
        """The next part of the present chunk; where what follows it begins."""
        part = data[at : at + self._need]
        payload = min(len(part), max(0, self._need - 2))
        if payload:
            pieces.append(part[:payload])
        tail, expected = part[payload:], b"\r\n"[2 - min(2, self._need - payload) :]
        if not expected.startswith(tail):
            raise BadResponse("a chunk that is longer than its size line says")
        self._need -= len(part)
        return at + len(part)

    def _line(self, line: bytes) -> None:
        if self._last:
            self.over = not line  # trailers end with an empty line
            return
        digits = line.partition(b";")[0].strip()
        try:
            size = int(digits, 16)
        except ValueError as error:
            raise BadResponse(f"not a chunk size: {line[:40]!r}") from error
        if size < 0 or not digits:
            raise BadResponse(f"not a chunk size: {line[:40]!r}")
        if size:
            self._need = size + 2
        else:
            self._last = True


class PlainBody:
    """A body of known length, or one that ends with the connection (`length` None)."""

    def __init__(self, length: int | None) -> None:
        self._left = length
        self.over = length == 0
        self.rest = b""

    def feed(self, data: bytes) -> bytes:
        """The payload in `data`."""
        if self._left is None:
            return data
        payload, self.rest = data[: self._left], data[self._left :]
        self._left -= len(payload)
        self.over = self._left == 0
        return payload

    @property
    def ends_with_connection(self) -> bool:
        """Only the peer's closing says that it is complete."""
        return self._left is None
