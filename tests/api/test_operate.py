"""What operators change over HTTP: roles, parking, workers; and why the node decided (R9, R25)."""

import asyncio
from typing import Any

import pytest

from appliance.api.settings import ApiKey, ApiSettings
from tests.api.conftest import SLO_CLASSES, LiveServer

pytestmark = pytest.mark.procs


@pytest.fixture(scope="module")
def operated(module_server: Any) -> LiveServer:
    return module_server(num_workers=2)


async def post(http: Any, url: str, body: Any = None) -> tuple[int, Any]:
    arguments = {} if body is None else {"json": body}
    async with http.post(url, **arguments) as reply:
        return reply.status, await reply.json()


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "words"),
    [
        ("workers/9/role", {"role": "decode"}, 404, "worker_not_found", "there are 0, 1"),
        ("workers/x/park", None, 404, "worker_not_found", "There is no worker 'x'"),
        ("workers/00/wake", None, 404, "worker_not_found", "'00'"),
        ("workers/0/role", {"role": "boss"}, 400, "invalid_value", "use prefill, decode or mixed"),
        ("workers/0/role", {"role": 3}, 400, "invalid_type", "'role'"),
        ("workers/0/role", {}, 400, "missing_required_parameter", "'role' is missing"),
        ("workers/0/role", {"role": "mixed", "now": 1}, 400, "unknown_parameter", "'now'"),
        ("workers/0/role", None, 400, "invalid_json", "empty"),
        ("roles", {}, 400, "invalid_value", "names no worker"),
        ("roles", ["decode"], 400, "invalid_type", "from worker ids to roles"),
        ("roles", {"0": "decode", "7": "decode"}, 404, "worker_not_found", "'7'"),
        ("roles", {"0": "decoder"}, 400, "invalid_value", "'decoder' is not a role"),
        ("workers", {"device": "cuda:0"}, 400, "invalid_value", "use 'paced:7'"),
        ("workers", {"device": "paced:x"}, 400, "invalid_value", "leave it out"),
        ("workers", {"role": "x"}, 400, "invalid_value", "'x' is not a role"),
        ("workers", {"standby": True}, 400, "unknown_parameter", "'standby'"),
    ],
)
async def test_a_mistake_is_refused_by_name_and_changes_nothing(
    operated, http, path, body, status, code, words
):
    got, document = await post(http, f"{operated.url}/admin/{path}", body)
    assert got == status, document
    assert document["error"]["code"] == code
    assert words in document["error"]["message"]
    assert operated.read(lambda node: len(node.specs)) == 2


@pytest.mark.parametrize("limit", ["0", "-1", "x", "1001", "", "9" * 30])
async def test_the_number_of_decisions_is_checked(operated, http, limit):
    async with http.get(f"{operated.url}/admin/decisions?limit={limit}") as reply:
        assert reply.status == 400
        assert (await reply.json())["error"]["param"] == "limit"


async def test_operators_need_the_admin_key(special_server, http):
    keys = (
        ApiKey(name="alice", digest=b"a" * 32),
        ApiKey(name="root", digest=b"r" * 32, admin=True),
    )
    keyed = special_server(ApiSettings(slo_classes=SLO_CLASSES, keys=keys), num_workers=1)
    for path in ("workers/0/role", "roles", "workers/0/park", "workers/0/wake", "workers"):
        status, document = await post(http, f"{keyed.url}/admin/{path}", {"role": "decode"})
        assert (status, document["error"]["code"]) == (401, "invalid_api_key")
    async with http.get(keyed.url + "/admin/decisions") as reply:
        assert reply.status == 401


async def test_a_page_of_another_server_operates_nothing(operated, http):
    url = operated.url + "/admin/workers/0/park"
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1"):
        async with http.post(url, headers={"Origin": origin}) as reply:
            assert reply.status == 403
    async with http.get(operated.url + "/admin/state", headers={"Origin": operated.url}) as reply:
        assert reply.status == 200


async def test_a_role_is_changed_and_the_change_is_put_on_record(operated, http):
    url = operated.url + "/admin/workers/1/role"
    for role in ("decode", "mixed"):
        status, answer = await post(http, url, {"role": role})
        assert status == 200, answer
        assert answer["outcome"] == "done"
        assert answer["seconds"] >= 0
        assert answer["migrated"] == 0
        assert (await state(operated, http))["workers"][1]["role"] == role
    async with http.get(operated.url + "/admin/decisions?limit=2") as reply:
        decisions = (await reply.json())["decisions"]
    assert [each["kind"] for each in decisions] == ["flip", "flip"]
    assert {each["by"] for each in decisions} == {"operator"}
    assert {each["outcome"] for each in decisions} == {"done"}
    assert decisions[0]["id"] > decisions[1]["id"]
    assert 0 <= decisions[0]["age"] <= decisions[1]["age"]


async def test_two_roles_are_swapped_as_one(operated, http):
    status, answer = await post(
        http, operated.url + "/admin/roles", {"0": "decode", "1": "prefill"}
    )
    assert (status, answer["outcome"]) == (200, "done")
    workers = (await state(operated, http))["workers"]
    assert [worker["role"] for worker in workers] == ["decode", "prefill"]
    await post(http, operated.url + "/admin/roles", {"0": "mixed", "1": "mixed"})


async def test_a_second_flip_of_a_worker_conflicts_with_the_first(operated, http):
    url = operated.url + "/admin/workers/1/role"
    answers = await asyncio.gather(*(post(http, url, {"role": "decode"}) for _ in range(8)))
    statuses = sorted(status for status, _ in answers)
    assert set(statuses) <= {200, 409}
    assert statuses[0] == 200
    await post(http, url, {"role": "mixed"})


async def test_a_worker_is_parked_and_woken(operated, http):
    url = operated.url + "/admin/workers/1/"
    status, answer = await post(http, url + "park")
    assert (status, answer["outcome"]) == (200, "done")
    assert (await state(operated, http))["workers"][1]["state"] == "parked"
    body = {"model": "tiny", "prompt": "still served", "max_tokens": 4}
    assert (await post(http, operated.url + "/v1/completions", body))[0] == 200
    status, answer = await post(http, url + "wake")
    assert (status, answer["outcome"]) == (200, "done")
    assert (await state(operated, http))["workers"][1]["state"] == "ready"


async def test_workers_are_added_while_it_serves(special_server, http):
    live = special_server(num_workers=1)
    status, answer = await post(http, live.url + "/admin/workers", {"role": "decode"})
    assert (status, answer["outcome"], answer["worker"]) == (200, "done", 1)
    status, answer = await post(http, live.url + "/admin/workers", {"parked": True})
    assert (status, answer["worker"]) == (200, 2)
    workers = (await state(live, http))["workers"]
    assert [(w["id"], w["state"], w["role"]) for w in workers] == [
        (0, "ready", "mixed"),
        (1, "ready", "decode"),
        (2, "parked", "mixed"),
    ]
    async with http.get(live.url + "/metrics") as reply:
        text = await reply.text()
    assert 'appliance_worker_state{state="parked",worker="2"} 1.0' in text
    assert 'appliance_worker_role{role="decode",worker="1"} 1.0' in text


async def test_links_and_moves_are_in_the_state(operated, http):
    document = await state(operated, http)
    assert {"links", "moves", "transfers"} <= document.keys()
    assert document["moves"] == []


async def state(live: LiveServer, http: Any) -> Any:
    async with http.get(live.url + "/admin/state") as reply:
        return await reply.json()
