"""A real node with real worker processes, for tests: paced workers unless told otherwise."""

import asyncio
import os
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from appliance.core.dispatcher import DispatcherConfig
from appliance.core.faults import FaultRule
from appliance.core.model_shape import slab_bytes
from appliance.core.payload import Sampling
from appliance.core.profiles import KV_SLOT_BYTES
from appliance.core.slots import Policy
from appliance.core.types import BatcherConfig, WorkerId, WorkerSpec
from appliance.live.checkpoint import open_checkpoint
from appliance.live.journal_file import JournalFile
from appliance.live.node import Node
from appliance.live.records import Delta, End, Submission, Ticket
from appliance.live.settings import NodeSettings
from appliance.live.spawner import Spawner
from appliance.live.tokenise import TextService, TextSettings
from appliance.live.workers import PoolPlan
from appliance.policy import make_policy

MODEL = Path(__file__).parents[2] / "models" / "tiny-tasks"
ENTRY = "appliance.worker.main:run"
BLOCK_TOKENS = 16
PRELOAD = {
    "paced": ("appliance.worker.main",),
    "torch": ("appliance.worker.main", "appliance.worker.torch_engine"),
}


class Answer:
    """A sink that keeps everything and insists on exactly one end, after everything else (R1)."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self.ends: list[End] = []
        self.on_push: Callable[[], None] | None = None
        self.first = asyncio.Event()

    def push(self, delta: Delta) -> None:
        assert not self.ends, "text after the end"
        self.tokens += delta.tokens
        self.text += delta.text
        self.first.set()
        if self.on_push is not None:
            self.on_push()

    def end(self, end: End) -> None:
        assert not self.ends, "a second end"
        self.ends.append(end)
        self.first.set()

    @property
    def the_end(self) -> End:
        (end,) = self.ends
        return end


def make_settings(
    *,
    num_workers: int = 2,
    engine: str = "paced",
    profile: str = "cpu",
    num_blocks: int = 1024,
    max_model_len: int = 2048,
    max_num_seqs: int = 32,
    entry: str = ENTRY,
    faults: Sequence[FaultRule] = (),
    **more: Any,
) -> NodeSettings:
    """Settings of a node that checks the laws, with quick respawns and a quick watch."""
    checkpoint = open_checkpoint(MODEL)
    torch = engine == "torch"
    block_bytes = (
        checkpoint.shape.kv_block_bytes("float32", block_tokens=BLOCK_TOKENS)
        if torch
        else KV_SLOT_BYTES * BLOCK_TOKENS
    )
    weight_bytes = slab_bytes(checkpoint.shape, "float32") if torch else 0
    settings = NodeSettings(
        model="tiny",
        version="test",
        fingerprint=checkpoint.fingerprint,
        model_dir=str(MODEL),
        dtype="float32",
        eos_token_ids=checkpoint.eos_ids,
        workers=tuple(
            WorkerSpec(id=WorkerId(index), devices=("cpu" if torch else f"paced:{index}",))
            for index in range(num_workers)
        ),
        engine=engine,
        pool=PoolPlan(
            entry=entry,
            weight_bytes=weight_bytes,
            num_blocks=num_blocks,
            block_bytes=block_bytes,
        ),
        batcher=BatcherConfig(
            max_model_len=max_model_len, max_num_seqs=max_num_seqs, max_batch_tokens=256
        ),
        block_tokens=BLOCK_TOKENS,
        num_blocks=num_blocks,
        dispatcher=DispatcherConfig(
            max_model_len=max_model_len, respawn_backoff=0.05, block_bytes=block_bytes
        ),
        profile=profile,
        faults=tuple(faults),
        validate=True,
    )
    return msgspec.structs.replace(settings, **more)


def make_text(settings: NodeSettings, *, hash_key: bytes | None = None) -> TextService:
    """The text service of a node with these settings."""
    return TextService(
        Path(settings.model_dir),
        TextSettings(
            max_model_len=settings.batcher.max_model_len,
            vocab_size=open_checkpoint(Path(settings.model_dir)).shape.vocab_size,
            block_tokens=settings.block_tokens,
            hash_key=hash_key or os.urandom(16),
            prefix_cache=settings.batcher.enable_prefix_cache,
        ),
    )


@asynccontextmanager
async def running(
    settings: NodeSettings,
    *,
    ready: int | None = None,
    journal_file: JournalFile | None = None,
    spawner: Spawner | None = None,
    policy: Policy | None = None,
    stderr: Callable[[str], object] | None = None,
) -> AsyncIterator[Node]:
    """A started node with `ready` workers up (default: all), closed at the end."""
    lines: list[str] = []
    node = Node(
        settings,
        make_text(settings),
        policy=policy
        or make_policy(settings.policy, settings.policy_settings, roles=settings.role_settings),
        spawner=spawner or Spawner(PRELOAD[settings.engine]),
        stderr=stderr or lines.append,
        journal_file=journal_file,
    )
    node.start()
    try:
        async with asyncio.timeout(60):
            await node.wait_ready(len(settings.workers) if ready is None else ready)
        yield node
        assert not node.broken or policy is not None
    finally:
        await node.close()


async def submit(
    node: Node,
    prompt: str | Sequence[int],
    *,
    n: int = 1,
    max_tokens: int = 32,
    name: str = "test",
    salt: str = "",
    sampling: Sampling | None = None,
) -> tuple[Ticket, list[Answer]]:
    """Submit one request; its ticket and its `n` answers."""
    if isinstance(prompt, str):
        encoded = await node.text.encode(prompt, add_special_tokens=True, salt=salt)
    else:
        encoded = await node.text.encode_ids(array("i", prompt), salt=salt)
    answers = [Answer() for _ in range(n)]
    spec = Submission(
        name=name,
        prompt=encoded,
        sampling=sampling or greedy(),
        max_tokens=max_tokens,
        salt=salt,
    )
    return node.submit(spec, answers), answers


def greedy(**more: Any) -> Sampling:
    """Greedy sampling to `max_tokens`."""
    return Sampling(temperature=0.0, ignore_eos=True, **more)


def seeded(seed: int) -> Sampling:
    """Sampling with a seed, to `max_tokens`."""
    return Sampling(temperature=1.0, seed=seed, ignore_eos=True)


async def settled(node: Node, seconds: float = 10.0) -> dict[str, Any]:
    """The state once no request lives and every ready worker's ledger is free again."""

    def leaked(state: dict[str, Any]) -> list[Any]:
        return [
            worker
            for worker in state["workers"]
            if worker["state"] == "ready"
            and (worker["blocks"]["free"] != worker["blocks"]["total"] or worker["running"])
        ]

    async with asyncio.timeout(seconds):
        while (state := node.state())["totals"]["live"] or leaked(state):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return state


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for something to become true."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
