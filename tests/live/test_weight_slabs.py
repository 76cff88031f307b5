"""Who fills which slab of weights, and who is offered whose (R6, R20)."""

import asyncio
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from appliance.core.faults import FaultRule
from appliance.core.messages import WeightsLoaded
from appliance.core.types import FinishReason, WorkerId
from appliance.live.node import Node, StartFailed
from appliance.live.settings import NodeSettings
from appliance.live.spawner import Spawner
from appliance.live.weight_slabs import HOST, Grant, WeightSettings, WeightSlabs
from tests.live.node_kit import PRELOAD, make_settings, running, settled, submit, until

ONE, TWO, THREE, FOUR = (WorkerId(number) for number in range(1, 5))


class Shelf:
    """A node of slabs with a word about how much work each worker has."""

    def __init__(self, **settings: Any) -> None:
        self.work: dict[int, float] = {}
        self.slabs = WeightSlabs(
            8192, settings=WeightSettings(**settings), busy=lambda worker: self.work.get(worker, 0)
        )

    def start(self, worker: WorkerId) -> Grant:
        grant = self.slabs.grant(worker)
        self.slabs.started(worker, grant)
        return grant

    def loaded(self, worker: WorkerId, fingerprint: str = "f") -> bool:
        report = WeightsLoaded(worker=worker, source="x", seconds=0.1, fingerprint=fingerprint)
        return self.slabs.loaded(worker, report)

    def up(self, *workers: WorkerId) -> None:
        for worker in workers:
            self.start(worker)
            self.loaded(worker)


@pytest.fixture
def copying() -> Iterator[Shelf]:
    node = Shelf(share="copy", threads=2, full_check=True)
    yield node
    node.slabs.close()


def test_mapped_weights_are_one_slab_that_the_first_worker_fills() -> None:
    node = Shelf()
    first = node.start(ONE)
    assert (first.load, len(first.fds), first.plan.own) == (True, 1, False)
    assert node.slabs.is_loading
    assert node.loaded(ONE)
    assert not node.slabs.is_loading
    second = node.start(TWO)
    assert (second.load, second.fds, second.plan.sources) == (False, first.fds, ())
    assert second.plan.fingerprint == "f"
    assert not node.loaded(TWO)
    node.slabs.close()


def test_an_engine_without_weights_gets_no_slab() -> None:
    slabs = WeightSlabs(0, settings=WeightSettings(share="copy"), busy=lambda _: 0)
    grant = slabs.grant(ONE)
    assert (grant.fds, grant.load, slabs.is_loading) == ((), False, False)
    slabs.close()


def test_copied_weights_come_from_peers_then_the_node(copying: Shelf) -> None:
    first = copying.start(ONE)
    assert (first.load, first.plan.sources) == (True, (HOST,))
    assert len(first.fds) == 2
    assert (first.plan.own, first.plan.threads, first.plan.full_check) == (True, 2, True)
    copying.loaded(ONE)
    second = copying.start(TWO)
    assert (second.load, second.plan.sources) == (False, ("peer:1", HOST))
    assert second.fds[1:] == (first.fds[0], first.fds[1])
    assert second.fds[0] not in first.fds


def test_the_least_loaded_peer_is_the_first_source(copying: Shelf) -> None:
    copying.up(ONE, TWO, THREE)
    copying.work = {ONE: 5, TWO: 1, THREE: 3}
    assert copying.start(FOUR).plan.sources == ("peer:2", "peer:3", HOST)
    copying.slabs.died(FOUR, confirmed=True)
    copying.work = {}
    assert copying.start(FOUR).plan.sources == ("peer:1", "peer:2", HOST)
    fifth = copying.start(WorkerId(5))
    assert fifth.plan.sources == ("peer:2", "peer:3", HOST)  # peer 1 is being read from
    copying.loaded(FOUR)
    copying.work = {ONE: 1, TWO: 1, THREE: 1}
    assert copying.start(WorkerId(6)).plan.sources[0] == "peer:4"  # who received is a source


def test_r6_a_slab_outlives_its_worker_unless_the_worker_may_live_on(copying: Shelf) -> None:
    copying.up(ONE)
    second = copying.start(TWO)
    copying.loaded(TWO)
    copying.slabs.died(TWO, confirmed=True)
    assert copying.start(TWO).fds[0] == second.fds[0]
    assert copying.start(THREE).plan.sources[0] == "peer:1"
    inodes = {os.fstat(second.fds[0]).st_ino}
    copying.slabs.died(TWO, confirmed=False)
    assert "peer:2" not in copying.start(FOUR).plan.sources
    assert os.fstat(copying.start(TWO).fds[0]).st_ino not in inodes


def test_r6_who_dies_while_receiving_is_no_source(copying: Shelf) -> None:
    copying.up(ONE)
    copying.start(TWO)
    copying.slabs.died(TWO, confirmed=True)
    assert copying.start(THREE).plan.sources == ("peer:1", HOST)


def test_r6_when_the_loader_dies_the_next_worker_loads_into_a_fresh_slab(copying: Shelf) -> None:
    first = copying.start(ONE)
    inode = os.fstat(first.fds[1]).st_ino
    assert copying.slabs.died(ONE, confirmed=True)
    again = copying.start(TWO)
    assert again.load
    assert os.fstat(again.fds[1]).st_ino != inode


# --- real workers ---------------------------------------------------------------------------------


def copy_settings(**more: Any) -> NodeSettings:
    settings = make_settings(engine="torch", num_blocks=160, **more)
    weights = WeightSettings(share="copy", threads=2, full_check=True)
    return msgspec.structs.replace(
        settings, pool=msgspec.structs.replace(settings.pool, weights=weights), validate=False
    )


def sources(node: Node) -> list[str]:
    return [stats.weights_source for stats in node.stats.workers.values()]


async def answer(node: Node) -> list[int]:
    ticket, (got,) = await submit(node, "spell ocean", max_tokens=16)
    await ticket.done
    await settled(node)
    assert got.the_end.reason is FinishReason.LENGTH
    return got.tokens


@pytest.mark.procs
async def test_r6_workers_copy_from_a_peer_and_successors_find_their_slab() -> None:
    async with running(copy_settings(num_workers=3)) as node:
        found = sources(node)
        assert found[0] == "disk through host"
        assert all(source in ("peer:0", "peer:1", "peer:2") for source in found[1:])
        before = await answer(node)
        life = node.workers.living[ONE]
        assert life.pid is not None
        os.kill(life.pid, signal.SIGKILL)
        await until(lambda: node.stats.workers[ONE].deaths == 1)
        await node.wait_ready(3)
        assert sources(node)[1] == "slab"
        assert await answer(node) == before


@pytest.mark.procs
async def test_r6_a_worker_killed_while_it_copies_is_replaced_and_copies_again() -> None:
    rule = FaultRule(point="worker.weights.copy", action="kill", worker=ONE, epoch=1)
    async with running(copy_settings(faults=[rule])) as node:
        assert node.stats.workers[ONE].deaths == 1
        assert sources(node) == ["disk through host", "peer:0"]
        await answer(node)


class CuttingSpawner(Spawner):
    """Cuts the checkpoint short after the node has looked at it, before a worker reads it."""

    def __init__(self, file: Path) -> None:
        super().__init__(PRELOAD["torch"])
        self._file = file

    def attach(self, loop: asyncio.AbstractEventLoop, on_ready: Callable[[], None]) -> None:
        os.truncate(self._file, self._file.stat().st_size // 2)
        super().attach(loop, on_ready)


@pytest.mark.procs
async def test_r20_a_checkpoint_cut_short_ends_the_start_with_file_and_fix(
    tmp_path: Path, tiny_model: Path
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    spawner = CuttingSpawner(model / "model.safetensors")
    settings = msgspec.structs.replace(copy_settings(num_workers=1), model_dir=str(model))
    with pytest.raises(StartFailed) as caught:
        async with running(settings, spawner=spawner):
            pass
    last = str(caught.value).splitlines()[-1]
    assert "model.safetensors: truncated" in last
    assert "fetch it again" in last
