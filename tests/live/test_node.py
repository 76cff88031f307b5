"""A node with real worker processes: requests end to end, cancels, drains, two nodes at once."""

import asyncio
import sys

import pytest

from appliance.core.journal import load, replay
from appliance.core.types import ErrorKind, FinishReason
from appliance.live.journal_file import JournalFile
from appliance.live.records import Rejected
from tests.live.node_kit import Answer, make_settings, running, seeded, settled, submit, until

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
