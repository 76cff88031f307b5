"""One message after the other, and a timer that follows the Dispatcher's wishes."""

import asyncio

import pytest

from appliance.core.dispatcher import Dispatcher, DispatcherConfig
from appliance.core.journal import Journal, JournalHeader
from appliance.core.messages import (
    DrainStarted,
    Input,
    Output,
    StartWorker,
    Woke,
    WorkerDown,
)
from appliance.core.types import WorkerId, WorkerSpec
from appliance.live.pump import Pump
from appliance.policy import make_policy

CONFIG = DispatcherConfig(max_model_len=64, respawn_backoff=0.02, quarantine_deaths=3)
WORKERS = (WorkerSpec(id=WorkerId(0), devices=("cpu",)),)


class Recorder:
    """Hands that write everything down; `on_start` may post more."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.pump: Pump | None = None
        self.error: Exception | None = None
        self.failures: list[str] = []
        self.started = asyncio.Event()

    def note(self, message: Input, now: float) -> None:
        self.log.append(type(message).__name__)

    def carry_out(self, output: Output, now: float) -> None:
        self.log.append(f"-> {type(output).__name__}")
        if self.error is not None:
            raise self.error
        if isinstance(output, StartWorker):
            assert self.pump is not None
            if output.epoch < 3:
                down = WorkerDown(worker=output.worker, epoch=output.epoch, cause="test")
                self.pump.post("test", down)
            else:
                self.started.set()

    def settled(self) -> None:
        self.log.append("settled")

    def failed(self, words: str) -> None:
        self.failures.append(words)


def build(hands: Recorder) -> Pump:
    policy = make_policy("fcfs", {})
    dispatcher = Dispatcher(CONFIG, workers=WORKERS, policy=policy.dispatch)
    journal = Journal(JournalHeader(config=CONFIG, workers=WORKERS, policy="fcfs"))
    hands.pump = Pump(dispatcher, journal, hands=hands, clock=asyncio.get_running_loop().time)
    return hands.pump


async def test_what_comes_up_while_handling_waits_its_turn_and_respawns_come_by_timer() -> None:
    hands = Recorder()
    pump = build(hands)
    pump.post("clock", Woke())
    assert hands.log == ["Woke", "-> StartWorker", "WorkerDown", "settled"]
    await asyncio.wait_for(hands.started.wait(), 10)
    respawn = ["Woke", "-> StartWorker", "WorkerDown", "settled"]
    wakes = [line for line in hands.log[4:] if line != "settled"]
    assert wakes[:3] == respawn[:3]
    assert wakes[-2:] == ["Woke", "-> StartWorker"]
    pump.stop()


async def test_messages_wait_while_the_pump_is_held() -> None:
    hands = Recorder()
    pump = build(hands)
    with pump.hold():
        pump.post("api", DrainStarted())
        assert hands.log == []
    pump.post_all("api", [Woke(), Woke()])
    assert hands.log == ["DrainStarted", "Woke", "Woke", "settled"]
    pump.stop()


async def test_a_failure_is_said_once_and_nothing_is_handled_after_it() -> None:
    hands = Recorder()
    hands.error = ValueError("no hands")
    pump = build(hands)
    pump.post("clock", Woke())
    pump.post("clock", Woke())
    assert hands.failures == ["the scheduler failed: no hands"]
    assert hands.log == ["Woke", "-> StartWorker", "settled"]


@pytest.mark.parametrize("stop_first", [True, False])
async def test_a_stopped_pump_is_silent(stop_first: bool) -> None:
    hands = Recorder()
    pump = build(hands)
    if not stop_first:
        pump.post("clock", Woke())
    pump.stop()
    before = list(hands.log)
    pump.post("clock", Woke())
    await asyncio.sleep(0.05)
    assert hands.log == before
