"""Nothing waits in a circle when prefill and decode workers are both full (R2, R12, R28).

The pools hold little more than one longest sequence, and nearly every request grows to that: so
workers preempt, targets have no room, sources stay full, and what moves is called off again and
again. Every answer must still end, with the tokens that one mixed worker gives.
"""

import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from tests.e2e.conftest import Server
from tests.e2e.moves_kit import MODEL, answers, check_same, linked, moved, settle

pytestmark = [pytest.mark.procs, pytest.mark.timeout(600)]

MAX_MODEL_LEN = 768
SMALL = ("--set", f"model.max_model_len={MAX_MODEL_LEN}", "--set", "batch.max_num_seqs=8")
MEMORY = {"cpu": "2MiB", "paced": "8KiB"}
"""64 blocks of 16 tokens: a longest sequence and a third of one more."""
Serve = Callable[..., Server]


def long_work(count: int) -> list[dict[str, Any]]:
    """Most sequences end at the longest length: short prompts with long answers and the reverse."""
    rng = random.Random(7)
    found = []
    for index in range(count):
        length = rng.choice((30, 250, 500, 700))
        body: dict[str, Any] = {
            "model": MODEL,
            "prompt": [rng.randrange(8, 1000) for _ in range(length)],
            "max_tokens": min(MAX_MODEL_LEN - length, rng.choice((60, 400, 738))),
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "logprobs": 1,
        }
        body |= {"temperature": 0} if index % 2 else {"temperature": 0.9, "seed": index}
        found.append(body)
    return found


def start(serve: Serve, devices: str, *args: str, rules: Any = ()) -> Server:
    kind, _, count = devices.partition(":")
    memory = ("--set", f"kv.memory={MEMORY[kind]}", "--set", "transfer.lease_seconds=2.0")
    env = {"APPLIANCE_FAULTS": json.dumps(rules)} if rules else {}
    number = int(count.partition("@")[0])
    return serve("--devices", devices, *SMALL, *memory, *args, workers=number, env=env)


CASES = [
    ("cpu:2", "prefill,decode", 12),
    ("paced:4@fixed-2ms", "prefill,prefill,prefill,decode", 20),
    ("paced:4@fixed-2ms", "prefill,decode,decode,decode", 20),
    pytest.param("cpu:2", "prefill,decode", 80, marks=pytest.mark.slow),
    pytest.param("cpu:4", "prefill,prefill,decode,decode", 120, marks=pytest.mark.slow),
    pytest.param("paced:2@fixed-2ms", "prefill,decode", 60, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("devices", "roles", "count"), CASES)
async def test_R28_full_prefill_and_full_decode_workers_always_go_on(
    serve: Serve, devices: str, roles: str, count: int
) -> None:
    bodies = long_work(count)
    one = start(serve, devices.replace(devices.partition(":")[2][0], "1", 1))
    expected = await answers(one, bodies)
    one.stop()

    server = start(serve, devices, "--roles", roles, "--validate")
    workers = len(server.state()["workers"])
    await linked(server, workers * (workers - 1))
    check_same(await answers(server, bodies), expected)
    await settle(server)
    state = server.state()
    assert sum(worker["preemptions"] for worker in state["workers"]) > 0, "the pools were not full"
    assert all(worker["deaths"] == 0 for worker in state["workers"])
    assert moved(server)["hand-off done"] + moved(server)["migration done"] > 0


async def test_R28_full_pools_and_a_target_that_dies(serve: Serve) -> None:
    """The source keeps what its dead target was to take, and all of it still ends."""
    bodies = long_work(24)
    one = start(serve, "paced:1@fixed-2ms")
    expected = await answers(one, bodies)
    one.stop()
    rules = [
        {"point": "move.before_pulled", "action": "kill", "worker": 1, "nth": 4, "epoch": 1},
        {"point": "move.after_final", "action": "kill", "worker": 0, "nth": 9, "epoch": 1},
    ]
    roles = ("--roles", "prefill,decode", "--validate")
    server = start(serve, "paced:2@fixed-2ms", *roles, rules=rules)
    await linked(server, 2)
    check_same(await answers(server, bodies), expected)
    await settle(server)
    assert sum(worker["deaths"] for worker in server.state()["workers"]) == 2
