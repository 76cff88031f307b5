"""The verdict of an answer: its `slo` object on every route, what its parts sum to whatever happens
on the way, and how a budget that cannot be met is told."""

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any

import openai
import pytest

from appliance.api.settings import ApiSettings
from appliance.core.messages import Cancelled
from appliance.core.slots import DispatchSlots, Late, Policy
from appliance.core.types import ErrorKind, OnMiss, Phase, Request, RequestId, Slo, WorkerId
from appliance.core.view import NodeView
from appliance.policy import make_policy
from appliance.policy.dispatch_parts import place_least_work
from tests.api.conftest import LiveServer
from tests.api.test_metrics import scrape

pytestmark = pytest.mark.procs

CLASSES = {
    "default": Slo(),
    "easy": Slo(class_name="easy", ttft=60.0, tpot=10.0),
    "hard": Slo(class_name="hard", ttft=1e-6),
    "picky": Slo(class_name="picky", ttft=0.01, on_miss=OnMiss.REFUSE),
    "patient": Slo(class_name="patient", ttft=0.01),
}
KEYS = {"class", "ttft_budget_ms", "tpot_budget_ms", "ttft_ms", "tpot_ms", "met", "breakdown",
        "workers", "demoted"}  # fmt: skip
STEP_MS = 20
MESSAGES: Any = [{"role": "user", "content": "repeat: red fox"}]
EXACT = {"ignore_eos": True}


@pytest.fixture(scope="module")
def judged(module_server) -> LiveServer:
    """Two paced workers, with classes of budgets."""
    return module_server(ApiSettings(slo_classes=CLASSES))


@pytest.fixture
async def official(judged):
    async with openai.AsyncOpenAI(
        base_url=f"{judged.url}/v1", api_key="none", max_retries=0
    ) as client:
        yield client


def check(
    slo: dict[str, Any], num_tokens: int, *, name: str = "default", died: bool = False
) -> None:
    """The shape, and that the parts sum to last token minus arrival within 2 ms. The last part is
    the rest by definition; what can go wrong is that the others are longer than the whole. With
    `died` it waited once more after its first token."""
    assert set(slo) - {"e2e_budget_ms"} == KEYS
    assert slo["class"] == name
    parts = slo["breakdown"]
    assert set(parts) == {"queue_ms", "prefill_ms", "transfer_ms", "decode_ms"}
    assert all(value >= 0 for value in parts.values())
    whole = slo["ttft_ms"] + slo["tpot_ms"] * (num_tokens - 1)
    assert abs(sum(parts.values()) - whole) < 2.0
    before = parts["queue_ms"] + parts["prefill_ms"] + parts["transfer_ms"]
    assert before <= whole + 2.0
    assert died or slo["ttft_ms"] >= parts["queue_ms"]


def last(chunks: Sequence[Any]) -> dict[str, Any]:
    """The verdict of a stream: on the chunk with the last finish reason, and on no other."""
    carrying = [chunk for chunk in chunks if getattr(chunk, "slo", None)]
    finishing = [chunk for chunk in chunks if any(c.finish_reason for c in chunk.choices)]
    assert carrying == finishing[-1:]
    return carrying[0].slo


def events_of(answer: dict[str, Any]) -> list[tuple[str, float]]:
    """(what, at) of one answer's story, `at` in milliseconds."""
    return [(event["what"], event["at"] * 1000.0) for event in answer["events"]]


# --- on every route -------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3])
async def test_chat_and_completions_carry_the_verdict(official, n):
    fields: Any = {"model": "tiny", "max_tokens": 8, "n": n, "extra_body": EXACT}
    chat, complete = official.chat.completions.create, official.completions.create
    check((await chat(messages=MESSAGES, **fields)).slo, 8)
    check((await complete(prompt="red", **fields)).slo, 8)
    usage = {"include_usage": True}
    for options in ({}, {"stream_options": usage}):
        stream = await chat(messages=MESSAGES, stream=True, **options, **fields)
        check(last([chunk async for chunk in stream]), 8)
        stream = await complete(prompt="red", stream=True, **options, **fields)
        check(last([chunk async for chunk in stream]), 8)


async def test_responses_carry_the_verdict(official):
    fields: Any = {"model": "tiny", "input": "red fox", "max_output_tokens": 8}
    fields["extra_body"] = {**EXACT, "slo": "easy"}
    check((await official.responses.create(**fields)).slo, 8, name="easy")
    events = [event async for event in await official.responses.create(stream=True, **fields)]
    check(events[-1].response.slo, 8, name="easy")
    assert getattr(events[0].response, "slo", None) is None


async def test_messages_carry_the_verdict(judged, http):
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 8, **EXACT, "ttft_slo_ms": 9000}
    async with http.post(judged.url + "/v1/messages", json=body) as reply:
        check((await reply.json())["slo"], 8, name="custom")
    async with http.post(judged.url + "/v1/messages", json={**body, "stream": True}) as reply:
        lines = (await reply.text()).splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    (told,) = [event for event in events if "slo" in event]
    assert told["type"] == "message_delta"
    assert told["slo"]["ttft_budget_ms"] == 9000.0
    check(told["slo"], 8, name="custom")


# --- what it says ---------------------------------------------------------------------------------


async def ask(official, **fields: Any) -> Any:
    extra = EXACT | fields.pop("extra_body", {})
    shape = {"max_tokens": 6, "prompt": "red fox", **fields}
    return await official.completions.create(model="tiny", extra_body=extra, **shape)


async def test_a_budget_is_met_or_missed_and_none_is_met(official):
    for name, met in (("default", True), ("easy", True), ("hard", False)):
        slo = (await ask(official, extra_body={"slo": name})).slo
        assert (slo["class"], slo["met"]) == (name, met)
    assert slo["ttft_budget_ms"] == 0.001
    assert slo["tpot_budget_ms"] is None
    own = {"slo": {"ttft_ms": 60000, "tpot_ms": 5000, "e2e_ms": 0.5}}
    slo = (await ask(official, extra_body=own)).slo
    assert (slo["ttft_budget_ms"], slo["tpot_budget_ms"]) == (60000.0, 5000.0)
    assert (slo["e2e_budget_ms"], slo["met"]) == (0.5, False)


async def test_headers_name_class_and_targets(official):
    headers = {"x-slo-class": "easy", "x-slo-tpot-ms": "123"}
    slo = (await ask(official, extra_headers=headers)).slo
    assert (slo["class"], slo["ttft_budget_ms"], slo["tpot_budget_ms"]) == ("easy", 60000.0, 123.0)


async def test_an_answer_of_one_token_has_no_gaps(official):
    slo = (await ask(official, max_tokens=1)).slo
    assert slo["tpot_ms"] == 0.0
    check(slo, 1)


@pytest.mark.parametrize("stream", [False, True])
async def test_the_times_agree_with_the_clock_of_the_client(special_server, http, stream):
    live = special_server(profile=f"fixed-{STEP_MS}ms")
    error = ("appliance_step_prediction_error", (("of", "p90"),))
    assert (await scrape(live, http))[error] == 0.0
    async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none") as client:
        begun = time.monotonic()
        answer = await ask(client, max_tokens=50, stream=stream)
        slo = last([chunk async for chunk in answer]) if stream else answer.slo
        waited = (time.monotonic() - begun) * 1000.0
    check(slo, 50)
    parts = slo["breakdown"]
    told = sum(parts.values())
    assert waited / 2 <= told <= waited
    # steps of a paced worker are never shorter than its time table, which begins with the first
    assert parts["prefill_ms"] >= STEP_MS
    assert told - parts["queue_ms"] >= 50 * STEP_MS
    # a first token that is heard of late shortens the rest; what is late is caught up by 0.25 s
    assert parts["decode_ms"] >= 49 * STEP_MS / 2
    learned = live.read(lambda node: node.dispatcher.view.cost.steps.error.p90_relative)
    assert (await scrape(live, http))[error] == learned > 0.0


async def test_metrics_count_attainment_slack_and_goodput_by_class(judged, official, http):
    before = await scrape(judged, http)
    for name in ("easy", "easy", "hard"):
        await ask(official, extra_body={"slo": name})
    after = await scrape(judged, http)

    def grown(name: str, **labels: str) -> float:
        key = (f"appliance_{name}", tuple(sorted(labels.items())))
        return after[key] - before.get(key, 0.0)

    assert grown("slo_answers_total", slo_class="easy", outcome="met") == 2
    assert grown("slo_answers_total", slo_class="hard", outcome="missed") == 1
    assert grown("goodput_answers_total", slo_class="easy") == 2
    assert grown("goodput_tokens_total", slo_class="easy") == 12
    assert grown("goodput_tokens_total", slo_class="hard") == 0
    ahead = {"slo_class": "easy", "at": "first_token"}
    assert grown("slo_slack_seconds_bucket", **ahead, le="+Inf") == 2
    assert grown("slo_slack_seconds_bucket", **ahead, le="0.0") == 0
    assert grown("slo_slack_seconds_bucket", slo_class="easy", at="end", le="+Inf") == 2
    late = {"slo_class": "hard", "at": "first_token"}
    assert grown("slo_slack_seconds_bucket", **late, le="0.0") == 1
    attained = ("appliance_slo_attainment_ratio", (("slo_class", "hard"),))
    assert after[attained] == 0.0


# --- whatever happens on the way ------------------------------------------------------------------


async def post(http, url: str, body: Any = None) -> dict[str, Any]:
    async with http.post(url, json=body or {}) as reply:
        assert reply.status == 200, await reply.text()
        return await reply.json()


async def begun(stream: Any) -> list[Any]:
    """The first few chunks of a stream."""
    return [await anext(stream) for _ in range(3)]


async def test_a_hand_off_is_told_as_transfer(special_server, http):
    live = special_server(ApiSettings(slo_classes=CLASSES))
    await post(http, live.url + "/admin/roles", {"0": "prefill", "1": "decode"})
    async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none") as client:
        stream = await ask(client, max_tokens=40, stream=True)
        chunks = [chunk async for chunk in stream]
    slo = last(chunks)
    check(slo, 40)
    assert slo["workers"] == [0, 1]
    assert slo["breakdown"]["transfer_ms"] > 0
    async with http.get(f"{live.url}/admin/requests/{chunks[0].id}") as reply:
        (answer,) = (await reply.json())["answers"]
    at = {event["what"]: event["at"] for event in answer["events"]}
    assert slo["breakdown"]["transfer_ms"] == pytest.approx(
        (at["KvPulled"] - at["Prefilled"]) * 1000, abs=2.0
    )


async def test_a_migration_is_told_as_transfer_from_its_stop(special_server, http):
    live = special_server(ApiSettings(slo_classes=CLASSES), profile="h100-8b")
    async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none") as client:
        stream = await ask(client, max_tokens=400, stream=True)
        chunks = await begun(stream)
        first = live.read(lambda node: node.dispatcher.worker_of(RequestId(1)))
        await post(http, f"{live.url}/admin/workers/{first}/park")
        chunks += [chunk async for chunk in stream]
    slo = last(chunks)
    check(slo, 400)
    assert slo["workers"] == [first, 1 - first]
    assert slo["breakdown"]["transfer_ms"] > 0


async def test_after_the_death_of_a_worker_the_parts_still_sum(special_server):
    live = special_server(ApiSettings(slo_classes=CLASSES), profile="h100-8b")
    async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none") as client:
        stream = await ask(client, max_tokens=100, stream=True)
        chunks = await begun(stream)
        first = live.read(lambda node: node.dispatcher.worker_of(RequestId(1)))
        live.read(lambda node: node.workers.kill(first, "for a test"))
        chunks += [chunk async for chunk in stream]
    slo = last(chunks)
    check(slo, 100, died=True)
    assert slo["workers"] == [first, 1 - first]


async def test_the_wait_after_a_death_is_queue(special_server, http):
    live = special_server(ApiSettings(slo_classes=CLASSES), profile="h100-8b", num_workers=1)
    async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none") as client:
        stream = await ask(client, max_tokens=100, stream=True)
        chunks = await begun(stream)
        live.read(lambda node: node.workers.kill(WorkerId(0), "for a test"))
        chunks += [chunk async for chunk in stream]
    slo = last(chunks)
    check(slo, 100, died=True)
    assert slo["workers"] == [0]
    async with http.get(f"{live.url}/admin/requests/{chunks[0].id}") as reply:
        (answer,) = (await reply.json())["answers"]
    told = events_of(answer)
    (down,) = [at for what, at in told if what == "WorkerDown"]
    _, again = [at for what, at in told if what == "Assign"]
    assert again - down > 10.0, "it had to be started again"
    assert slo["breakdown"]["queue_ms"] >= again - down - 0.01


async def test_what_fails_in_part_counts_as_failed_whole(special_server, http):
    live = special_server(ApiSettings(slo_classes=CLASSES), profile=f"fixed-{STEP_MS}ms")
    fail = Cancelled(request_id=RequestId(2), kind=ErrorKind.WORKER_LOST)
    async with openai.AsyncOpenAI(
        base_url=f"{live.url}/v1", api_key="none", max_retries=0
    ) as client:
        stream = await ask(client, max_tokens=500, n=3, stream=True, extra_body={"slo": "easy"})
        await begun(stream)
        live.read(lambda node: node._pump.post("test", fail))
        with pytest.raises(openai.APIError) as caught:
            async for _ in stream:
                pass
    assert caught.value.code == "worker_lost"
    async with asyncio.timeout(20):
        while live.read(lambda node: node.num_open):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    found = await scrape(live, http)
    rows = {
        how: found["appliance_slo_answers_total", (("outcome", how), ("slo_class", "easy"))]
        for how in ("met", "missed", "refused", "failed")
    }
    assert rows == {"met": 0, "missed": 0, "refused": 0, "failed": 3}
    assert found["appliance_slo_attainment_ratio", (("slo_class", "easy"),)] == 0.0


async def test_a_request_that_is_refused_at_the_door_has_a_story_and_is_in_the_audit(
    special_server, http
):
    live = special_server(
        ApiSettings(slo_classes=CLASSES),
        num_workers=1,
        profile=f"fixed-{STEP_MS}ms",
        batcher={"max_num_seqs": 1},
        dispatcher={"queue_ahead": 0, "max_queue": 1},
    )
    body = {"model": "tiny", "prompt": "red", "max_tokens": 500, "stream": True, **EXACT}
    url = f"{live.url}/v1/completions"
    async with http.post(url, json=body) as first, http.post(url, json=body) as second:
        assert (first.status, second.status) == (200, 200)
        refused = {**body, "prompt": ["a", "b"], "n": 2, "slo": "easy"}
        headers = {"x-request-id": "mine"}
        async with http.post(url, json=refused, headers=headers) as reply:
            assert (reply.status, (await reply.json())["error"]["code"]) == (429, "queue_full")
    async with http.get(f"{live.url}/admin/requests/mine") as reply:
        assert reply.status == 200
        (story, *_) = (await reply.json())["answers"]
    assert [what for what, _ in events_of(story)] == ["Arrived", "Reject"]
    found = await scrape(live, http)
    refusals = ("appliance_slo_refusals_total", (("reason", "queue_full"), ("slo_class", "easy")))
    assert found[refusals] == 4, "two answers to each of two prompts"
    async with http.get(live.url + "/admin/decisions") as reply:
        (decision,) = (await reply.json())["decisions"]
    assert (decision["kind"], decision["by"]) == ("turn_away", "mechanism")
    assert decision["trigger"] == "queue_full: 1 requests wait already (queue.max_requests)"


async def test_a_header_that_is_given_twice_is_refused(judged, http):
    body = {"model": "tiny", "prompt": "red", "max_tokens": 1}
    twice = [("x-slo-ttft-ms", "5"), ("x-slo-ttft-ms", "6000")]
    async with http.post(judged.url + "/v1/completions", json=body, headers=twice) as reply:
        assert reply.status == 400
        assert (await reply.json())["error"]["param"] == "x-slo-ttft-ms"


# --- a budget that cannot be met is told ----------------------------------------------------------


class Hopeless:
    """Never places what may be refused, and gives it up a moment later; demotes the patient."""

    def __init__(self) -> None:
        self.known: dict[RequestId, Request] = {}
        self.said: set[RequestId] = set()

    def place(self, view: NodeView, request: Request, phase: Phase, now: float) -> WorkerId | None:
        self.known[request.id] = request
        if request.slo.on_miss == OnMiss.REFUSE:
            return None
        return place_least_work(view, request, phase, now)

    def late(self, view: NodeView, now: float) -> Sequence[Late]:
        del view
        words = "first token: not within 10 ms"
        named = []
        for request in self.known.values():
            if request.id in self.said or request.slo.class_name not in ("picky", "patient"):
                continue
            refuse = request.slo.on_miss == OnMiss.REFUSE
            if refuse and now < request.arrived + 0.05:
                continue
            self.said.add(request.id)
            action = "refuse" if refuse else "demote"
            named.append(Late(id=request.id, action=action, reason=words))  # type: ignore[arg-type]
        return named

    def wakeup(self, view: NodeView, now: float) -> float | None:
        return now + 0.02 if view.num_waiting else None


@pytest.fixture(scope="module")
def hopeless(module_server) -> LiveServer:
    usual, ours = make_policy("fcfs", {}), Hopeless()
    slots = DispatchSlots(
        admit=usual.dispatch.admit,
        order=usual.dispatch.order,
        place=ours.place,
        wakeup=ours.wakeup,
        late=ours.late,
    )
    policy = Policy(name="fcfs", dispatch=slots, batch=usual.batch)
    return module_server(ApiSettings(slo_classes=CLASSES), policy=policy)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_has_its_own_status_streamed_or_not(hopeless, http, stream):
    before = await scrape(hopeless, http)
    async with openai.AsyncOpenAI(
        base_url=f"{hopeless.url}/v1", api_key="none", max_retries=0
    ) as client:
        with pytest.raises(openai.RateLimitError) as caught:
            await ask(client, stream=stream, extra_body={"slo": "picky"})
    assert caught.value.code == "budget_unreachable"
    assert "first token: not within 10 ms" in caught.value.message
    assert int(caught.value.response.headers["retry-after"]) >= 1
    after = await scrape(hopeless, http)
    key = (
        "appliance_slo_refusals_total",
        (("reason", "budget_unreachable"), ("slo_class", "picky")),
    )
    assert after[key] - before.get(key, 0) == 1
    answers = ("appliance_slo_answers_total", (("outcome", "refused"), ("slo_class", "picky")))
    assert after[answers] - before.get(answers, 0) == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("more", [{"n": 2}, {"prompt": ["red", "blue"]}])
async def test_one_of_several_answers_is_never_refused(hopeless, stream, more):
    async with openai.AsyncOpenAI(
        base_url=f"{hopeless.url}/v1", api_key="none", max_retries=0
    ) as client:
        answer = await ask(client, stream=stream, extra_body={"slo": "picky"}, **more)
        if stream:
            chunks = [chunk async for chunk in answer]
            slo, ends = last(chunks), [c.finish_reason for each in chunks for c in each.choices]
        else:
            slo, ends = answer.slo, [choice.finish_reason for choice in answer.choices]
    assert [end for end in ends if end] == ["length", "length"]
    assert (slo["class"], slo["demoted"]) == ("picky", True)


async def test_where_nobody_is_refused_a_stream_begins_at_once(special_server, http):
    live = special_server(
        ApiSettings(slo_classes=CLASSES),
        num_workers=1,
        profile=f"fixed-{STEP_MS}ms",
        batcher={"max_num_seqs": 1},
    )
    url = f"{live.url}/v1/completions"
    body = {"model": "tiny", "prompt": "red", "max_tokens": 300, "stream": True, **EXACT}
    async with (
        http.post(url, json=body) as first,
        http.post(url, json={**body, "slo": "picky"}) as second,
    ):
        assert (first.status, second.status) == (200, 200)
        assert live.read(lambda node: node.num_open) == 2, "the first one is not over"


async def test_a_demotion_is_in_the_verdict_the_metrics_and_the_audit(hopeless, http):
    async with openai.AsyncOpenAI(base_url=f"{hopeless.url}/v1", api_key="none") as client:
        answers = await asyncio.gather(
            *(ask(client, max_tokens=200, extra_body={"slo": "patient"}) for _ in range(2)),
            ask(client, extra_body={"slo": "easy"}),
        )
    assert [answer.slo["demoted"] for answer in answers] == [True, True, False]
    found = await scrape(hopeless, http)
    key = ("appliance_slo_demotions_total", (("reason", "first token"), ("slo_class", "patient")))
    assert found[key] == 2
    async with http.get(hopeless.url + "/admin/decisions") as reply:
        decisions = (await reply.json())["decisions"]
    ours = [each for each in decisions if "(patient)" in each["trigger"]]
    assert [each["kind"] for each in ours] == ["demote", "demote"]
    async with http.get(f"{hopeless.url}/admin/requests/{answers[0].id}") as reply:
        (story,) = (await reply.json())["answers"]
    (told,) = [event for event in story["events"] if event["what"] == "Degrade"]
    assert told["reason"] == "first token: not within 10 ms"
