"""Which key is meant, what is this machine, and whether a name may point here."""

import hashlib
import hmac

import pytest

from appliance.api.auth import Gate, is_local, names_address, presented_keys
from appliance.api.settings import ApiKey


def gate(*texts: str) -> Gate:
    keys = [
        ApiKey(name=f"k{index}", digest=hashlib.sha256(text.encode()).digest())
        for index, text in enumerate(texts)
    ]
    return Gate(keys, metrics_need_key=False, now=0.0)


def test_a_key_is_found_wherever_it_is():
    three = gate("one", "two", "thrée")
    assert [key.name for text in ("one", "two", "thrée") if (key := three.find(text))] == [
        "k0",
        "k1",
        "k2",
    ]


@pytest.mark.parametrize("text", ["", "on", "one ", "ONE", "one\x00", "\udcff", "x" * 8000])
def test_nothing_else_is_a_key(text):
    assert gate("one", "two").find(text) is None


def test_every_entry_is_compared_whichever_is_meant(monkeypatch):
    compared = []
    compare = hmac.compare_digest

    def counting(a: bytes, b: bytes) -> bool:
        compared.append(b)
        return compare(a, b)

    monkeypatch.setattr("appliance.api.auth.hmac.compare_digest", counting)
    three = gate("one", "two", "three")
    for text in ("one", "three", "none of them"):
        compared.clear()
        three.find(text)
        assert len(compared) == 3


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, []),
        ({"Authorization": "Bearer abc"}, ["abc"]),
        ({"Authorization": "bearer  abc "}, ["abc"]),
        ({"Authorization": "Bearer"}, []),
        ({"Authorization": "Basic abc"}, []),
        ({"Authorization": "abc"}, []),
        ({"x-api-key": "abc"}, ["abc"]),
        ({"Authorization": "Bearer abc", "x-api-key": "def"}, ["abc", "def"]),
        ({"Authorization": "Basic abc", "x-api-key": "def"}, ["def"]),
    ],
)
def test_a_key_is_given_as_a_bearer_token_or_as_x_api_key(headers, expected):
    assert presented_keys(headers) == expected


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


@pytest.mark.parametrize(
    "host",
    ["", "localhost", "LOCALHOST:80", "127.0.0.1", "127.0.0.1:8000", "[::1]:8000", "[::1]", "::1"],
)
def test_addresses_and_localhost_are_no_names_of_strangers(host):
    assert names_address(host) is (host != "::1")  # without brackets it is no Host header


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "a b",
    ],
)
def test_a_name_may_point_anywhere(host):
    assert not names_address(host)
