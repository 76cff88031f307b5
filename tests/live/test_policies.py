"""Each policy serves through a whole node: real worker processes that got its name at their start,
moves between them, and the laws checked after every message."""

import asyncio
from typing import Any

import pytest

from appliance.core.types import OnMiss, Role, Slo, WorkerId, WorkerSpec
from appliance.live.records import Submission
from appliance.policy import POLICIES
from tests.live.node_kit import Answer, greedy, make_settings, running, settled

SLOS = (
    Slo(class_name="completion", ttft=0.5, tpot=0.05, weight=2.0),
    Slo(class_name="chat", ttft=1.0, tpot=0.05),
    Slo(class_name="summary", e2e=60.0),
    Slo(class_name="batch", weight=0.2),
    Slo(class_name="hopeless", ttft=1e-6, on_miss=OnMiss.SERVE),
)


@pytest.mark.procs
@pytest.mark.parametrize("roles", ["mixed", "divided"])
@pytest.mark.parametrize("name", sorted(POLICIES))
async def test_every_policy_serves_all_classes_to_the_end(name: str, roles: str) -> None:
    changes: dict[str, Any] = {"policy": name, "profile": "fixed-5ms"}
    if roles == "divided":
        changes["workers"] = tuple(
            WorkerSpec(id=WorkerId(index), devices=(f"paced:{index}",), role=role)
            for index, role in enumerate((Role.PREFILL, Role.DECODE))
        )
    async with running(make_settings(max_num_seqs=4, **changes)) as node:
        assert node.info.policy == name == node.state()["policy"]
        answers, done = [], []
        for number in range(20):
            prompt = await node.text.encode("Spell ocean. " * (1 + number), add_special_tokens=True)
            spec = Submission(
                name=f"{number}",
                prompt=prompt,
                sampling=greedy(),
                max_tokens=5 + number,
                slo=SLOS[number % len(SLOS)],
                priority=number % 3 - 1,
            )
            answers.append(Answer())
            done.append(node.submit(spec, answers[-1:]).done)
        async with asyncio.timeout(60):
            await asyncio.gather(*done)
        assert [each.the_end.error for each in answers] == [None] * len(answers)
        assert [len(each.tokens) for each in answers] == [5 + n for n in range(len(answers))]
        state = await settled(node)
        assert state["totals"]["ended"] == {"length": len(answers)}
