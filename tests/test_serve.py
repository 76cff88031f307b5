"""How serving ends: by a signal, or by a node that serves nothing any more."""

import asyncio
import re
import signal
from types import SimpleNamespace
from typing import Any

import pytest

from appliance.listening import CannotServe
from appliance.policy import make_policy
from appliance.serve import _until_over
from tests.live.node_kit import make_settings, running

pytestmark = pytest.mark.procs


async def test_R1_a_failed_node_ends_the_server_with_its_words() -> None:
    async with running(make_settings(num_workers=1), policy=make_policy("fcfs", {})) as node:
        signals: Any = SimpleNamespace(first=asyncio.get_running_loop().create_future())
        serving = asyncio.create_task(_until_over(node, signals))
        await asyncio.sleep(0)
        node.failed("the scheduler broke law 1; the journal has the story")
        with pytest.raises(CannotServe, match=re.escape("the scheduler broke law 1")):
            await serving


async def test_a_signal_ends_serving_in_order() -> None:
    async with running(make_settings(num_workers=1)) as node:
        signals: Any = SimpleNamespace(first=asyncio.get_running_loop().create_future())
        serving = asyncio.create_task(_until_over(node, signals))
        signals.first.set_result(signal.SIGTERM)
        await serving
