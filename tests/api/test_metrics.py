"""The exposition text and what it counts."""

import asyncio

import pytest
from prometheus_client.parser import text_string_to_metric_families

pytestmark = pytest.mark.procs

BODY = {"model": "tiny", "prompt": "red", "max_tokens": 6, "ignore_eos": True}


async def scrape(server, http) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    async with http.get(server.url + "/metrics") as reply:
        assert reply.status == 200
        assert reply.headers["Content-Type"].startswith("text/plain")
        text = await reply.text()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_requests_tokens_and_latencies_are_counted(server, http):
    before = await scrape(server, http)
    for stream in (False, True):
        headers = {"x-slo-class": "chat"}
        body = {**BODY, "stream": stream}
        async with http.post(server.url + "/v1/completions", json=body, headers=headers) as reply:
            await reply.read()
    async with http.post(server.url + "/v1/completions", json={**BODY, "n": -1}) as reply:
        assert reply.status == 400
    after = await scrape(server, http)

    def grown(name: str, **labels: str) -> float:
        key = (f"appliance_{name}", tuple(sorted(labels.items())))
        return after[key] - before.get(key, 0.0)

    assert grown("requests_total", outcome="length") == 2
    assert grown("generation_tokens_total") == 12
    assert grown("prompt_tokens_total") > 0
    assert grown("http_responses_total", route="/v1/completions", status="200") == 2
    assert grown("http_responses_total", route="/v1/completions", status="400") == 1
    for name, count in (
        ("time_to_first_token_seconds", 2),
        ("inter_token_latency_seconds", 10),
        ("request_time_per_output_token_seconds", 2),
        ("e2e_request_latency_seconds", 2),
    ):
        assert grown(f"{name}_count", slo_class="chat") == count
        assert grown(f"{name}_sum", slo_class="chat") > 0
        assert grown(f"{name}_bucket", slo_class="chat", le="+Inf") == count
    assert grown("step_seconds_count") >= 6
    steps = sum(grown("worker_steps_total", worker=worker) for worker in "01")
    assert steps >= 6


async def test_workers_and_the_loop_are_shown(server, http):
    await asyncio.sleep(0.25)
    found = await scrape(server, http)
    for worker in "01":
        assert found["appliance_worker_state", (("state", "ready"), ("worker", worker))] == 1
        assert found["appliance_worker_state", (("state", "dead"), ("worker", worker))] == 0
        blocks = {
            kind: found["appliance_kv_blocks", (("kind", kind), ("worker", worker))]
            for kind in ("total", "free", "cached", "held", "leased")
        }
        assert blocks["free"] + blocks["held"] + blocks["leased"] == blocks["total"]
        assert found["appliance_worker_restarts_total", (("worker", worker),)] == 0
    assert found["appliance_loop_lag_seconds_count", ()] >= 1
    assert found["appliance_num_requests_running", ()] == 0
    assert found["appliance_num_requests_waiting", ()] == 0


async def test_head_has_no_body(server, http):
    async with http.head(server.url + "/metrics") as reply:
        assert reply.status == 200
        assert await reply.read() == b""
