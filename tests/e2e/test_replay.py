"""The journal of a live run, replayed through a fresh core, gives the same outputs (law 12)."""

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from appliance.core import journal
from appliance.core.dispatcher import Dispatcher
from appliance.core.messages import WorkerDown
from appliance.policy import make_policy

pytestmark = [pytest.mark.procs, pytest.mark.timeout(120)]


async def test_law12_the_journal_of_a_live_run_replays_with_equal_outputs(
    serve: Any, streaming: Any, new_answer: Any, tmp_path: Path
) -> None:
    path = tmp_path / "run.jsonl"
    config = tmp_path / "journal.toml"
    config.write_text(f'[journal]\npath = "{path}"\n')
    server = serve("--config", str(config), "--devices", "paced:2", workers=2)
    answers = [new_answer() for _ in range(12)]
    tasks = []
    for index, answer in enumerate(answers):
        body = {"model": "tiny-tasks", "prompt": f"count {index}", "max_tokens": 60}
        tasks.append(
            asyncio.create_task(streaming(server.url, body | {"ignore_eos": True}, answer))
        )
    await asyncio.gather(*(a.first_token.wait() for a in answers))
    os.kill(server.pid(0), signal.SIGKILL)
    await asyncio.gather(*tasks)
    server.wait_ready(2)
    assert server.stop() == 0

    header, records = journal.load(path.read_bytes().splitlines())

    def fresh(head: journal.JournalHeader) -> Dispatcher:
        slots = make_policy(head.policy, head.settings, roles=head.roles).dispatch
        return Dispatcher(head.config, workers=head.workers, policy=slots)

    assert any(isinstance(record.input, WorkerDown) for record in records)
    assert journal.replay(header, records, make=fresh) == len(records) > 50
