"""The engines that `tools.bench_peers` compares, each behind the same two calls.

A contestant runs on one core with one compute thread. It answers a list of prompts at a given
concurrency, and says how many CPU seconds all of its processes have used. Servers are asked over
HTTP, one request per prompt, without streaming or with it; OpenVINO GenAI is a library and is
handed whole batches, so its figures contain no server.
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import aiohttp

from appliance.core.types import Record

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 180.0
REQUEST_SECONDS = 900.0
STOP_SECONDS = 20.0
KV_TOKENS = 16384
"""KV room of every peer: more than 64 sequences of 192 tokens need."""
SLOTS = 32


class Prompt(Record, frozen=True):
    """The same prompt as text and as ids."""

    text: str
    ids: list[int]


class Answers(Record, frozen=True, kw_only=True):
    """What a round of requests brought. Seconds of wall clock and of CPU."""

    texts: list[str]
    tokens: int
    prompt_tokens: int
    wall: float
    cpu: float
    cpu_front: float
    """Of `cpu`: the process that was started, without its children."""


class Contestant(Protocol):
    """One engine, started."""

    name: str
    precision: str

    def ask(self, prompts: Sequence[Prompt], *, max_tokens: int, concurrency: int) -> Answers:
        """Answer all prompts, `concurrency` at a time."""

    def stop(self) -> None:
        """End its processes."""


def process_tree(root: int) -> list[int]:
    """Pids of a process and all its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(FileNotFoundError, ProcessLookupError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, rest = [], [root]
    while rest:
        found.append(rest.pop())
        rest += children.get(found[-1], [])
    return found


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, ended threads included, in the kernel's nanoseconds.

    The clock's number is what Linux makes of a pid for "CPU time of that process", see
    clock_getcpuclockid(3)."""
    return time.clock_gettime((~pid << 3) | 2)


def start_on(core: int, command: Sequence[str], **how: Any) -> "subprocess.Popen[bytes]":
    """Start a process that may use this core only, with one thread where it obeys OMP."""
    mine = os.sched_getaffinity(0)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    os.sched_setaffinity(0, {core})
    try:
        return subprocess.Popen(command, cwd=ROOT, env=environment, **how)
    finally:
        os.sched_setaffinity(0, mine)


def end(process: "subprocess.Popen[bytes]") -> None:
    """SIGTERM, and SIGKILL if that takes long."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Recipe(Record, frozen=True, kw_only=True):
    """How a server is started and asked. In `command`, {port} is replaced."""

    name: str
    precision: str
    command: tuple[str, ...]
    model: str
    health: str
    fields: Mapping[str, Any]
    """Added to each request's body."""
    stream_fields: Mapping[str, Any] = MappingProxyType({})
    """Added when streaming."""


class HttpContestant:
    """A server with `/v1/completions`."""

    def __init__(self, recipe: Recipe, *, core: int, stream: str) -> None:
        """`stream` is "stream" or "whole". Returns when the server is healthy."""
        self.name, self.precision = recipe.name, recipe.precision
        self._recipe = recipe
        self._streams = stream == "stream"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = int(probe.getsockname()[1])
        command = [part.replace("{port}", str(self._port)) for part in recipe.command]
        self._process = start_on(
            core, command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            self._wait()
        except BaseException:
            end(self._process)
            raise

    def ask(self, prompts: Sequence[Prompt], *, max_tokens: int, concurrency: int) -> Answers:
        """See `Contestant`. Raises `RuntimeError` when the server refuses."""
        tree = process_tree(self._process.pid)
        front, all_ = cpu_seconds(self._process.pid), sum(map(cpu_seconds, tree))
        began = time.perf_counter()
        answers = asyncio.run(self._ask_all(prompts, max_tokens, concurrency))
        wall = time.perf_counter() - began
        return Answers(
            texts=[text for text, _ in answers],
            tokens=sum(usage["completion_tokens"] for _, usage in answers),
            prompt_tokens=sum(usage["prompt_tokens"] for _, usage in answers),
            wall=wall,
            cpu=sum(map(cpu_seconds, tree)) - all_,
            cpu_front=cpu_seconds(self._process.pid) - front,
        )

    def stop(self) -> None:
        """See `Contestant`."""
        end(self._process)

    def _wait(self) -> None:
        limit = time.monotonic() + START_SECONDS
        address = f"http://127.0.0.1:{self._port}{self._recipe.health}"
        while time.monotonic() < limit:
            if self._process.poll() is not None:
                raise RuntimeError(f"{self.name} has ended with {self._process.returncode}")
            with suppress(OSError), urllib.request.urlopen(address, timeout=5) as reply:
                if reply.status == 200:
                    return
            time.sleep(0.2)
        raise RuntimeError(f"{self.name} was not ready within {START_SECONDS:g} s")

    async def _ask_all(
        self, prompts: Sequence[Prompt], max_tokens: int, concurrency: int
    ) -> list[tuple[str, Mapping[str, int]]]:
        answers: list[tuple[str, Mapping[str, int]]] = [("", {})] * len(prompts)
        todo = iter(range(len(prompts)))
        timeout = aiohttp.ClientTimeout(total=REQUEST_SECONDS)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:

            async def client() -> None:
                for place in todo:
                    answers[place] = await self._ask_one(session, prompts[place], max_tokens)

            await asyncio.gather(*(client() for _ in range(concurrency)))
        return answers

    async def _ask_one(
        self, session: aiohttp.ClientSession, prompt: Prompt, max_tokens: int
    ) -> tuple[str, Mapping[str, int]]:
        recipe = self._recipe
        body = {
            "model": recipe.model,
            "prompt": prompt.text,
            "max_tokens": max_tokens,
            "temperature": 0,
            **recipe.fields,
        }
        if self._streams:
            body |= {"stream": True, **recipe.stream_fields}
        address = f"http://127.0.0.1:{self._port}/v1/completions"
        async with session.post(address, json=body) as reply:
            data = await reply.read()
            if reply.status != 200:
                raise RuntimeError(f"{self.name} answers {reply.status}: {data[:300]!r}")
        return read_stream(data) if self._streams else read_whole(data)


def read_whole(data: bytes) -> tuple[str, Mapping[str, int]]:
    """Text and usage of a JSON answer."""
    answer = json.loads(data)
    return answer["choices"][0]["text"], answer["usage"]


def read_stream(data: bytes) -> tuple[str, Mapping[str, int]]:
    """Text and usage of a complete stream of events."""
    text = ""
    usage: Mapping[str, int] = {}
    for line in data.splitlines():
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            text += "".join(choice["text"] for choice in event["choices"])
            usage = event.get("usage") or usage
    return text, usage


class OpenVinoContestant:
    """OpenVINO GenAI in a process of its own environment."""

    name = "openvino"

    def __init__(self, python: str, gguf: Path, *, precision: str, core: int) -> None:
        self.precision = precision
        hint = {"f32": "f32", "bf16": "bf16"}[precision]
        command = [
            python, str(ROOT / "tools" / "peer_openvino.py"), str(gguf),
            f"INFERENCE_PRECISION_HINT={hint}", f"KV_CACHE_PRECISION={hint}",
        ]  # fmt: skip
        pipe = subprocess.PIPE
        self._process = start_on(core, command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
        self._hear()

    def ask(self, prompts: Sequence[Prompt], *, max_tokens: int, concurrency: int) -> Answers:
        """See `Contestant`: batches of `concurrency` prompts, one after the other."""
        texts: list[str] = []
        tokens, wall, cpu = 0, 0.0, 0.0
        for first in range(0, len(prompts), concurrency):
            part = [prompt.ids for prompt in prompts[first : first + concurrency]]
            request = json.dumps({"prompts": part, "max_tokens": max_tokens})
            assert self._process.stdin is not None
            self._process.stdin.write(request.encode() + b"\n")
            self._process.stdin.flush()
            answer = self._hear()
            texts += answer["texts"]
            tokens += answer["tokens"]
            wall += answer["wall"]
            cpu += answer["cpu"]
        return Answers(
            texts=texts,
            tokens=tokens,
            prompt_tokens=sum(len(prompt.ids) for prompt in prompts),
            wall=wall,
            cpu=cpu,
            cpu_front=cpu,
        )

    def stop(self) -> None:
        """See `Contestant`."""
        end(self._process)

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} has ended with {self._process.wait()}")
        words: dict[str, Any] = json.loads(line)
        return words


LONG_PRECISION = {"f32": "float32", "bf16": "bfloat16"}


def appliance_recipe(directory: Path, precision: str, *, settings: Sequence[str] = ()) -> Recipe:
    """This project, one CPU worker."""
    extra = [part for each in settings for part in ("--set", each)]
    command = (
        sys.executable, "-m", "appliance", "start", "--model", str(directory), "--devices", "cpu:1",
        "--dtype", LONG_PRECISION[precision], "--port", "{port}", "--log-level", "warning",
        "--set", "devices.threads=1", *extra,
    )  # fmt: skip
    return Recipe(
        name="appliance",
        precision=precision,
        command=command,
        model=directory.name,
        health="/ready",
        fields={"ignore_eos": True},
        stream_fields={"stream_options": {"include_usage": True}},
    )


def llama_recipe(program: str, directory: Path, precision: str) -> Recipe:
    """llama.cpp's server on the GGUF file of this precision."""
    gguf = directory / f"{directory.name}-{precision}.gguf"
    command = (
        program, "-m", str(gguf), "--host", "127.0.0.1", "--port", "{port}", "-t", "1", "-tb", "1",
        "--parallel", str(SLOTS), "-c", str(KV_TOKENS), "-cb", "--no-warmup", "--no-kv-unified",
    )  # fmt: skip
    return Recipe(
        name="llama-server",
        precision=precision,
        command=command,
        model=directory.name,
        health="/health",
        fields={"ignore_eos": True},
        stream_fields={"stream_options": {"include_usage": True}},
    )


def transformers_recipe(program: str, directory: Path, precision: str) -> Recipe:
    """`transformers serve` with continuous batching; it refuses `ignore_eos`."""
    page = 16
    command = (
        program, "serve", str(directory), "--continuous-batching", "--device", "cpu",
        "--dtype", LONG_PRECISION[precision], "--port", "{port}",
        "--cb-block-size", str(page), "--cb-num-blocks", str(KV_TOKENS // page),
    )  # fmt: skip
    return Recipe(
        name="transformers",
        precision=precision,
        command=command,
        model=str(directory),
        health="/health",
        fields={},
    )
