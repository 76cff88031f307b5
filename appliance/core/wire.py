"""Bytes <-> frames.

A frame is a short list of messages and one opaque payload::

    u32 length of all that follows | u32 length of the header | header (msgpack) | payload

Integers are little-endian. One step of a worker is one frame. Encoders and decoders are built by
the caller once (`FrameCodec`), not kept in the module.
"""

import struct
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

import msgspec

from appliance.core.messages import Command, Report
from appliance.core.peer import PeerMessage

M = TypeVar("M")

_PREFIX = struct.Struct("<II")
MAX_FRAME_BYTES = 256 * 1024 * 1024


class WireError(Exception):
    """The byte stream is not made of frames; the connection is of no more use."""


class FrameCodec(Generic[M]):
    """Encodes and decodes frames whose messages are of one closed union."""

    def __init__(self, union: type[M]) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[list[M]] = msgspec.msgpack.Decoder(list[union])  # type: ignore[valid-type]

    def encode(self, messages: Sequence[M], payload: bytes = b"") -> bytes:
        """One frame as bytes, length prefix included."""
        header = self._encoder.encode(messages)
        size = 4 + len(header) + len(payload)
        if size > MAX_FRAME_BYTES:
            raise WireError(f"frame of {size} bytes is over the limit of {MAX_FRAME_BYTES}")
        return _PREFIX.pack(size, len(header)) + header + payload

    def decode(self, frame: memoryview) -> tuple[list[M], bytes]:
        """Messages and payload of one frame without its first length word."""
        if len(frame) < 4:
            raise WireError("frame is too short for its header")
        (header_size,) = struct.unpack_from("<I", frame)
        if header_size + 4 > len(frame):
            raise WireError("header is longer than its frame")
        try:
            messages = self._decoder.decode(frame[4 : 4 + header_size])
        except msgspec.MsgspecError as error:
            raise WireError(f"header does not decode: {error}") from error
        return messages, bytes(frame[4 + header_size :])


def command_codec() -> FrameCodec[Command]:
    """Frames that the node sends to a worker."""
    return FrameCodec(Command)  # type: ignore[arg-type]


def report_codec() -> FrameCodec[Report]:
    """Frames that a worker sends to the node."""
    return FrameCodec(Report)  # type: ignore[arg-type]


def peer_codec() -> FrameCodec[PeerMessage]:
    """Frames that two workers send to each other."""
    return FrameCodec(PeerMessage)  # type: ignore[arg-type]


class FrameBuffer:
    """Cuts a byte stream into frames; feed it what the socket gave, iterate what is complete."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes | memoryview) -> Iterator[memoryview]:
        """Add bytes and yield each complete frame (without its length word). Each view is valid
        until the next one is asked for. Raises `WireError` on an impossible length."""
        self._data += data
        position = 0
        try:
            while len(self._data) - position >= 4:
                (size,) = struct.unpack_from("<I", self._data, position)
                if size > MAX_FRAME_BYTES or size < 4:
                    raise WireError(f"impossible frame length {size}")
                if len(self._data) - position - 4 < size:
                    break
                with (
                    memoryview(self._data) as whole,
                    whole[position + 4 : position + 4 + size] as frame,
                ):
                    yield frame
                position += 4 + size
        finally:
            if position:
                del self._data[:position]
