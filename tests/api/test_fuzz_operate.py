"""Spoilt requests of operators: done, or a typed error; the node serves on (R1, R9)."""

import json
from typing import Any

import pytest
from hypothesis import event

from appliance.api import operate
from tests.api.mutations import ADMIN_SEEDS, OPERATIONS
from tests.api.test_fuzz_mutations import SIZES, check_error, fuzz, post

pytestmark = [pytest.mark.procs, pytest.mark.timeout(3600)]

REFUSALS = {400, 403, 404, 409, 413, 415, 431}


@pytest.fixture
def server(special_server: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A server that takes no more than a few further workers."""
    monkeypatch.setattr(operate, "MAX_WORKERS", 8)
    return special_server(num_workers=2, num_blocks=256)


def tidy(server: Any) -> None:
    """The first two workers in service and mixed, whatever there was."""
    for worker in (0, 1):
        assert post(server, f"/admin/workers/{worker}/wake", b"", {})[0] == 200
    status, raw = post(server, "/admin/roles", b'{"0": "mixed", "1": "mixed"}', {})
    assert (status, json.loads(raw)["outcome"]) == (200, "done")


@pytest.mark.parametrize("route", sorted(ADMIN_SEEDS))
def test_what_is_spoilt_was_done_before(server, route):
    for path, body in ADMIN_SEEDS[route]:
        status, raw = post(server, path, json.dumps(body).encode(), {})
        if path.endswith("restart"):  # nobody is quarantined
            assert status == 409
        else:
            assert (status, json.loads(raw)["outcome"]) == (200, "done"), raw
    tidy(server)


@pytest.mark.parametrize("examples", SIZES)
def test_a_spoilt_operation_is_done_or_refused_by_name(server, examples):
    def check(request: tuple[str, Any, dict[str, str]]) -> None:
        path, body, headers = request
        status, raw = post(server, path, json.dumps(body).encode(), headers)
        event(f"{path} {status}")
        assert status == 200 or status in REFUSALS, (status, raw)
        if status == 200:
            assert json.loads(raw)["outcome"] in ("done", "rolled_back")
        else:
            check_error(raw)

    fuzz(OPERATIONS, check, examples=examples)
    tidy(server)
    body = json.dumps({"prompt": "red", "max_tokens": 2}).encode()
    assert post(server, "/v1/completions", body, {})[0] == 200
    assert server.read(lambda node: node.health()).ok
