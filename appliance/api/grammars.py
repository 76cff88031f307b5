"""Grammars that clients send, tried out before a worker gets them.

The trying is done by another process (`grammar_check`), one grammar at a time: it is started by the
first request that needs it, ended when a grammar takes too long, and started again by the next. The
server itself neither compiles a grammar nor loads the library.
"""

import asyncio
import json
import sys
from asyncio.subprocess import PIPE, Process
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
from aiohttp import web

from appliance.api.errors import ApiError
from appliance.core.types import Record

MAX_BYTES = 64 * 1024
"""Of a schema, a regular expression, a list of choices."""
MAX_WAITING = 64
"""Grammars that may wait to be tried."""
MAX_KNOWN = 256
"""Verdicts that are remembered."""
START_SECONDS = 60.0
CHECK_SECONDS = 5.0
"""How long the process may take to start, and to try one grammar, on the clock on the wall."""
BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
    "from appliance.api.grammar_check import main; main()"
)
LINE_LIMIT = 4 * 1024 * 1024


class Wanted(Record, frozen=True, kw_only=True):
    """A grammar as a client sent it; `param` is the field that it came in. `kind` is one of
    `grammar_check.Check`."""

    param: str
    kind: str
    text: str
    lenient: bool = False


class Known(Record, frozen=True, kw_only=True):
    """A verdict: see `grammar_check.Verdict`."""

    grammar: str = ""
    ignored: tuple[str, ...] = ()
    error: str = ""


class Unusable(Exception):
    """The checking process cannot be had; says why."""


class GrammarDesk:
    """Tries grammars, remembers verdicts. Close it to end the process."""

    def __init__(self, tokenizer: Path, *, vocab_size: int, ends: Sequence[int]) -> None:
        """`ends` are the model's end tokens; nothing is started yet."""
        self._arguments = (str(tokenizer), str(vocab_size), json.dumps(list(ends)))
        self._has_end = bool(ends)
        self._known: OrderedDict[Wanted, Known] = OrderedDict()
        self._running: dict[Wanted, asyncio.Task[Known]] = {}
        self._one_at_a_time = asyncio.Lock()
        self._process: Process | None = None

    async def compiled(self, wanted: Wanted) -> Known:
        """The grammar for a worker, and what it does not enforce. Raises `ApiError` naming
        `wanted.param`: 400 when it is not served, 429 when too many wait, 500 when nothing can be
        checked."""
        if not self._has_end:
            raise refusal(wanted, "needs a model that names its end token.", code="unsupported")
        if len(wanted.text.encode()) > MAX_BYTES:
            raise refusal(wanted, f"is larger than {MAX_BYTES} bytes.")
        try:
            verdict = await self._verdict(msgspec.structs.replace(wanted, param=""))
        except Unusable as error:
            raise ApiError(
                f"'{wanted.param}' cannot be checked: {error}", status=500, code="internal_error"
            ) from error
        if verdict.error:
            raise refusal(wanted, f"cannot be served: {verdict.error}.")
        return verdict

    async def close(self) -> None:
        """End the process."""
        for task in list(self._running.values()):
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)
        await self._end()

    async def _verdict(self, key: Wanted) -> Known:
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        task = self._running.get(key)
        if task is None:
            if len(self._running) >= MAX_WAITING:
                raise ApiError(
                    "Too many new grammars are waiting to be checked; try again.",
                    status=429,
                    code="queue_full",
                    headers={"Retry-After": "1"},
                )
            task = self._running[key] = asyncio.create_task(self._try(key))
            task.add_done_callback(lambda _: self._running.pop(key, None))
        return await asyncio.shield(task)  # a client that leaves spoils it for nobody

    async def _try(self, key: Wanted) -> Known:
        async with self._one_at_a_time:
            try:
                # a process that was killed from outside is not the grammar's fault: once more
                known = await self._exchange(key) or await self._exchange(key)
                if known is None:
                    known = Known(error="it cannot be compiled")
            except TimeoutError:
                known = Known(error=f"it could not be compiled within {CHECK_SECONDS:g} seconds")
                await self._end()
            except (OSError, msgspec.MsgspecError, ValueError) as error:
                await self._end()
                raise Unusable(f"the checking process failed ({error})") from error
            except BaseException:
                await self._end()  # its next line would answer a question that nobody asked
                raise
        self._known[key] = known
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
        return known

    async def _exchange(self, key: Wanted) -> Known | None:
        """Ask the process, a new one if there is none. None when it ended over the question."""
        process = self._process
        if process is None or process.returncode is not None:
            process = await self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        line = b""
        async with asyncio.timeout(CHECK_SECONDS):
            with suppress(ConnectionError):
                process.stdin.write(msgspec.json.encode(key) + b"\n")
                await process.stdin.drain()
                line = await process.stdout.readline()
        if line:
            return msgspec.json.decode(line, type=Known)
        await self._end()
        return None

    async def _start(self) -> Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-c", BOOT, json.dumps(sys.path), *self._arguments),
            stdin=PIPE,
            stdout=PIPE,
            limit=LINE_LIMIT,
            start_new_session=True,
        )
        self._process = process
        assert process.stdout is not None
        try:
            async with asyncio.timeout(START_SECONDS):
                line = await process.stdout.readline()
        except TimeoutError as error:
            raise ValueError("it did not start") from error
        ready = msgspec.json.decode(line or b'{"error":"it did not start"}', type=Known)
        if ready.error:
            raise ValueError(ready.error)
        return process

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError):
            process.kill()
        if process.stdin is not None:
            process.stdin.close()
        await process.wait()


DESK = web.AppKey("grammars", GrammarDesk)


def refusal(wanted: Wanted, message: str, *, code: str = "invalid_value") -> ApiError:
    """The error for a grammar that is not served."""
    return ApiError(f"'{wanted.param}' {message}", code=code, param=wanted.param)
