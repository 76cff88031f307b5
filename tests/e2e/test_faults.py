"""Workers die, stop and are poisoned while clients stream (R1, R4, R5, R6, R7, R27)."""

import asyncio
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from appliance.core.dispatcher import Dispatcher
from appliance.core.journal import load
from appliance.core.messages import Assign
from appliance.policy import make_policy

pytestmark = [pytest.mark.procs, pytest.mark.timeout(240)]


def bodies(count: int, tokens: int) -> list[dict[str, Any]]:
    """Greedy and seeded completions with prompts of different lengths."""
    found = []
    for index in range(count):
        words = " ".join(f"word{index * 7 + k}" for k in range(5 + 9 * index))
        body: dict[str, Any] = {"model": "tiny-tasks", "prompt": words, "max_tokens": tokens}
        body |= {"ignore_eos": True}
        body |= {"temperature": 0} if index % 2 else {"temperature": 0.9, "seed": index}
        found.append(body)
    return found


async def disturbed(server: Any, streaming: Any, new_answer: Any, work: Any, hit: Any) -> Any:
    """Stream all of `work`; call `hit` once every stream has its first text."""
    answers = [new_answer() for _ in work]
    tasks = [
        asyncio.create_task(streaming(server.url, body, answer))
        for body, answer in zip(work, answers, strict=True)
    ]
    await asyncio.gather(*(answer.first_token.wait() for answer in answers[: len(work) // 2]))
    hit()
    await asyncio.gather(*tasks)
    return answers


def check_same(answers: Any, expected: Any) -> None:
    for answer, reference in zip(answers, expected, strict=True):
        assert answer.error is None
        assert answer.terminal_events == 1
        assert answer.done
        assert answer.finish == ["length"]
        assert answer.text == reference.text


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV])
@pytest.mark.parametrize("devices", ["cpu:2", "paced:4"])
async def test_R4_R5_a_lost_worker_costs_no_stream_a_token(
    serve: Any, streaming: Any, new_answer: Any, devices: str, sign: signal.Signals
) -> None:
    if sign == signal.SIGSEGV and devices == "cpu:2":
        pytest.skip("the same end-of-file path as SIGKILL; covered by paced:4")
    count = int(devices.split(":")[1])
    server = serve("--devices", devices, workers=count)
    work = bodies(16, 48)
    expected = await asyncio.gather(*(streaming(server.url, body) for body in work))
    victim = server.pid(1)

    answers = await disturbed(server, streaming, new_answer, work, lambda: os.kill(victim, sign))

    check_same(answers, expected)
    server.wait_ready(count, 30)  # R6: the successor has rejoined
    assert server.pid(1) != victim
    blocks = [worker["blocks"] for worker in server.state()["workers"]]
    assert all(b["free"] == b["total"] for b in blocks)
    again = await asyncio.gather(*(streaming(server.url, body) for body in work))
    check_same(again, expected)


async def test_R4_a_death_is_noticed_within_a_second(serve: Any) -> None:
    server = serve("--devices", "paced:2", workers=2)
    for sign in (signal.SIGKILL, signal.SIGSTOP):
        victim = server.pid(0)
        os.kill(victim, sign)
        begun = time.monotonic()
        while server.state()["workers"][0]["pid"] == victim:
            assert time.monotonic() - begun < 5, "the dead worker is still listed"
            await asyncio.sleep(0.02)
        server.wait_ready(2, 30)


async def test_R27_one_poison_request_fails_alone(serve: Any, streaming: Any) -> None:
    rules = [{"point": "worker.before_step", "action": "kill", "token": 1000, "repeat": True}]
    env = {"APPLIANCE_FAULTS": json.dumps(rules)}
    server = serve("--devices", "paced:4", workers=4, env=env)
    work = bodies(63, 24)
    poison = {
        "model": "tiny-tasks",
        "prompt": [5, 6, 1000, 7],
        "max_tokens": 24,
        "ignore_eos": True,
    }
    work.insert(31, poison)

    answers = await asyncio.gather(*(streaming(server.url, body) for body in work))

    failed = [index for index, answer in enumerate(answers) if answer.error is not None]
    assert failed == [31]
    assert answers[31].error["code"] == "poison_request"
    assert all(answer.terminal_events == 1 for answer in answers)
    states = [worker["state"] for worker in server.state()["workers"]]
    assert states.count("ready") + states.count("starting") >= 3
    server.wait_ready(3, 30)
    fine = await streaming(server.url, work[0])
    assert fine.text == answers[0].text


async def test_R7_killing_the_server_ends_its_workers(serve: Any, streaming: Any) -> None:
    server = serve("--devices", "cpu:2", workers=2)
    task = asyncio.create_task(streaming(server.url, bodies(1, 2000)[0]))
    await asyncio.sleep(0.5)
    os.kill(server.pid(1), signal.SIGSTOP)
    server.note_processes()
    server.process.kill()
    server.process.wait()
    server.wait_gone(2)
    with pytest.raises(Exception, match=r"."):  # the connection broke in mid-answer
        await task


async def test_R6_a_worker_that_cannot_start_is_quarantined_and_the_service_stays(
    serve: Any, streaming: Any
) -> None:
    rules = [{"point": "worker.start", "action": "exit", "worker": 1, "repeat": True}]
    server = serve("--devices", "paced:3", workers=2, env={"APPLIANCE_FAULTS": json.dumps(rules)})
    end = time.monotonic() + 60
    while server.state()["workers"][1]["state"] != "quarantined":
        assert time.monotonic() < end, server.state()
        await asyncio.sleep(0.1)
    answer = await streaming(server.url, bodies(1, 8)[0])
    assert answer.finish == ["length"]


def tried_to_the_end(journal: Path) -> tuple[int, list[int]]:
    """How many trials the node that wrote this journal began, and which requests completed their
    answers while they were on trial."""
    header, records = load(journal.read_bytes().splitlines())
    policy = make_policy(header.policy, header.settings, roles=header.roles)
    twin = Dispatcher(header.config, workers=header.workers, policy=policy.dispatch)
    trials, ended = 0, []
    for entry in records:
        over = [end.id for end in getattr(entry.input, "finished", ())]
        ended += [id_ for id_ in over if twin.is_on_trial(id_)]
        said = twin.handle(entry.input, entry.now)
        assert said == entry.outputs
        placed = [output.request.id for output in said if isinstance(output, Assign)]
        trials += sum(twin.is_on_trial(id_) for id_ in placed)
    return trials, ended


@pytest.mark.parametrize("pause", [0.0, 1.0])
async def test_R5_R27_two_deaths_leave_nobody_alone_to_the_end_of_an_answer(
    serve: Any, streaming: Any, new_answer: Any, tmp_path: Path, pause: float
) -> None:
    journal = tmp_path / "journal"
    server = serve("--devices", "paced:4", "--set", f"journal.path={journal}", workers=4)
    work = bodies(16, 300)
    expected = await asyncio.gather(*(streaming(server.url, body) for body in work))
    victims = [server.pid(worker) for worker in (0, 1)]

    def hit() -> None:
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
            time.sleep(pause)

    answers = await disturbed(server, streaming, new_answer, work, hit)
    check_same(answers, expected)
    server.stop()

    trials, ended = tried_to_the_end(journal)
    assert ended == []
    assert trials <= len(work)
