"""What the node tells a worker about its peers, over the worker's *links* channel.

The channel is a SOCK_SEQPACKET pair that a worker gets when it starts; one packet is one message in
msgpack. Beside `PeerUp` travel two descriptors: the memory of the peer's KV pool, then this
worker's end of the *doorbell*, a stream of frames of `appliance.core.peer` messages to that
incarnation of the peer alone. Both ends of a doorbell are handed out together, so what one side
writes waits for the other.

A worker reads this channel before it obeys what the node says elsewhere: a command may name a peer
only after `PeerUp` was sent.
"""

import msgspec

from appliance.core.types import Tagged, WorkerId

MAX_LINK_BYTES = 4096
"""No message is longer."""
NUM_PEER_FDS = 2
"""Descriptors beside `PeerUp`: pool, doorbell."""


class PeerUp(Tagged, frozen=True, kw_only=True):
    """This incarnation of `peer` lives; its pool has this shape (`appliance.core.kv_layout`).
    Replaces an earlier incarnation."""

    peer: WorkerId
    epoch: int
    num_blocks: int
    block_bytes: int
    index_offset: int


class PeerDown(Tagged, frozen=True, kw_only=True):
    """This incarnation of `peer` is gone. What its pool holds can still be read."""

    peer: WorkerId
    epoch: int


LinkMessage = PeerUp | PeerDown


class LinkCodec:
    """Packets of the links channel."""

    def __init__(self) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[LinkMessage] = msgspec.msgpack.Decoder(LinkMessage)

    def encode(self, message: LinkMessage) -> bytes:
        """One packet."""
        return self._encoder.encode(message)

    def decode(self, packet: bytes) -> LinkMessage:
        """The message of a packet. Raises `msgspec.MsgspecError`."""
        return self._decoder.decode(packet)
