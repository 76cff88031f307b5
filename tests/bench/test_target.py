"""What the client finds out about a server before it sends anything that counts."""

import pytest

from appliance.bench.bodies import Route, Targets
from appliance.bench.connection import Pool
from appliance.bench.target import BenchError, Target, address_of, probe
from appliance.core.types import Slo
from tests.bench.misbehaving_server import Stub

SLOS = {
    "chat": Slo(class_name="chat", ttft=1.0, tpot=0.05),
    "batch": Slo(class_name="batch", e2e=120.0),
}


async def ask(url: str, **options: bool | str) -> Target:
    pool = Pool(address_of(url).url)
    try:
        return await probe(pool, address_of(url), slos=SLOS, **options)  # type: ignore[arg-type]
    finally:
        await pool.close()


async def test_a_server_that_takes_ids_gets_ids_and_the_targets_of_each_class() -> None:
    async with Stub().running() as server:
        target = await ask(server.url + "/v1")
        assert target.settings.model == "stub"
        assert target.settings.route is Route.IDS
        assert target.max_model_len == 2048
        assert dict(target.settings.targets) == {"chat": Targets.FULL, "batch": Targets.FULL}
        told = server.bodies[-2]["slo"]
        assert told == {"class": "chat", "ttft_ms": 1000.0, "tpot_ms": 50.0}
        assert server.bodies[-1]["ignore_eos"] is True


@pytest.mark.parametrize(
    ("takes", "route"), [(("text", "chat"), Route.TEXT), (("chat",), Route.CHAT)]
)
async def test_a_server_that_takes_no_ids_gets_words_by_its_own_count(
    takes: tuple[str, ...], route: Route
) -> None:
    async with Stub(takes=takes).running() as server:
        target = await ask(server.url)
        assert target.settings.route is route
        if route is Route.TEXT:  # the stub counts two tokens a word and five besides
            assert target.scale.per_word == pytest.approx(2.0)
            assert target.scale.fixed == pytest.approx(5.0)
        assert any("no token ids" in note for note in target.notes)


async def test_a_class_that_the_server_does_not_know_is_told_by_its_targets_alone() -> None:
    async with Stub(classes=("chat",)).running() as server:
        target = await ask(server.url)
        assert target.settings.targets["chat"] is Targets.FULL
        assert target.settings.targets["batch"] is Targets.NUMBERS
        assert any("batch" in note for note in target.notes)


async def test_without_targets_none_are_sent() -> None:
    async with Stub().running() as server:
        target = await ask(server.url, tell_targets=False)
        assert not target.settings.targets
        assert all("slo" not in body for body in server.bodies)


async def test_a_server_that_takes_nothing_is_named_with_its_own_words() -> None:
    async with Stub(takes=()).running() as server:
        with pytest.raises(BenchError, match=r"no chat.*--natural"):
            await ask(server.url)


async def test_no_server_is_said_so() -> None:
    async with Stub().running() as server:
        url = server.url
    with pytest.raises(BenchError, match=r"Is --url right"):
        await ask(url)


@pytest.mark.parametrize("url", ["ftp://x", "http://", ""])
def test_what_is_no_address_is_named(url: str) -> None:
    with pytest.raises(BenchError, match="--url"):
        address_of(url)


def test_addresses_are_taken_with_and_without_their_path() -> None:
    assert address_of("localhost:8000").url == "http://localhost:8000"
    assert address_of("http://h:1/v1/").prefix == ""
    assert address_of("http://h:1/llm/v1").prefix == "/llm"
