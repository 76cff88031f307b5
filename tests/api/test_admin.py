"""Who is this machine."""

import pytest

from appliance.api.admin import is_local


@pytest.mark.parametrize(
    "peer",
    [("127.0.0.1", 5), ("127.8.8.8", 5), ("::1", 5, 0, 0), ("::ffff:127.0.0.1", 5, 0, 0), ""],
)
def test_loopback_and_unix_peers_are_local(peer):
    assert is_local(peer)


@pytest.mark.parametrize(
    "peer",
    [("10.0.0.1", 5), ("0.0.0.0", 5), ("::ffff:10.0.0.1", 5), ("fe80::1%eth0", 5), ("x", 5), (), 7],
)
def test_everybody_else_is_not(peer):
    assert not is_local(peer)
