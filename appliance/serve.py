"""One server from its listening socket to its last answer.

Readiness and life are two things: the server answers as soon as it can parse a request, `/ready`
turns 200 with the first worker. The first SIGTERM or SIGINT drains: new requests get 503, what runs
may finish within `server.drain_seconds`, the rest ends with a typed error, exit 0. A second signal
ends the process at once; its workers end with the sockets they share with it.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any

import msgspec
import uvloop
from aiohttp import web

from appliance.api.app import build_app, make_runner
from appliance.api.settings import ApiSettings
from appliance.core.faults import FaultRule
from appliance.listening import BACKLOG, CannotServe, room_for, url_of
from appliance.live.bookkeeping import link_summary, link_words
from appliance.live.chat_template import TemplateFailed
from appliance.live.garbage import Collector
from appliance.live.journal_file import JournalFileError
from appliance.live.node import Node, StartFailed
from appliance.live.spawner import Spawner
from appliance.live.tokenise import TokenizerError
from appliance.screen import Screen
from appliance.startup import Plan
from appliance.timeline import Timeline
from appliance.wiring import api_settings, build_node

log = logging.getLogger(__name__)

MAX_LINK_LINES = 12
"""More links are summed up by path; /admin/state names each."""
LINK_SECONDS = 20.0
"""From the first ready worker to the last probed link; what is missing then is said."""
SWITCH_SECONDS = 0.001
"""For which a thread (a long prompt is rendered, checked) may keep the interpreter while the event
loop waits for it; Python's own bound is five times that."""
CLOSE_SECONDS = 5.0
"""For connections whose answer is complete but not yet read by the client."""


class Signals:
    """The first signal is remembered, the second ends the process."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.first: asyncio.Future[signal.Signals] = loop.create_future()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._received, number)

    def _received(self, number: signal.Signals) -> None:
        if not self.first.done():
            self.first.set_result(number)
            return
        name = signal.Signals(number).name
        message = f"appliance: ended at once by a second signal ({name}); open requests are lost\n"
        os.write(sys.stderr.fileno(), message.encode())
        os._exit(128 + number)


def serve(
    plan: Plan,
    *,
    listener: socket.socket,
    spawner: Spawner,
    faults: Sequence[FaultRule],
    timeline: Timeline,
    screen: Screen,
) -> None:
    """Serve until drained. Raises `CannotServe`."""
    sys.setswitchinterval(SWITCH_SECONDS)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(
            _serve(
                plan,
                listener=listener,
                spawner=spawner,
                faults=faults,
                timeline=timeline,
                screen=screen,
            )
        )


async def _serve(
    plan: Plan,
    *,
    listener: socket.socket,
    spawner: Spawner,
    faults: Sequence[FaultRule],
    timeline: Timeline,
    screen: Screen,
) -> None:
    signals = Signals(asyncio.get_running_loop())
    try:
        node = build_node(plan, faults=faults, spawner=spawner, stderr=_relay)
    except (TokenizerError, TemplateFailed, JournalFileError) as error:
        spawner.close()
        raise CannotServe(str(error)) from error
    timeline.reached("tokenizer")
    runner = make_runner(build_app(node, _settings(plan)))
    try:
        node.start()
        await runner.setup()
        await web.SockSite(runner, listener, backlog=BACKLOG).start()
        timeline.reached("listening")
        if await _ready(node, signals):
            _announce(plan, node, url=url_of(listener), timeline=timeline, screen=screen)
            links = asyncio.create_task(_report_links(node, screen))
            collector = Collector(lambda: node.num_open == 0)
            collector.start()
            try:
                await _until_over(node, signals)
            finally:
                collector.stop()
                links.cancel()
        await _drain(node, signals.first.result(), seconds=plan.config.server.drain_seconds)
    except StartFailed as error:
        raise CannotServe(str(error)) from error
    finally:
        await _close(node, runner)


def _settings(plan: Plan) -> ApiSettings:
    """What the configuration says, with no more connections than the process may have."""
    settings = api_settings(plan.config)
    wanted = settings.connections.max_connections
    fit = room_for(wanted)
    if fit == wanted:
        return settings
    log.warning(
        "fewer connections fit than limits.max_connections: raise the limit on open files "
        "(ulimit -n)",
        extra={"wanted": wanted, "fit": fit},
    )
    connections = msgspec.structs.replace(settings.connections, max_connections=fit)
    return msgspec.structs.replace(settings, connections=connections)


async def _ready(node: Node, signals: Signals) -> bool:
    """Wait for the first worker; False when a signal came first. Raises `StartFailed`."""
    ready = asyncio.ensure_future(node.wait_ready())
    signals.first.add_done_callback(lambda _: ready.cancel())
    try:
        await ready
    except asyncio.CancelledError:
        if signals.first.done():
            return False
        raise
    return True


async def _until_over(node: Node, signals: Signals) -> None:
    """Serve until the first signal. Raises `CannotServe` when the node fails: it ended all its
    answers and serves nothing more, so whoever runs this process should start it again."""
    failure = node.failure
    if failure is None:
        raise RuntimeError("the node was never started")
    ends: list[asyncio.Future[Any]] = [signals.first, failure]
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    if failure.done() and not signals.first.done():
        raise CannotServe(failure.result())


def _announce(plan: Plan, node: Node, *, url: str, timeline: Timeline, screen: Screen) -> None:
    for at, words in node.timeline:
        timeline.reached(words, at=at)
    screen.timeline(timeline.stages)
    screen.address(url=url, model=plan.served_name, needs_key=bool(plan.config.key))


async def _report_links(node: Node, screen: Screen) -> None:
    """Say what the probes of all links gave, once all workers are up."""
    missing = await node.wait_links(LINK_SECONDS)
    links = [link for _, link in sorted(node.moves.links.items())]
    lines = [link_words(link) for link in links]
    if len(lines) > MAX_LINK_LINES:
        lines = link_summary(links)
    words = [f"{source} -> {target}: none; no KV moves this way" for source, target in missing]
    screen.links(lines, missing=words)
    for line in words:
        log.warning("a link is missing: %s", line)


async def _drain(node: Node, number: signal.Signals, *, seconds: float) -> None:
    log.info("draining", extra={"signal": number.name, "open": node.num_open, "limit": seconds})
    complete = await node.drain(seconds)
    log.info("drained", extra={"complete": complete})


async def _close(node: Node, runner: web.AppRunner) -> None:
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            await runner.cleanup()
    except TimeoutError:
        log.warning("some clients did not read their answers to the end")
    await node.close()


def _relay(line: str) -> None:
    """A line that a worker wrote to its stderr, as it is."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
