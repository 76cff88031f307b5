"""A whole node behind real HTTP: paced workers, the bundled model's tokenizer and chat template.

The server runs on a loop of its own in a thread, so that tests talk to it over sockets only, and
one server serves a whole module.
"""

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import openai
import pytest
import uvloop
from aiohttp import web

from appliance.api.app import build_app, make_runner
from appliance.api.connection import ConnectionServer
from appliance.api.grammars import DESK, Wanted
from appliance.api.settings import ApiSettings
from appliance.config import load
from appliance.core.node_state import DispatcherConfig
from appliance.core.profiles import KV_SLOT_BYTES
from appliance.core.slots import Policy
from appliance.core.types import BatcherConfig, Slo, WorkerId, WorkerSpec
from appliance.devices import plan_devices
from appliance.live.checkpoint import open_checkpoint
from appliance.live.node import Node
from appliance.live.settings import NodeSettings
from appliance.live.spawner import Spawner
from appliance.live.tokenise import TextService, TextSettings
from appliance.live.workers import PoolPlan
from appliance.policy import make_policy
from appliance.startup import Machine, make_plan
from appliance.wiring import node_settings as node_settings_of

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "tiny-tasks"
BLOCK_TOKENS = 16
SLO_CLASSES = {"default": Slo(), "chat": Slo(class_name="chat", ttft=1.0, tpot=0.05)}
T = TypeVar("T")


def node_settings(**changes: Any) -> NodeSettings:
    """Two paced workers on the tokenizer of the bundled model."""
    workers = changes.pop("num_workers", 2)
    max_model_len = changes.pop("max_model_len", 2048)
    num_blocks = changes.pop("num_blocks", 2048)
    dispatcher = changes.pop("dispatcher", {})
    batcher = changes.pop("batcher", {})
    return NodeSettings(
        model="tiny",
        version="0.0.test",
        fingerprint="test",
        model_dir=str(changes.pop("model_dir", MODEL)),
        dtype="float32",
        eos_token_ids=(2,),
        workers=tuple(
            WorkerSpec(id=WorkerId(index), devices=(f"paced:{index}",)) for index in range(workers)
        ),
        engine="paced",
        profile=changes.pop("profile", "cpu"),
        pool=PoolPlan(
            entry="appliance.worker.main:run",
            weight_bytes=0,
            num_blocks=num_blocks,
            block_bytes=KV_SLOT_BYTES * BLOCK_TOKENS,
        ),
        batcher=BatcherConfig(max_model_len=max_model_len, **batcher),
        block_tokens=BLOCK_TOKENS,
        num_blocks=num_blocks,
        dispatcher=DispatcherConfig(max_model_len=max_model_len, **dispatcher),
        validate=True,
        log_level="warning",
        **changes,
    )


class LiveServer:
    """A node and its HTTP surface on an ephemeral port of this machine."""

    def __init__(
        self,
        settings: NodeSettings,
        api: ApiSettings,
        *,
        send_buffer: int | None = None,
        policy: Policy | None = None,
    ) -> None:
        """`send_buffer` bounds what the kernel keeps for a client that does not read, in bytes.
        `policy` stands in for the one that the settings name."""
        self._settings = settings
        self._policy = policy or make_policy(settings.policy, {})
        self._send_buffer = send_buffer
        self._api = api
        preload = ["appliance.worker.torch_engine"] if settings.engine == "torch" else []
        self._spawner = Spawner(["appliance.worker.main", *preload])
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="server")
        self._thread.start()
        self.port = 0
        try:
            self.node = self.call(self._open())
        except BaseException:
            self._stop_loop()
            self._spawner.close()
            raise

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def num_connections(self) -> int:
        """Connections that are open."""
        server = self._runner.server
        return server.num_open if isinstance(server, ConnectionServer) else -1

    @property
    def app(self) -> web.Application:
        """Its HTTP surface."""
        return self._runner.app

    def call(self, work: Awaitable[T], seconds: float = 60) -> T:
        """Run a coroutine on the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(seconds)

    def read(self, look: Callable[[Node], T]) -> T:
        """Look at the node from its own thread."""

        async def work() -> T:
            return look(self.node)

        return self.call(work())

    def close(self) -> None:
        """End everything."""
        try:
            self.call(self._close())
        finally:
            self._stop_loop()

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _open(self) -> Node:
        settings = self._settings
        text = TextService(
            Path(settings.model_dir),
            TextSettings(
                max_model_len=settings.batcher.max_model_len,
                block_tokens=settings.block_tokens,
                hash_key=b"0123456789abcdef",
                vocab_size=open_checkpoint(Path(settings.model_dir)).shape.vocab_size,
            ),
        )
        node = Node(
            settings,
            text,
            policy=self._policy,
            spawner=self._spawner,
            stderr=lambda line: None,
        )
        node.start()
        await node.wait_ready(len(settings.workers))
        self._runner = make_runner(build_app(node, self._api))
        await self._runner.setup()
        listener = socket.create_server(("127.0.0.1", 0))
        if self._send_buffer is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._send_buffer)
        await web.SockSite(self._runner, listener).start()
        self.port = self._runner.addresses[0][1]
        return node

    async def _close(self) -> None:
        await self._runner.cleanup()
        await self.node.close()


def start_server(api: ApiSettings | None = None, **changes: Any) -> LiveServer:
    """A server with these changes to its node."""
    send_buffer, policy = changes.pop("send_buffer", None), changes.pop("policy", None)
    api = api or ApiSettings(slo_classes=SLO_CLASSES)
    return LiveServer(node_settings(**changes), api, send_buffer=send_buffer, policy=policy)


def start_scripted(directory: Path, api: ApiSettings | None = None) -> LiveServer:
    """A server of the model that `tests.api.scripted_model` writes, on one CPU worker."""
    config = load(
        None,
        {
            "model": {"path": str(directory), "served_name": "tiny", "max_model_len": 1024},
            "kv": {"memory": "16MiB"},
            "devices": {"threads": 1},
        },
    )
    devices = plan_devices("cpu:1", cores=2, count_gpus=lambda: 0)
    plan = make_plan(config, devices, machine=Machine(cores=2, free_bytes=8 * 1024**3))
    return LiveServer(node_settings_of(plan, ()), api or ApiSettings(slo_classes=SLO_CLASSES))


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    """One server for all tests of a module."""
    live = start_server()
    yield live
    live.close()


@pytest.fixture(scope="session")
def scripted_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory whose answers are known."""
    from tests.api.scripted_model import write_scripted_model  # needs torch

    return write_scripted_model(tmp_path_factory.mktemp("scripted"))


@pytest.fixture(scope="module")
def scripted(scripted_dir: Path) -> Iterator[LiveServer]:
    """One server of that model for all tests of a module."""
    live = start_scripted(scripted_dir)
    first = Wanted(param="first", kind="choice", text='["yes"]')
    live.call(live.app[DESK].compiled(first))  # its process is the module's, not of one test
    yield live
    live.close()


@contextlib.contextmanager
def starter() -> Iterator[Callable[..., LiveServer]]:
    """Start servers that differ from the usual one; all end with the context."""
    with contextlib.ExitStack() as stack:

        def start(api: ApiSettings | None = None, **changes: Any) -> LiveServer:
            live = start_server(api, **changes)
            stack.callback(live.close)
            return live

        yield start


@pytest.fixture
def special_server() -> Iterator[Callable[..., LiveServer]]:
    """Start servers for one test."""
    with starter() as start:
        yield start


@pytest.fixture(scope="module")
def module_server() -> Iterator[Callable[..., LiveServer]]:
    """Start servers for all tests of a module."""
    with starter() as start:
        yield start


@pytest.fixture
async def client(server: LiveServer) -> AsyncIterator[openai.AsyncOpenAI]:
    """The official client, without retries of its own."""
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0
    ) as official:
        yield official


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """A plain HTTP client."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
        yield session
