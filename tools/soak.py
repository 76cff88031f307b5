"""A long mixed load against the real server, with blows; says whether anything was lost or grew.

Starts `appliance start` and goes round by round. In a round, users talk to it as real ones do and
worse (see `tools/soak_clients.py`), bursts overload it, and every few seconds a random worker gets
SIGKILL or SIGSTOP, often two of them shortly one after the other: answers that were present at both
deaths become suspects and are tried alone. Then the load ends, the server must *settle*: all
workers up, nothing live, every block free, as many answers ended as were begun. There memory,
descriptors, threads and processes are measured. What is drawn depends on the seed alone; its timing
is the machine's.

No worker is hit before it has served long enough to count as healthy, so none is quarantined; the
worker of the highest number is never hit. With `--flips` operators change roles and park workers at
the same time, with `--aborts` many more clients leave early (`tools/soak_moves.py`); these and
`--kills` must all have happened so often by the end. The exit code is 1 if a promise was broken
(R1, R2, R3, R5, R6, R9, R15, R16, R19).

    python -m tools.soak --minutes 30 --devices paced:4 --json docs/results/soak.json
    python -m tools.soak --minutes 18 --roles prefill,prefill,decode,decode \
        --kills 100 --flips 1000 --aborts 10000
"""

import argparse
import asyncio
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import psutil
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from appliance.core.types import Record
from tools.soak_clients import Accounts, Clients, Violation, make_prompts
from tools.soak_moves import Changers, Goals
from tools.soak_watch import MIB, Sample, Trend, take, trends

ROOT = Path(__file__).resolve().parents[1]
SAMPLE_SECONDS = 5.0
HEALTHY_SECONDS = 12.0
"""Age at which a worker may be hit again and again: over the server's bar for a healthy life."""
FREE_BLOWS = 2
"""So many a worker takes at any age; the next in a row would quarantine it."""
PAIRED_SHARE = 0.4
"""Of the blows that a second one follows after `PAIR_SECONDS`."""
PAIR_SECONDS = 0.6
HOLD_SECONDS = 16.0
"""How long a stuck reader reads nothing, at most."""
SETTLE_SECONDS = 30.0
"""Far more than it takes; past it something hangs."""
CONFIG = """
[server]
max_stream_buffer_bytes = "64KiB"
[kv]
memory = "{memory}"
[batch]
max_num_seqs = 8
[queue]
max_requests = 40
[journal]
ring_records = 4000
check_laws = {laws}
[log]
level = "warning"
"""
"""Small limits, so that all of them are reached; small rings, so that they are full soon."""


class Options(Record, frozen=True, kw_only=True):
    """What is to be run."""

    devices: str
    minutes: float
    round_seconds: float
    users: int
    burst: int
    hit_seconds: float
    """Mean pause between two blows; 0 for none."""
    seed: int
    laws: bool
    roles: str = "mixed"
    goals: Goals = Goals()


class Report(Record, frozen=True, kw_only=True):
    """What came of it."""

    options: Options
    machine: str
    seconds: float
    rounds: int
    counts: Mapping[str, int]
    server: Mapping[str, Any]
    """Totals of the server's own books."""
    transfers: Mapping[str, Any]
    """How moves between workers ended, and what went where."""
    workers: Sequence[Mapping[str, Any]]
    trends: Sequence[Trend]
    num_violations: int
    violations: Sequence[Violation]
    samples: Sequence[Sample]

    @property
    def passed(self) -> bool:
        """Whether every promise was kept."""
        return self.num_violations == 0


class Server:
    """The server under test, as a process."""

    def __init__(self, options: Options, directory: Path) -> None:
        paced = options.devices.startswith("paced")
        config = directory / "soak.toml"
        laws = "true" if options.laws else "false"
        config.write_text(CONFIG.format(memory="40KiB" if paced else "10MiB", laws=laws))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = directory / "server.log"
        command = [sys.executable, "-m", "appliance", "start", "--config", str(config)]
        command += ["--devices", options.devices, "--roles", options.roles, "--port", str(port)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
        self.num_workers = int(options.devices.partition(":")[2].partition("@")[0] or 2)

    async def state(self) -> dict[str, Any]:
        """The document of /admin/state, over a connection of its own."""
        timeout = aiohttp.ClientTimeout(total=SETTLE_SECONDS)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.get(self.url + "/admin/state") as answer,
        ):
            document: dict[str, Any] = await answer.json()
        return document

    async def wait_up(self, seconds: float = 90.0) -> None:
        """Return when all workers are ready. Raises `RuntimeError` with the log."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                workers = (await self.state())["workers"]
            except (aiohttp.ClientError, TimeoutError):
                workers = []
            if workers and all(worker["state"] == "ready" for worker in workers):
                return
            await asyncio.sleep(0.1)
        raise RuntimeError(f"the server did not come up:\n{self.log.read_text()}")

    def stop(self, accounts: Accounts) -> None:
        """SIGTERM must end it and all its processes, with code 0."""
        if self.process.poll() is not None:
            accounts.violate("exit", f"code {self.process.returncode} before SIGTERM")
            return
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(40)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        if code != 0:
            accounts.violate("exit", f"code {code} after SIGTERM")
        _, alive = psutil.wait_procs(family, timeout=5)
        if alive:
            accounts.violate("exit", f"processes left behind: {alive}")
        for line in self.log.read_text().splitlines():
            if "Traceback" in line:
                accounts.violate("log", "a traceback in the server's log")


class Soak:
    """One run."""

    def __init__(self, options: Options, server: Server) -> None:
        self._options = options
        self._server = server
        self._rng = random.Random(options.seed)
        self.accounts = Accounts()
        paced = options.devices.startswith("paced")
        prompts = make_prompts(self._rng, 150, longest_answer=400 if paced else 120)
        self._clients = Clients(server.url, prompts, self.accounts, hold_seconds=HOLD_SECONDS)
        self._changers = Changers(
            self._clients,
            options.goals,
            num_workers=server.num_workers,
            seconds=60 * options.minutes,
        )
        self.samples: list[Sample] = []
        self.rounds = 0
        self.state: dict[str, Any] = {}
        self._until = 0.0
        self._spared: int | None = None
        self._ready_since: dict[int, float] = {}
        self._hit: set[int] = set()

    @property
    def seconds(self) -> float:
        """Of the run so far."""
        return time.monotonic() - self.accounts.began

    async def run(self) -> None:
        """Rounds until the time is over; a server that is gone ends it early."""
        await self._server.wait_up()
        self.state = await self._server.state()
        self.accounts.began = time.monotonic()
        end = self.accounts.began + 60 * self._options.minutes
        watching = asyncio.create_task(self._watch())
        try:
            while time.monotonic() < end and self._server.process.poll() is None:
                self._until = min(time.monotonic() + self._options.round_seconds, end)
                self._clients.until = self._until
                await self._round()
                await self._settle()
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        for words in self._options.goals.missing(self.accounts.counts):
            self.accounts.violate("too few", words)
        for trend in trends(self.samples):
            if trend.grew:
                self.accounts.violate(
                    "growth", f"{trend.name} went from {trend.first:.0f} to {trend.last:.0f}"
                )

    async def _round(self) -> None:
        await self._clients.open()
        seeds = [self._rng.getrandbits(64) for _ in range(self._options.users + 2)]
        rngs = [random.Random(seed) for seed in seeds]
        work = [self._user(rng) for rng in rngs[2:]]
        work += [self._bursts(rngs[0]), self._blows(rngs[1]), *self._changers.work(self._rng)]
        for error in await asyncio.gather(*work, return_exceptions=True):
            if isinstance(error, BaseException):
                self.accounts.violate("client failed", repr(error))
        await self._clients.close()
        self.rounds += 1

    async def _user(self, rng: random.Random) -> None:
        actions, weights = self._clients.repertoire()
        while time.monotonic() < self._until:
            action = rng.choices(actions, weights)[0]
            await action(rng)
            await asyncio.sleep(rng.expovariate(1.0))

    async def _bursts(self, rng: random.Random) -> None:
        while time.monotonic() < self._until:
            await asyncio.sleep(min(rng.uniform(3, 20), self._options.round_seconds / 2))
            await self._clients.burst(rng, self._options.burst)

    async def _blows(self, rng: random.Random) -> None:
        if not self._options.hit_seconds:
            return
        pause, paired = 0.0, False
        last = time.monotonic()
        while time.monotonic() < self._until:
            await asyncio.sleep(0.25)
            now = time.monotonic()
            targets = self._hittable(now)
            if now - last < pause or not targets:
                continue
            pid, sign = rng.choice(sorted(targets)), rng.choice((signal.SIGKILL, signal.SIGSTOP))
            self._hit.add(pid)
            paired = not paired and rng.random() < PAIRED_SHARE
            mean = PAIR_SECONDS if paired else self._options.hit_seconds
            last, pause = now, rng.uniform(0.5, 1.5) * mean
            try:
                os.kill(pid, sign)
            except ProcessLookupError:
                continue
            self.accounts.counts[f"workers hit by {sign.name}"] += 1

    def _hittable(self, now: float) -> list[int]:
        """Process ids of workers that will not be quarantined for it; never the last one's."""
        ready = [w for w in self.state["workers"][:-1] if w["state"] == "ready" and w["pid"]]
        known = self._ready_since
        self._ready_since = {w["pid"]: known.get(w["pid"], now) for w in ready}
        return [
            worker["pid"]
            for worker in ready
            if worker["pid"] not in self._hit
            and (
                worker["deaths"] < FREE_BLOWS
                or now - self._ready_since[worker["pid"]] > HEALTHY_SECONDS
            )
        ]

    async def _watch(self) -> None:
        """Look at the state every second, at the processes every few."""
        due = 0.0
        while True:
            try:
                self.state = await self._server.state()
            except (aiohttp.ClientError, TimeoutError) as error:
                self.accounts.violate("state", repr(error))
            if time.monotonic() >= due:
                due = time.monotonic() + SAMPLE_SECONDS
                self._sample(settled=False)
            await asyncio.sleep(1.0)

    def _sample(self, *, settled: bool) -> None:
        self._spared = self.state["workers"][-1]["pid"] or self._spared
        try:
            sample = take(
                self._server.process.pid, spared=self._spared, at=self.seconds, settled=settled
            )
        except psutil.Error:
            return
        self.samples.append(sample)

    async def _settle(self) -> None:
        """Everything must come back: workers, blocks, answers, connections."""
        end = time.monotonic() + SETTLE_SECONDS
        while True:
            await asyncio.sleep(0.2)
            self.state = await self._server.state()
            faults = unsettled(self.state)
            if not faults:
                break
            if time.monotonic() > end or self._server.process.poll() is not None:
                self.accounts.violate("not settled", "; ".join(faults))
                return
        await asyncio.sleep(0.5)  # closed connections reach the server
        self._sample(settled=True)

    def report(self) -> Report:
        """All of it."""
        fields = ["id", "role", "flips", "state", "epoch", "deaths", "steps", "preemptions"]
        fields += ["blocks", "tokens"]
        kept = [{name: worker[name] for name in fields} for worker in self.state["workers"]]
        return Report(
            options=self._options,
            machine=f"{os.cpu_count()} cores, Python {platform.python_version()}",
            seconds=round(self.seconds, 1),
            rounds=self.rounds,
            counts=dict(sorted(self.accounts.counts.items())),
            server=self.state["totals"],
            transfers=self.state["transfers"],
            workers=kept,
            trends=trends(self.samples),
            num_violations=self.accounts.num_violations,
            violations=self.accounts.violations,
            samples=self.samples,
        )


def unsettled(state: Mapping[str, Any]) -> list[str]:
    """What is not yet as it must be when nothing is asked of the server."""
    totals, faults = state["totals"], []
    ended = sum(totals["ended"].values())
    if totals["live"]:
        faults.append(f"{totals['live']} answers live")
    if ended != totals["sequences"]:
        faults.append(f"{totals['sequences']} answers begun, {ended} ended")
    if state["moves"]:
        faults.append(f"moves under way: {state['moves']}")
    for worker in state["workers"]:
        name, blocks = f"worker {worker['id']}", worker["blocks"]
        if worker["state"] != "ready":
            faults.append(f"{name} is {worker['state']}: {worker['last_cause']}")
        elif worker["running"] or worker["queued"]:
            faults.append(f"{name} runs {worker['running']}, queues {worker['queued']}")
        elif blocks["free"] != blocks["total"] or blocks["held"] or blocks["leased"]:
            faults.append(f"{name} keeps blocks: {blocks}")
    return faults


def progress(soak: Soak) -> Text:
    """One line for the terminal."""
    counts, accounts = soak.accounts.counts, soak.accounts
    hits = Goals.done(counts)["kills"]
    memory = soak.samples[-1].server_rss / MIB if soak.samples else 0.0
    return Text(
        f"{soak.seconds:6.0f} s  round {soak.rounds}  ended {counts['requests accepted and ended']}"
        f"  open {accounts.open}  429 {counts['status 429']}  abandoned {counts['abandoned']}"
        f"  hits {hits}  flips {counts['flips done']}  compared {counts['answers compared']}"
        f"  server {memory:.1f} MiB  violations {accounts.num_violations}"
        f"{''.join(f' {each.kind}: {each.detail}' for each in accounts.violations[-1:])}",
        style="red" if accounts.num_violations else "green",
    )


async def show(soak: Soak, console: Console) -> None:
    """Keep the line up to date; where there is no terminal, print one now and then."""
    if not console.is_terminal:
        while True:
            await asyncio.sleep(30)
            console.print(progress(soak), soft_wrap=True)
    with Live(progress(soak), console=console, auto_refresh=False) as live:
        while True:
            await asyncio.sleep(0.5)
            live.update(progress(soak), refresh=True)


def tables(report: Report) -> list[Table]:
    """What the run says to a person."""
    seen = Table(title=f"Soak of {report.options.devices}, {report.seconds:.0f} s", expand=False)
    seen.add_column("counted")
    seen.add_column("number", justify="right")
    for name, count in report.counts.items():
        seen.add_row(name, str(count))
    for name in ("replaced", "trials", "acquitted"):
        seen.add_row(f"server: {name}", str(report.server[name]))
    for name, count in sorted(report.server["ended"].items()):
        seen.add_row(f"server: ended, {name}", str(count))
    for move in report.transfers["moves"]:
        seen.add_row(f"server: {move['kind']}, {move['outcome']}", str(move["count"]))
    grown = Table(title="Settle points after the warm-up")
    for name in ("quantity", "first third", "last third", "slope per hour", "allowed", "verdict"):
        grown.add_column(name, justify="left" if name in ("quantity", "verdict") else "right")
    for trend in report.trends:
        unit, words = (MIB, " MiB") if trend.name.endswith("rss") else (1, "")
        verdict = "GREW" if trend.grew else "flat" if trend.judged else "not judged"
        figures = (trend.first, trend.last, trend.slope_per_hour, trend.limit)
        cells = [f"{figure / unit:.2f}{words}" for figure in figures]
        grown.add_row(trend.name, *cells, verdict)
    broken = Table(title=f"{report.num_violations} violations")
    for name in ("at", "kind", "detail"):
        broken.add_column(name)
    for violation in report.violations:
        broken.add_row(f"{violation.at:.1f} s", violation.kind, Text(violation.detail))
    return [seen, grown, broken]


async def soak(options: Options, console: Console) -> Report:
    """Start the server, run, stop it."""
    with tempfile.TemporaryDirectory(prefix="soak-") as directory:
        server = Server(options, Path(directory))
        run = Soak(options, server)
        showing = asyncio.create_task(show(run, console))
        try:
            await run.run()
        finally:
            showing.cancel()
            await asyncio.gather(showing, return_exceptions=True)
            await asyncio.get_running_loop().run_in_executor(None, server.stop, run.accounts)
            if run.accounts.num_violations:
                console.print(server.log.read_text()[-4000:], markup=False)
        return run.report()


def parse(arguments: Sequence[str]) -> tuple[Options, Path | None]:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", default="paced:4", help='"paced:4" or "cpu:2"')
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--round-seconds", type=float, default=45.0)
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--burst", type=int, default=120)
    parser.add_argument("--hit-seconds", type=float, default=6.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--laws", action="store_true", help="the server checks its laws, too")
    parser.add_argument("--roles", default="mixed", help="of the workers, at the start")
    for name in ("kills", "flips", "aborts"):
        parser.add_argument(f"--{name}", type=int, default=0, help="so many at least")
    parser.add_argument("--json", type=Path, help="file for everything that was measured")
    args = vars(parser.parse_args(arguments))
    file: Path | None = args.pop("json")
    goals = Goals(**{name: args.pop(name) for name in ("kills", "flips", "aborts")})
    return Options(goals=goals, **args), file


def main(arguments: Sequence[str]) -> int:
    """Run; 0 if every promise was kept."""
    options, file = parse(arguments)
    console = Console(soft_wrap=False)
    report = asyncio.run(soak(options, console))
    if file is not None:
        file.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    for table in tables(report):
        console.print(table)
    console.print("passed" if report.passed else "FAILED")
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
