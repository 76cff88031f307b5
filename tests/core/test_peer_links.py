"""Packets that name a worker's peers survive the wire; nonsense is an error."""

import msgspec
import pytest

from appliance.core.peer import Asked, Dropped, Offered, PeerMessage, Taken, Withdrawn
from appliance.core.peer_links import MAX_LINK_BYTES, LinkCodec, LinkMessage, PeerDown, PeerUp
from appliance.core.types import MoveId, WorkerId
from appliance.core.wire import FrameBuffer, peer_codec

BIG = 2**63 - 1


@pytest.mark.parametrize(
    "message",
    [
        PeerUp(peer=WorkerId(3), epoch=2, num_blocks=64, block_bytes=49_152, index_offset=4096),
        PeerUp(peer=WorkerId(BIG), epoch=BIG, num_blocks=BIG, block_bytes=BIG, index_offset=BIG),
        PeerDown(peer=WorkerId(3), epoch=2),
    ],
)
def test_packets_come_back_and_fit(message: LinkMessage) -> None:
    codec = LinkCodec()
    packet = codec.encode(message)
    assert len(packet) <= MAX_LINK_BYTES
    assert codec.decode(packet) == message


@pytest.mark.parametrize("packet", [b"", b"\xc1", b"\x80", b"\x81\xa1t\xa4Nope"])
def test_nonsense_is_an_error(packet: bytes) -> None:
    with pytest.raises(msgspec.MsgspecError):
        LinkCodec().decode(packet)


@pytest.mark.parametrize(
    "message",
    [
        Asked(move=MoveId(1), num_blocks=2, room=3),
        Offered(
            move=MoveId(1),
            first=3,
            blocks=(4, 5),
            generations=(6, 2**63),
            num_tokens=77,
            final=True,
            num_emitted=3,
            cached_tokens=16,
            checksums=(2**32 - 1, 0),
        ),
        Taken(move=MoveId(1), num_blocks=2, room=3),
        Withdrawn(move=MoveId(1), reason="ended"),
        Dropped(move=MoveId(1), reason="no room"),
    ],
)
def test_messages_of_peers_come_back_with_their_payload(message: PeerMessage) -> None:
    codec = peer_codec()
    (frame,) = (bytes(view) for view in FrameBuffer().feed(codec.encode([message], b"ids")))
    assert codec.decode(memoryview(frame)) == ([message], b"ids")
