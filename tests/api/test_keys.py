"""Keys over real HTTP: who comes in, as whom, and how much they may use."""

import asyncio
import hashlib
from collections.abc import Callable
from typing import Any

import openai
import pytest

from appliance.api.auth import GATE
from appliance.api.limits import Account, KeyLimits
from appliance.api.settings import ApiKey, ApiSettings
from appliance.core.types import Slo
from appliance.live.records import Submission

pytestmark = pytest.mark.procs

COMPLETIONS = "/v1/completions"
BODY = {"model": "tiny", "prompt": "red", "max_tokens": 2, "ignore_eos": True}
PLAIN = {"model": "tiny", "prompt": "red", "max_tokens": 2, "extra_body": {"ignore_eos": True}}
TALK = [{"role": "user", "content": "red"}]
CLASSES = {
    "default": Slo(),
    "chat": Slo(class_name="chat", ttft=1.0),
    "batch": Slo(class_name="batch", ttft=60.0),
}
PROBES = ("/health", "/ready", "/version", "/metrics")


def key(name: str, **more: Any) -> ApiKey:
    """The entry of the key `secret-NAME`."""
    return ApiKey(name=name, digest=hashlib.sha256(f"secret-{name}".encode()).digest(), **more)


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer secret-{name}"}


def limited(name: str, **limits: int) -> ApiKey:
    return key(name, limits=KeyLimits(**limits))


KEYS = (
    key("alice"),
    key("bob", slo_class="chat"),
    key("root", admin=True),
    key("left", cache_group="team"),
    key("right", cache_group="team"),
    limited("few", requests_per_minute=2),
    limited("short", tokens_per_minute=60),
    limited("narrow", max_concurrent_requests=1),
)


@pytest.fixture(scope="module")
def keyed(module_server):
    """A server with keys, one of them an admin's."""
    return module_server(ApiSettings(slo_classes=CLASSES, keys=KEYS), num_workers=1)


@pytest.fixture
def submitted(keyed, monkeypatch) -> list[Submission]:
    """What reaches the node."""
    seen: list[Submission] = []
    submit = keyed.node.submit

    def noting(spec: Submission, sinks: Any) -> Any:
        seen.append(spec)
        return submit(spec, sinks)

    monkeypatch.setattr(keyed.node, "submit", noting)
    return seen


async def error_of(reply: Any, status: int) -> dict[str, Any]:
    """The error object of a reply with this status."""
    assert reply.status == status, await reply.text()
    assert "x-request-id" in reply.headers
    error = (await reply.json())["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def account_of(server: Any, name: str) -> Account:
    """What the key of this name has used."""
    return server.app[GATE].accounts[name]


def official(server: Any, name: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=f"secret-{name}", max_retries=0)


async def test_the_official_client_comes_in_with_its_key(keyed):
    async with official(keyed, "alice") as client:
        answer = await client.completions.create(**PLAIN)
        assert answer.usage.completion_tokens == 2
        assert [model.id async for model in client.models.list()] == ["tiny"]
        chunks = [chunk async for chunk in await client.completions.create(**PLAIN, stream=True)]
        assert chunks[-1].choices[0].finish_reason == "length"


async def test_the_official_client_raises_what_it_should_with_another_key(keyed):
    async with official(keyed, "nobody") as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            await client.completions.create(**PLAIN)
    assert caught.value.code == "invalid_api_key"
    assert "secret-nobody" not in str(caught.value)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer secret"},
        {"Authorization": "Bearer "},
        {"Authorization": "Basic c2VjcmV0LWFsaWNl"},
        {"Authorization": "secret-alice"},
        {"x-api-key": "secret-alicf"},
        {"Authorization": "Bearer secret-alice "[:-2]},
    ],
)
async def test_without_a_known_key_every_route_of_the_api_is_401(keyed, http, headers):
    for method, path in (
        ("POST", COMPLETIONS),
        ("POST", "/v1/chat/completions"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/tiny"),
        ("GET", "/admin/state"),
        ("GET", "/nope"),
        ("GET", COMPLETIONS),
        ("OPTIONS", COMPLETIONS),
    ):
        async with http.request(method, keyed.url + path, headers=headers) as reply:
            error = await error_of(reply, 401)
            assert (error["code"], error["type"]) == ("invalid_api_key", "invalid_request_error")
            assert reply.headers["WWW-Authenticate"] == "Bearer"


async def test_every_route_that_is_not_a_probe_needs_a_key(keyed, http):
    routes = [(route.method, route.resource.canonical) for route in keyed.app.router.routes()]
    assert {path for _, path in routes} >= {"/health", COMPLETIONS, "/admin/state"}
    for method, path in routes:
        url = keyed.url + path.replace("{model}", "tiny").replace("{name}", "x")
        async with http.request(method, url) as reply:
            assert (reply.status == 401) is (path not in PROBES), path


async def test_probes_are_open(keyed, http):
    for path in PROBES:
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            async with http.get(keyed.url + path, headers=headers) as reply:
                assert reply.status == 200


async def test_metrics_may_be_closed_and_count_each_key(special_server, http):
    server = special_server(ApiSettings(keys=(key("alice"),), metrics_need_key=True))
    async with http.get(server.url + "/metrics") as reply:
        await error_of(reply, 401)
    async with http.post(server.url + COMPLETIONS, json=BODY, headers=bearer("alice")) as reply:
        prompt_tokens = (await reply.json())["usage"]["prompt_tokens"]
    async with http.get(server.url + "/metrics", headers=bearer("alice")) as reply:
        text = await reply.text()
    assert 'appliance_key_requests_total{key="alice"} 1.0' in text
    assert f'appliance_key_tokens_total{{key="alice",kind="prompt"}} {prompt_tokens}.0' in text
    assert 'appliance_key_tokens_total{key="alice",kind="generated"} 2.0' in text


async def test_x_api_key_is_a_key_too_and_either_of_two_will_do(keyed, http):
    for headers in (
        {"x-api-key": "secret-alice"},
        {"x-api-key": "secret-alice", "Authorization": "Bearer wrong"},
        {"x-api-key": "wrong", **bearer("alice")},
    ):
        async with http.post(keyed.url + COMPLETIONS, json=BODY, headers=headers) as reply:
            assert reply.status == 200


async def test_admin_routes_need_an_admin_key_where_there_is_one(keyed, http):
    for path in ("/admin/state", "/admin/requests/x"):
        async with http.get(keyed.url + path, headers=bearer("alice")) as reply:
            error = await error_of(reply, 403)
            assert (error["code"], error["type"]) == ("forbidden", "permission_error")
    async with http.get(keyed.url + "/admin/state", headers=bearer("root")) as reply:
        assert reply.status == 200
    async with http.post(keyed.url + COMPLETIONS, json=BODY, headers=bearer("root")) as reply:
        assert reply.status == 200


async def test_admin_routes_answer_this_machine_where_there_is_no_admin_key(special_server, http):
    url = special_server(ApiSettings(keys=(key("alice"),))).url + "/admin/state"
    async with http.get(url) as reply:
        assert reply.status == 200
    for headers in (
        {"Host": "evil.example"},
        {"X-Forwarded-For": "10.0.0.1"},
        {"Forwarded": "for=10.0.0.1"},
        {"Host": "evil.example", **bearer("alice")},
    ):
        async with http.get(url, headers=headers) as reply:
            assert (await error_of(reply, 403))["code"] == "forbidden"


@pytest.mark.parametrize(
    ("name", "headers", "more", "expected"),
    [
        ("alice", {}, {}, "default"),
        ("bob", {}, {}, "chat"),
        ("bob", {"x-slo-class": "batch"}, {}, "batch"),
        ("bob", {"x-slo-class": "batch"}, {"slo": "default"}, "default"),
        ("bob", {}, {"slo": {"class": "batch"}}, "batch"),
        ("alice", {"x-slo-class": "chat"}, {}, "chat"),
    ],
)
async def test_the_class_is_the_requests_then_the_keys(
    keyed, http, submitted, name, headers, more, expected
):
    headers = {**bearer(name), **headers}
    async with http.post(keyed.url + COMPLETIONS, json={**BODY, **more}, headers=headers) as reply:
        assert reply.status == 200
    assert submitted[0].slo.class_name == expected
    assert submitted[0].tenant == name


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": "red", "max_tokens": 2}),
        ("/v1/chat/completions", {"messages": TALK, "max_tokens": 2}),
        ("/v1/responses", {"input": "red", "max_output_tokens": 2}),
        ("/v1/messages", {"model": "tiny", "messages": TALK, "max_tokens": 2}),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
async def test_every_route_that_generates_works_for_its_key(
    keyed, http, submitted, path, body, stream
):
    used = account_of(keyed, "bob").generated_tokens
    headers = {**bearer("bob"), "anthropic-version": "2023-06-01"}
    async with http.post(
        keyed.url + path, json={**body, "ignore_eos": True, "stream": stream}, headers=headers
    ) as reply:
        await reply.read()
        assert reply.status == 200
    (spec,) = submitted
    assert (spec.tenant, spec.salt, spec.slo.class_name) == ("bob", "bob\n", "chat")
    assert spec.prompt.salt == spec.salt
    await until(lambda: account_of(keyed, "bob").generated_tokens == used + 2)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something to become true."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 (it becomes true in another thread)
            await asyncio.sleep(0.01)


async def cached(http: Any, server: Any, name: str, prompt: str, **more: Any) -> int:
    """How many tokens of `prompt` were found in the cache."""
    body = {**BODY, "prompt": prompt, **more}
    async with http.post(server.url + COMPLETIONS, json=body, headers=bearer(name)) as reply:
        assert reply.status == 200, await reply.text()
        return int((await reply.json())["usage"]["prompt_tokens_details"]["cached_tokens"])


async def test_the_cache_is_shared_within_a_key_and_with_nobody_else(keyed, http):
    prompt = "a secret of alice " * 20
    assert await cached(http, keyed, "alice", prompt) == 0
    assert await cached(http, keyed, "alice", prompt) > 0
    assert await cached(http, keyed, "bob", prompt) == 0
    for guess in ("alice", "alice\n", "\nalice\n"):
        assert await cached(http, keyed, "right", prompt, cache_salt=guess) == 0


async def test_a_salt_divides_the_cache_of_a_key(keyed, http):
    prompt = "another secret of alice " * 20
    assert await cached(http, keyed, "alice", prompt, cache_salt="mine") == 0
    assert await cached(http, keyed, "alice", prompt) == 0
    assert await cached(http, keyed, "alice", prompt, cache_salt="mine") > 0


async def test_keys_of_one_group_share_the_cache(keyed, http):
    prompt = "known to the team " * 20
    assert await cached(http, keyed, "left", prompt) == 0
    assert await cached(http, keyed, "right", prompt) > 0
    assert await cached(http, keyed, "alice", prompt) == 0


async def test_requests_per_minute_is_429_that_says_which_and_when(keyed, http):
    statuses = []
    for body in (BODY, {"prompt": 5}, BODY):
        async with http.post(keyed.url + COMPLETIONS, json=body, headers=bearer("few")) as reply:
            statuses.append(reply.status)
            if reply.status == 429:
                error = await error_of(reply, 429)
                assert error["param"] == "requests_per_minute"
                assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
                assert "'few'" in error["message"]
                assert "requests_per_minute = 2" in error["message"]
                assert 1 <= int(reply.headers["Retry-After"]) <= 30
    assert statuses == [200, 400, 429]
    async with http.get(keyed.url + "/v1/models", headers=bearer("few")) as reply:
        assert reply.status == 200  # only POST counts
    async with official(keyed, "few") as client:
        with pytest.raises(openai.RateLimitError):
            await client.completions.create(**PLAIN)
    async with http.post(keyed.url + COMPLETIONS, json=BODY, headers=bearer("alice")) as reply:
        assert reply.status == 200  # others are not touched


async def test_tokens_per_minute_counts_prompts_at_once_and_answers_at_the_end(keyed, http):
    body = {**BODY, "prompt": list(range(3, 43)), "max_tokens": 30}
    account = account_of(keyed, "short")
    for stream, status in ((True, 200), (False, 429)):
        async with http.post(
            keyed.url + COMPLETIONS, json={**body, "stream": stream}, headers=bearer("short")
        ) as reply:
            assert reply.status == status
            await reply.read()
            if status == 429:
                assert (await error_of(reply, 429))["param"] == "tokens_per_minute"
                assert 35 <= int(reply.headers["Retry-After"]) <= 50  # 60 - 40 - 30, then 40
    assert (account.prompt_tokens, account.generated_tokens) == (40, 30)


async def test_what_the_node_refuses_costs_no_tokens(special_server, http):
    server = special_server(ApiSettings(keys=(limited("short", tokens_per_minute=100),)))
    await asyncio.to_thread(server.call, server.node.drain(0.0))
    body = {**BODY, "prompt": list(range(3, 83))}
    for _ in range(3):
        async with http.post(server.url + COMPLETIONS, json=body, headers=bearer("short")) as reply:
            assert reply.status == 503
    assert account_of(server, "short").prompt_tokens == 0


async def test_max_concurrent_requests_holds_until_the_answer_ends(keyed, http):
    headers = bearer("narrow")
    endless = {**BODY, "max_tokens": 1500, "stream": True}
    running = await http.post(keyed.url + COMPLETIONS, json=endless, headers=headers)
    async with http.post(keyed.url + COMPLETIONS, json=BODY, headers=headers) as reply:
        assert (await error_of(reply, 429))["param"] == "max_concurrent_requests"
        assert reply.headers["Retry-After"] == "1"
    running.close()
    await until(lambda: not account_of(keyed, "narrow").concurrent)
    async with http.post(keyed.url + COMPLETIONS, json=BODY, headers=headers) as reply:
        assert reply.status == 200


async def test_a_key_is_in_no_log(keyed, http, caplog):
    with caplog.at_level("DEBUG"):
        for headers in (bearer("alice"), bearer("wrong"), {"x-api-key": "secret-bob"}):
            async with http.post(keyed.url + COMPLETIONS, json=BODY, headers=headers) as reply:
                await reply.read()
    said = repr([(record.getMessage(), record.__dict__) for record in caplog.records])
    assert "secret-" not in said
    assert any(getattr(record, "key", "") == "alice" for record in caplog.records)
