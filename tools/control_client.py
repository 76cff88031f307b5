"""The client of the control-plane benchmarks: many streams, hardly any work per chunk.

A process of its own, so that its work is not the server's: `python -m tools.control_client`, one
JSON line in (`Spec`), one out when every stream has had its first chunk, one in (`Window`), one out
with the figures. Sockets are read raw; nothing is parsed while streams run.

Streams with an index below `sampled` are read the moment the kernel has something and kept whole.
The others are read every `sweep_seconds` and only counted: they load the server as much, and the
client hardly.

Times of tokens. An answer of the paced engine is known in advance, so the text that has arrived
says exactly which tokens have, however they were joined into chunks. The lateness of a token is the
time of its arrival beyond the worker's own schedule, the sum of the profile's step times; the
schedule is laid so that the earliest token of the stream in `anchor_seconds` is on time. The added
inter-token latency is the gap to the token before, beyond the step time.
"""

import gc
import json
import re
import select
import socket
import sys
import time
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import msgspec

from appliance.core.payload import Sampling
from appliance.core.profiles import device_profile
from appliance.core.types import Record
from appliance.worker.pacing import Script
from appliance.worker.text import TokenText
from tools.control_kit import quantile

RECEIVE_BYTES = 1 << 16
BEGIN_SECONDS = 40.0
SAMPLED_BATCH = 1024
_EVENT = re.compile(rb"data: (\{[^\n]*\})\n\n")


class Spec(Record, frozen=True, kw_only=True):
    """What to ask for. Stream `i` gets a prompt of its own."""

    port: int
    num_streams: int
    prompt_tokens: int
    max_tokens: int
    sampled: int
    sweep_seconds: float = 0.02
    profile: str = ""
    """Of the workers; empty: the server is no appliance, texts mean nothing."""
    model_dir: str = ""
    slo_class: str = ""


class Window(Record, frozen=True, kw_only=True):
    """Which part counts: [begin, end) on the monotonic clock, and the schedule in it: seconds from
    the first step to each step."""

    begin: float
    end: float
    schedule: list[float]
    anchor_seconds: float


def prompt_of(index: int, length: int) -> list[int]:
    """Token ids that no other stream begins with."""
    ids = [8 + (index * 7 + at * (1 + index % 5)) % 1000 for at in range(length)]
    ids[:2] = [8 + index % 1000, 8 + index // 1000]
    return ids


class Stream:
    """One connection."""

    def __init__(self, spec: Spec, index: int) -> None:
        self.index = index
        body: dict[str, Any] = {
            "prompt": prompt_of(index, spec.prompt_tokens),
            "max_tokens": spec.max_tokens,
            "stream": True,
            "ignore_eos": True,
            "temperature": 0,
        }
        if spec.slo_class:
            body["slo_class"] = spec.slo_class
        text = json.dumps(body).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(text)}\r\n\r\n"
        )
        self.sock = socket.create_connection(("127.0.0.1", spec.port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.sendall(head.encode() + text)
        self.sock.setblocking(False)
        self.begun = self.ended = False
        self.num_bytes = self.num_chunks = 0
        self.times = array("d")
        self.pieces: list[bytes] = []

    def read(self, *, keep: bool) -> None:
        """Take what has arrived."""
        try:
            data = self.sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        if keep:
            self.times.append(time.monotonic())
            self.pieces.append(data)
        if not data:
            self.ended = True
            return
        if not self.num_bytes and not data.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"stream {self.index} was answered {data[:500]!r}")
        self.num_bytes += len(data)
        chunks = data.count(b"data: ")
        self.num_chunks += chunks
        if chunks:
            self.begun = True

    def chunks_in(self, window: Window) -> int:
        """Chunks that came in the window; the stream must have been kept."""
        return sum(
            piece.count(b"data: ")
            for when, piece in zip(self.times, self.pieces, strict=True)
            if window.begin <= when < window.end
        )


class Client:
    """All streams of one process."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._streams = [Stream(spec, index) for index in range(spec.num_streams)]
        self._sampled = self._streams[: spec.sampled]
        self._swept = self._streams[spec.sampled :]
        self._poll = select.epoll()
        for stream in self._sampled:
            self._poll.register(stream.sock, select.EPOLLIN)
        self._by_fd = {stream.sock.fileno(): stream for stream in self._sampled}

    def run(self) -> Window:
        """Read until the window is named. Raises `SystemExit` if a stream does not begin."""
        limit = time.monotonic() + BEGIN_SECONDS
        self._poll.register(sys.stdin.fileno(), select.EPOLLIN)
        said = False
        sweep = time.monotonic()
        while True:
            rest = max(0.0, sweep - time.monotonic())
            for fd, _ in self._poll.poll(rest, SAMPLED_BATCH):
                stream = self._by_fd.get(fd)
                if stream is None:
                    line = sys.stdin.buffer.readline()
                    return msgspec.json.decode(line, type=Window)
                stream.read(keep=True)
                if stream.ended:
                    self._poll.unregister(fd)
            if time.monotonic() >= sweep:
                sweep += self._spec.sweep_seconds
                for stream in self._swept:
                    stream.read(keep=False)
                if not said and all(stream.begun for stream in self._streams):
                    said = True
                    _say({"steady": True})
                elif not said and sweep > limit:
                    begun = sum(stream.begun for stream in self._streams)
                    raise SystemExit(f"only {begun} streams have begun in {BEGIN_SECONDS:g} s")

    def figures(self, window: Window) -> dict[str, Any]:
        """Close all; what the window held."""
        for stream in self._streams:
            stream.sock.close()
        result: dict[str, Any] = {
            "streams": len(self._streams),
            "sampled": len(self._sampled),
            "ended_early": sum(stream.ended for stream in self._streams),
            "bytes": sum(stream.num_bytes for stream in self._streams),
            "chunks": sum(stream.num_chunks for stream in self._streams),
            "window_chunks": sum(stream.chunks_in(window) for stream in self._sampled),
        }
        if self._spec.profile:
            result.update(self._lateness(window))
        return result

    def _lateness(self, window: Window) -> dict[str, Any]:
        tokens = TokenText.load(self._spec.model_dir)
        vocabulary = tokens.printable_ids()
        late: list[float] = []
        added: list[float] = []
        wrong = num_chunks = num_tokens = 0
        for stream in self._sampled:
            script = Script(
                array("i", prompt_of(stream.index, self._spec.prompt_tokens)).tobytes(),
                Sampling(temperature=0.0),
                vocabulary=vocabulary,
                profile=device_profile(self._spec.profile),
            )
            arrivals, good, chunks = arrivals_of(stream, script, tokens, window=window)
            wrong += not good
            num_chunks += chunks
            num_tokens += len(arrivals)
            _judge(arrivals, window, late=late, added=added)
        return {
            "wrong_texts": wrong,
            "sampled_tokens": num_tokens,
            "tokens_per_chunk": num_tokens / num_chunks if num_chunks else 0.0,
            "late_ms": _spread(late),
            "added_itl_ms": _spread(added),
        }


def arrivals_of(
    stream: Stream, script: Script, tokens: TokenText, *, window: Window
) -> tuple[list[float], bool, int]:
    """When each token in the window arrived, whether all text of the stream was as expected, and
    the number of chunks in the window."""
    raw = b"".join(stream.pieces)
    ends: list[int] = []
    at = 0
    for data in stream.pieces:
        at += len(data)
        ends.append(at)
    detokenise = tokens.stream(skip_special=True)
    arrivals: list[float] = []
    place, pending, num_chunks = 0, "", 0
    for match in _EVENT.finditer(raw):
        text = json.loads(match[1])["choices"][0]["text"]
        when = stream.times[bisect_left(ends, match.end())]
        inside = window.begin <= when < window.end
        num_chunks += inside
        pending += text
        while pending:
            piece = detokenise.push(script.token(place))
            place += 1
            if not pending.startswith(piece):
                return arrivals, False, num_chunks
            pending = pending[len(piece) :]
            if inside:
                arrivals.append(when)
    return arrivals, True, num_chunks


def _judge(
    arrivals: Sequence[float], window: Window, *, late: list[float], added: list[float]
) -> None:
    """Append the lateness of each token and the added latency of each but the first."""
    beyond = [when - due for when, due in zip(arrivals, window.schedule, strict=False)]
    added.extend(beyond[at] - beyond[at - 1] for at in range(1, len(beyond)))
    parts: dict[int, list[float]] = {}
    for when, value in zip(arrivals, beyond, strict=False):
        parts.setdefault(int((when - window.begin) / window.anchor_seconds), []).append(value)
    for values in parts.values():
        earliest = min(values)
        late.extend(value - earliest for value in values)


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    return {
        "p50": round(1e3 * quantile(seconds, 0.5), 3),
        "p90": round(1e3 * quantile(seconds, 0.9), 3),
        "p99": round(1e3 * quantile(seconds, 0.99), 3),
        "p999": round(1e3 * quantile(seconds, 0.999), 3),
        "max": round(1e3 * max(seconds, default=0.0), 3),
    }


def _say(record: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(record) + "\n")
    sys.stdout.flush()


def main() -> None:
    """One run."""
    spec = msgspec.json.decode(sys.stdin.buffer.readline(), type=Spec)
    gc.disable()
    client = Client(spec)
    window = client.run()
    gc.enable()
    _say(client.figures(window))


if __name__ == "__main__":
    main()
