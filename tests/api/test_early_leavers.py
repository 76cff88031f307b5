"""Clients that are gone before the first byte: nothing is left of them, and nobody is alarmed."""

import json
import logging
import random
import socket
import struct
import time
from pathlib import Path

import pytest

from tests.api.conftest import start_server

pytestmark = pytest.mark.procs

RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: closing resets the connection."""


def leave_early(port: int, body: bytes, *, after: float) -> None:
    """Send a whole request and reset the connection."""
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        connection.sendall(head.encode() + body)
        time.sleep(after)


def test_r3_a_client_that_leaves_before_the_answer_begins_is_no_error_of_the_server(server, caplog):
    rng = random.Random(3)
    body = {"model": "tiny", "prompt": "red " * 300, "max_tokens": 50, "ignore_eos": True}
    with caplog.at_level(logging.WARNING):
        for index in range(300):
            each = json.dumps({**body, "stream": index % 3 > 0}).encode()
            leave_early(server.port, each, after=rng.random() * 0.004)
        end = time.monotonic() + 20
        while server.read(lambda node: node.num_open) and time.monotonic() < end:
            time.sleep(0.02)
    assert server.read(lambda node: node.num_open) == 0
    assert [record.getMessage() for record in caplog.records] == []


def test_r19_names_are_forgotten_with_their_stories(tmp_path: Path):
    live = start_server(journal_records=40, num_workers=1)
    try:
        for _ in range(60):
            body = {"model": "tiny", "prompt": "red", "max_tokens": 1, "ignore_eos": True}
            with socket.create_connection(("127.0.0.1", live.port), timeout=20) as connection:
                data = json.dumps(body).encode()
                connection.sendall(
                    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                    b"Content-Type: application/json\r\n"
                    b"Content-Length: %d\r\n\r\n%b" % (len(data), data)
                )
                reply = b""
                while part := connection.recv(65536):
                    reply += part
            assert reply.startswith(b"HTTP/1.1 200")
        last = json.loads(reply[reply.index(b"\r\n\r\n") :])["id"]
        assert live.read(lambda node: node.story(last)) is not None
        assert live.read(lambda node: len(node._intake._names)) <= 20
    finally:
        live.close()
