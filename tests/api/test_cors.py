"""Which pages may call: over real HTTP, as a browser would ask."""

import pytest

from appliance.api.cors import Cors
from appliance.api.settings import ApiSettings

PAGE = "https://chat.example:8080"
BODY = {"model": "tiny", "prompt": "red", "max_tokens": 2}


def question(origin: str, **more: str) -> dict[str, str]:
    """The headers of a preflight."""
    return {"Origin": origin, "Access-Control-Request-Method": "POST", **more}


def test_an_origin_is_met_exactly_but_for_its_case():
    cors = Cors([PAGE])
    assert cors.allowed(PAGE) == PAGE
    assert cors.allowed(PAGE.upper()) == PAGE.upper()
    for other in ("https://chat.example", "http://chat.example:8080", PAGE + ".evil", "null", ""):
        assert cors.allowed(other) is None


def test_all_origins_are_one_word():
    assert Cors(["*"]).allowed("null") == "*"
    assert Cors([]).allowed(PAGE) is None


@pytest.fixture(scope="module")
def page_server(module_server):
    return module_server(ApiSettings(cors_origins=(PAGE,)))


@pytest.mark.procs
async def test_a_preflight_says_what_a_page_may_send(page_server, http):
    headers = question(
        PAGE, **{"Access-Control-Request-Headers": "authorization,x-stainless-lang, x-slo-class"}
    )
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/v1/models"):
        async with http.options(page_server.url + path, headers=headers) as reply:
            assert reply.status == 204
            assert reply.headers["Access-Control-Allow-Origin"] == PAGE
            assert "POST" in reply.headers["Access-Control-Allow-Methods"]
            allowed = reply.headers["Access-Control-Allow-Headers"]
            assert allowed == headers["Access-Control-Request-Headers"]
            assert "Access-Control-Allow-Credentials" not in reply.headers
            assert "Origin" in ",".join(reply.headers.getall("Vary"))


@pytest.mark.procs
@pytest.mark.parametrize("stream", [True, False])
async def test_answers_and_errors_may_be_read_by_that_page(page_server, http, stream):
    for body, status in ((BODY, 200), ({"prompt": 5}, 400)):
        async with http.post(
            page_server.url + "/v1/completions",
            json={**body, "stream": stream},
            headers={"Origin": PAGE},
        ) as reply:
            await reply.read()
            assert reply.status == status
            assert reply.headers["Access-Control-Allow-Origin"] == PAGE
            assert "x-request-id" in reply.headers["Access-Control-Expose-Headers"]
            assert reply.headers["Vary"] == "Origin"


@pytest.mark.procs
async def test_other_pages_are_told_nothing(page_server, http):
    url = page_server.url + "/v1/completions"
    async with http.options(url, headers=question("https://evil.example")) as reply:
        assert reply.status == 403
        assert (await reply.json())["error"]["code"] == "origin_not_allowed"
        assert "Access-Control-Allow-Origin" not in reply.headers
    async with http.post(url, json=BODY, headers={"Origin": "https://evil.example"}) as reply:
        assert "Access-Control-Allow-Origin" not in reply.headers
        assert reply.headers["Vary"] == "Origin"


@pytest.mark.procs
async def test_admin_routes_take_no_part(page_server, http):
    url = page_server.url + "/admin/state"
    async with http.options(url, headers=question(PAGE)) as reply:
        assert reply.status == 403
    async with http.get(url, headers={"Origin": PAGE}) as reply:
        assert reply.status == 403
        assert "Access-Control-Allow-Origin" not in reply.headers


@pytest.mark.procs
@pytest.mark.parametrize("asked", ["a b", "x\u00e9", "a,,b", ",", "(x)"])
async def test_names_that_cannot_be_headers_are_not_repeated(page_server, http, asked):
    headers = question(PAGE, **{"Access-Control-Request-Headers": asked})
    async with http.options(page_server.url + "/tokenize", headers=headers) as reply:
        assert reply.status == 204
        assert "Access-Control-Allow-Headers" not in reply.headers


@pytest.mark.procs
async def test_without_origins_nothing_changes(server, http):
    url = server.url + "/v1/completions"
    async with http.options(url, headers=question(PAGE)) as reply:
        assert reply.status == 405
    async with http.post(url, json=BODY, headers={"Origin": PAGE}) as reply:
        assert reply.status == 200
        assert not {"Access-Control-Allow-Origin", "Vary"} & set(reply.headers)
