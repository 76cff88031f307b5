"""A node with real worker processes: requests end to end, cancels, drains, two nodes at once."""

import asyncio
import os
import signal
import time
from array import array
from pathlib import Path
from typing import Any

import msgspec
import pytest

from appliance.core.dispatcher import Dispatcher
from appliance.core.journal import JournalHeader, load, replay
from appliance.core.slots import Admission
from appliance.core.types import ErrorKind, FinishReason, Request
from appliance.core.view import NodeView
from appliance.live.journal_file import JournalFile
from appliance.live.records import Encoded, Rejected, Submission, Ticket
from appliance.policy import make_policy
from tests.live.node_kit import Answer, greedy, make_settings, running, seeded, settled, submit

pytestmark = pytest.mark.procs


async def test_requests_are_served_end_to_end() -> None:
    async with running(make_settings()) as node:
        work = [await submit(node, f"repeat {i}", name=f"r{i}", n=1 + i % 2) for i in range(12)]
        await asyncio.gather(*(ticket.done for ticket, _ in work))
        for _, answers in work:
            for answer in answers:
                assert answer.the_end.reason is FinishReason.LENGTH
                assert len(answer.tokens) == answer.the_end.emitted_tokens == 32
        state = await settled(node)
        assert {worker["state"] for worker in state["workers"]} == {"ready"}
        assert sum(worker["tokens"]["decode"] for worker in state["workers"]) >= 31 * 18
        assert state["totals"]["ended"] == {"length": 18}
        assert node.health().ok
        assert node.health().reason == "idle"
        story = node.story("r1")
        assert story is not None
        assert [event["what"] for event in story["answers"][1]["events"]][-1] == "Ended"
        assert node.story("nobody") is None


async def test_a_seed_decides_an_answer_and_choices_differ() -> None:
    async with running(make_settings()) as node:
        ticket, three = await submit(node, "once upon", n=3, sampling=seeded(7))
        again, same = await submit(node, "once upon", n=3, sampling=seeded(7))
        await asyncio.gather(ticket.done, again.done)
        assert [a.tokens for a in three] == [a.tokens for a in same]
        assert len({tuple(a.tokens) for a in three}) == 3


async def test_a_prefix_is_reused_only_under_the_same_salt() -> None:
    prompt = "the same long beginning " * 12
    async with running(make_settings(num_workers=1)) as node:

        async def cached(salt: str) -> int:
            ticket, (answer,) = await submit(node, prompt, salt=salt)
            await ticket.done
            return answer.the_end.cached_tokens

        assert await cached("a") == 0
        assert await cached("a") >= 64
        assert await cached("b") == 0
        encoded = await node.text.encode(prompt, add_special_tokens=True, salt="a")
        assert node.text.name_blocks(encoded.ids, "b").hashes != encoded.hashes


async def test_r3_a_cancel_works_in_every_state_and_frees_everything() -> None:
    settings = make_settings(num_workers=1, max_num_seqs=2, profile="cpu")
    async with running(settings) as node:
        work = [
            await submit(node, f"number {i} " * 30, max_tokens=200, name=f"c{i}") for i in range(12)
        ]
        _, (decoding,) = work[0]
        await decoding.first.wait()
        states = {node.dispatcher.request_state(t.request_ids[0]) for t, _ in work}
        assert {"waiting", "assigned", "decoding"} <= {str(state) for state in states}
        kept = work.pop(1)
        for ticket, _ in work:
            node.cancel(ticket)
            node.cancel(ticket)
        seen = [len(answers[0].tokens) for _, answers in work]
        await asyncio.gather(*(ticket.done for ticket, _ in work))
        assert [len(answers[0].tokens) for _, answers in work] == seen
        assert {answers[0].the_end.error for _, answers in work} == {ErrorKind.CANCELLED}
        await kept[0].done
        assert kept[1][0].the_end.reason is FinishReason.LENGTH
        node.cancel(kept[0])
        await settled(node)


async def test_a_cancel_while_no_worker_is_up_ends_at_once() -> None:
    async with running(make_settings(num_workers=1), ready=0) as node:
        ticket, (answer,) = await submit(node, "too early")
        node.cancel(ticket, ErrorKind.SLOW_READER)
        assert ticket.done.done()
        assert answer.the_end.error is ErrorKind.SLOW_READER


async def abort_storm(num_requests: int) -> None:
    """Cancel that many requests at all moments of their lives; nothing may leak (R2, R3)."""
    async with running(make_settings(num_blocks=512)) as node:
        open_work: list[tuple[int, Ticket, list[Answer]]] = []
        for index in range(num_requests):
            ticket, answers = await submit(
                node, f"storm {index % 7} " * (1 + index % 20), n=1 + index % 2, max_tokens=64
            )
            open_work.append((index, ticket, answers))
            if index % 3 == 0:
                await asyncio.sleep(0.001 * (index % 5))
            if index % 2:
                _, victim, _ = open_work[(index * 7919) % len(open_work)]
                node.cancel(victim)
        for index, ticket, _ in open_work:
            if index % 4:
                node.cancel(ticket)
        await asyncio.gather(*(ticket.done for _, ticket, _ in open_work))
        state = await settled(node)
        for worker in state["workers"]:
            assert worker["blocks"]["free"] == worker["blocks"]["total"] > 0
            assert worker["blocks"]["held"] == worker["blocks"]["leased"] == 0
            assert worker["deaths"] == 0
        ends = [answer.the_end for _, _, answers in open_work for answer in answers]
        assert {end.error for end in ends} <= {None, ErrorKind.CANCELLED}
        assert any(end.error for end in ends)


async def test_r2_an_abort_storm_leaks_nothing() -> None:
    await abort_storm(150)


@pytest.mark.slow
async def test_r2_an_abort_storm_of_a_thousand_leaks_nothing() -> None:
    await abort_storm(1000)


async def test_a_sink_that_fails_ends_alone() -> None:
    async with running(make_settings(num_workers=1)) as node:
        bad_ticket, (bad,) = await submit(node, "bad", max_tokens=40)

        def fail() -> None:
            raise OSError("the other side has gone")

        bad.on_push = fail  # before anything else is awaited: no token has come yet
        good_ticket, (good,) = await submit(node, "good", max_tokens=40)
        await asyncio.gather(bad_ticket.done, good_ticket.done)
        assert bad.the_end.error is ErrorKind.INTERNAL
        assert len(bad.tokens) == 1
        assert good.the_end.reason is FinishReason.LENGTH
        await settled(node)


async def test_r15_a_sink_may_give_up_in_the_middle_of_a_frame() -> None:
    async with running(make_settings(num_workers=1)) as node:
        slow_ticket, (slow,) = await submit(node, "slow reader", max_tokens=50)
        slow.on_push = lambda: node.cancel(slow_ticket, ErrorKind.SLOW_READER)
        work = [await submit(node, f"reader {i}", max_tokens=50) for i in range(5)]
        work.insert(2, (slow_ticket, [slow]))
        await asyncio.gather(*(ticket.done for ticket, _ in work))
        assert slow.the_end.error is ErrorKind.SLOW_READER
        assert len(slow.tokens) == 1
        others = [answers[0] for ticket, answers in work if ticket is not slow_ticket]
        assert {answer.the_end.reason for answer in others} == {FinishReason.LENGTH}
        await settled(node)


async def test_r16_a_full_queue_refuses_and_leaves_nothing_of_a_half_accepted_group() -> None:
    settings = make_settings(num_workers=1)
    dispatcher = msgspec.structs.replace(settings.dispatcher, max_queue=3)
    settings = msgspec.structs.replace(settings, dispatcher=dispatcher)
    async with running(settings, ready=0) as node:
        ticket, _ = await submit(node, "first", n=2)
        with pytest.raises(Rejected) as refusal:
            await submit(node, "second", n=2, name="second")
        assert refusal.value.kind is ErrorKind.QUEUE_FULL
        assert refusal.value.retry_after is not None
        assert node.num_open == node.dispatcher.num_live == 2
        assert node.state()["totals"]["rejected"] == {"queue_full": 1}
        assert node.stats.refused == {("default", "queue_full"): 2}
        story = node.story("second")
        assert story is not None
        told = [[event["what"] for event in answer["events"]] for answer in story["answers"]]
        assert told == [["Arrived", "Cancelled", "Ended"], ["Arrived", "Reject"]]
        await ticket.done


async def test_a_prompt_without_room_for_an_answer_is_refused() -> None:
    async with running(make_settings(num_workers=1, max_model_len=64), ready=0) as node:
        prompt = await node.text.encode("word " * 70, add_special_tokens=True)
        assert len(prompt.ids) >= 64
        with pytest.raises(Rejected) as refusal:
            await submit(node, "word " * 70)
        assert refusal.value.kind is ErrorKind.TOO_LONG


async def test_r17_a_drain_finishes_what_was_accepted_and_refuses_the_rest() -> None:
    async with running(make_settings(num_workers=1, max_num_seqs=2)) as node:
        work = [await submit(node, f"queued {i}", max_tokens=40) for i in range(8)]
        draining = asyncio.create_task(node.drain(20))
        await asyncio.sleep(0)
        assert node.ready()[0] is False
        with pytest.raises(Rejected) as refusal:
            await submit(node, "too late")
        assert refusal.value.kind is ErrorKind.DRAINING
        assert await draining
        assert {answers[0].the_end.reason for _, answers in work} == {FinishReason.LENGTH}


async def test_r17_a_drain_that_takes_too_long_ends_the_rest_with_a_typed_error() -> None:
    async with running(make_settings(num_workers=1, max_num_seqs=2)) as node:
        work = [await submit(node, f"endless {i}", max_tokens=1500) for i in range(6)]
        await work[0][1][0].first.wait()
        assert not await node.drain(0.1)
        assert all(ticket.done.done() for ticket, _ in work)
        assert {answers[0].the_end.error for _, answers in work} == {ErrorKind.DRAIN_TIMEOUT}


async def test_closing_a_busy_node_ends_every_answer() -> None:
    async with running(make_settings(num_workers=1)) as node:
        ticket, (answer,) = await submit(node, "cut off", max_tokens=1500)
        await answer.first.wait()
    assert ticket.done.done()
    assert answer.the_end.error is ErrorKind.DRAIN_TIMEOUT
    spec = Submission(
        name="late", prompt=Encoded(ids=array("i", [5])), sampling=greedy(), max_tokens=1
    )
    with pytest.raises(Rejected, match="shutting down"):
        node.submit(spec, [Answer(), Answer()])
    assert node.stats.refused == {("default", "draining"): 2}
    assert node.stats.rejected == {"draining": 1}


async def test_budgets_are_counted_from_the_arrival_of_the_request() -> None:
    fcfs = make_policy("fcfs", {})
    arrivals: list[float] = []

    def admit(view: NodeView, request: Request, now: float) -> Admission:
        arrivals.append(request.arrived)
        return fcfs.dispatch.admit(view, request, now)

    slots = msgspec.structs.replace(fcfs.dispatch, admit=admit)
    policy = msgspec.structs.replace(fcfs, dispatch=slots)
    async with running(make_settings(num_workers=1), policy=policy, ready=0) as node:
        before = time.monotonic()
        for arrived in (before - 3.0, None, before + 1000.0):
            spec = Submission(
                name="early",
                prompt=Encoded(ids=array("i", [5])),
                sampling=greedy(),
                max_tokens=1,
                arrived=arrived,
            )
            node.submit(spec, [Answer()])
        assert arrivals[0] == before - 3.0
        assert all(before <= each <= time.monotonic() for each in arrivals[1:])


async def test_two_nodes_on_one_machine_do_not_collide() -> None:
    async with running(make_settings()) as one, running(make_settings()) as two:
        work = [await submit(node, "same prompt") for node in (one, two)]
        await asyncio.gather(*(ticket.done for ticket, _ in work))
        (first,), (second,) = (answers for _, answers in work)
        assert first.tokens == second.tokens
        pids = {w["pid"] for node in (one, two) for w in node.state()["workers"]}
        assert len(pids) == 4


async def test_law_12_the_journal_of_a_live_run_replays(tmp_path: Path) -> None:
    file = JournalFile(tmp_path / "journal.jsonl")
    settings = make_settings()
    async with running(settings, journal_file=file) as node:
        work = [await submit(node, f"journal {i}", n=1 + i % 2) for i in range(10)]
        node.cancel(work[3][0])
        await work[0][1][0].first.wait()
        os.kill(node.state()["workers"][0]["pid"], signal.SIGKILL)
        await asyncio.gather(*(ticket.done for ticket, _ in work))
        await node.wait_ready(2)

    def make(header: JournalHeader) -> Dispatcher:
        policy = make_policy(header.policy, header.settings, roles=header.roles)
        return Dispatcher(header.config, workers=header.workers, policy=policy.dispatch)

    header, records = load((tmp_path / "journal.jsonl").read_bytes().splitlines())
    assert file.dropped == 0
    assert replay(header, records, make=make) == len(records) > 20


async def test_the_timeline_of_a_start_names_its_milestones() -> None:
    async with running(make_settings(num_workers=1)) as node:
        words = [words for _, words in node.timeline]
        assert words[0] == "imports done"
        assert words[-1] == "worker 0: ready, role mixed"
        times = [at for at, _ in node.timeline]
        assert times == sorted(times)


async def test_r1_a_scheduler_that_fails_ends_everything_loudly_and_serves_nothing_more() -> None:
    policy = make_policy("fcfs", {})

    def admit(*args: Any) -> Admission:
        if node.num_open == 2:
            raise ZeroDivisionError("a defect")
        return policy.dispatch.admit(*args)

    slots = msgspec.structs.replace(policy.dispatch, admit=admit)
    async with running(
        make_settings(num_workers=1), policy=msgspec.structs.replace(policy, dispatch=slots)
    ) as node:
        one, (first,) = await submit(node, "one")
        two, (second,) = await submit(node, "two")
        assert one.done.done()
        assert two.done.done()
        assert {first.the_end.error, second.the_end.error} == {ErrorKind.INTERNAL}
        assert not node.health().ok
        assert node.ready() == (False, "the scheduler failed: a defect")
        assert node.failure is not None
        assert await node.failure == "the scheduler failed: a defect"
        assert node.stats.failed == {("default", "internal_error"): 2}
        with pytest.raises(Rejected, match="a defect"):
            await submit(node, "three")
        assert node.stats.refused == {("default", "internal_error"): 1}
