"""Flips of workers under load: how long each takes, and whether an answer or the cache suffers.

Four paced workers, two for prompts and two for decoding; 32 streams in a closed loop. Then workers
1 and 2 change their roles in turn, one at a time, through POST /admin/workers/{id}/role: 1 to
decode, 2 to prefill, 1 to prefill, 2 to decode, and so on. The same with `roles.wind_down = "wait"`
(the worker finishes what it has before it flips), in turns with the first in one run.

What is counted: seconds from the command to the new role in service as the client sees it (the
answer to the POST) and as the server says; answers lost, ended twice or unlike the answer to
the same request on the undisturbed server; the share of prompt tokens found in the cache before,
during and after the flips; gaps between chunks of a stream.

Half of the requests are from a bank whose answers were kept; the others have a new ending each and
share a long beginning with seven others of the bank, so that their share of cached tokens says what
is still there.

    python -m tools.bench_flips --flips 208 --waits 40 --json docs/results/flips.json
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from appliance.core.types import Record
from tools.control_kit import Options, Server, machine, quantile, running_server

MODEL = "tiny-tasks"
ROLES = "prefill,prefill,decode,decode"
CYCLE = ((1, "decode"), (2, "prefill"), (1, "prefill"), (2, "decode"))
NUM_GROUPS = 12
BANK = 96
SHARED_TOKENS = 768
OWN_TOKENS = 96
REQUEST_SECONDS = 120.0


class Bench(Record, frozen=True, kw_only=True):
    """What is run."""

    profile: str
    streams: int
    flips: int
    waits: int
    rounds: int
    pause: float
    """Seconds between two flips."""
    window: float
    """Seconds before and after the flips of a round."""


class Flip(Record, frozen=True, kw_only=True):
    """One change of a role."""

    mode: str
    way: str
    outcome: str
    client_ms: float
    server_ms: float
    migrated: int


class Seen:
    """What the streams saw."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.gaps: dict[str, list[float]] = {"quiet": [], "flips": []}
        self.phase = "quiet"
        self.texts: dict[int, str] = {}


def beginning(group: int) -> list[int]:
    """The tokens that all prompts of a group begin with."""
    rng = random.Random(1000 + group)
    return [rng.randrange(8, 1000) for _ in range(SHARED_TOKENS)]


def body_of(number: int, *, fresh: int | None) -> dict[str, Any]:
    """Request `number` of the bank; `fresh` gives it an ending that was never asked before."""
    rng = random.Random(number if fresh is None else 10**6 + fresh)
    own = [rng.randrange(8, 1000) for _ in range(OWN_TOKENS)]
    return {
        "model": MODEL,
        "prompt": beginning(number % NUM_GROUPS) + own,
        "max_tokens": rng.randrange(100, 500),
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def ask(
    session: aiohttp.ClientSession, url: str, body: dict[str, Any], seen: Seen
) -> str | None:
    """The text of one answer; None if it was no whole answer, which is counted."""
    text: list[str] = []
    ends = dones = tokens = 0
    last = 0.0
    try:
        async with session.post(url + "/v1/completions", json=body) as reply:
            if reply.status != 200:
                seen.counts[f"status {reply.status}"] += 1
                return None
            async for line in reply.content:
                if not line.startswith(b"data: "):
                    continue
                now = time.monotonic()
                if last:
                    seen.gaps[seen.phase].append(now - last)
                last = now
                if line.startswith(b"data: [DONE]"):
                    dones += 1
                    continue
                event = msgspec.json.decode(line[6:])
                if "error" in event:
                    seen.counts[f"error {event['error']['code']}"] += 1
                    return None
                for choice in event["choices"]:
                    text.append(choice["text"])
                    ends += choice["finish_reason"] is not None
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    except (TimeoutError, aiohttp.ClientError) as error:
        seen.counts[f"lost: {type(error).__name__}"] += 1
        return None
    if (ends, dones) != (1, 1):
        seen.counts["lost" if not ends or not dones else "ended twice"] += 1
        return None
    if tokens != body["max_tokens"]:
        seen.counts["wrong number of tokens"] += 1
    return "".join(text)


class Run:
    """One server, from its start to its end."""

    def __init__(self, server: Server, bench: Bench, mode: str, seen: Seen, seed: int) -> None:
        self._server = server
        self._bench = bench
        self._mode = mode
        self._seen = seen
        self._rng = random.Random(seed)
        self._fresh = seed * 10**5
        self._url = f"http://127.0.0.1:{server.port}"
        self._over = False
        self.flips: list[Flip] = []
        self.hits: dict[str, float] = {}

    async def run(self, num_flips: int) -> None:
        """References, then load with a window before the flips, the flips, a window after."""
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=REQUEST_SECONDS)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            await self._references(session)
            users = [asyncio.create_task(self._user(session)) for _ in range(self._bench.streams)]
            await asyncio.sleep(2.0)
            await self._window("before", asyncio.sleep(self._bench.window))
            self._seen.phase = "flips"
            await self._window("during", self._flip_all(session, num_flips))
            self._seen.phase = "quiet"
            await self._window("after", asyncio.sleep(self._bench.window))
            self._over = True
            await asyncio.gather(*users)

    async def _references(self, session: aiohttp.ClientSession) -> None:
        """The bank's answers, once per run of the tool."""
        gate = asyncio.Semaphore(self._bench.streams)

        async def one(number: int) -> None:
            async with gate:
                text = await ask(session, self._url, body_of(number, fresh=None), self._seen)
            if text is None:
                raise SystemExit(f"no answer without flips: {dict(self._seen.counts)}")
            if self._seen.texts.setdefault(number, text) != text:
                self._seen.counts["different"] += 1

        await asyncio.gather(*(one(number) for number in range(BANK)))

    async def _user(self, session: aiohttp.ClientSession) -> None:
        seen = self._seen
        while not self._over:
            number, fresh = self._rng.randrange(BANK), None
            if self._rng.random() < 0.5:
                self._fresh += 1
                fresh = self._fresh
            text = await ask(session, self._url, body_of(number, fresh=fresh), seen)
            seen.counts["answers"] += 1
            if text is not None and fresh is None:
                seen.counts["compared"] += 1
                seen.counts["different"] += text != seen.texts[number]

    async def _flip_all(self, session: aiohttp.ClientSession, num_flips: int) -> None:
        for index in range(num_flips):
            worker, role = CYCLE[index % len(CYCLE)]
            path = f"{self._url}/admin/workers/{worker}/role"
            begun = time.monotonic()
            async with session.post(path, json={"role": role}) as reply:
                document = await reply.json()
            taken = time.monotonic() - begun
            if reply.status != 200:
                raise SystemExit(f"a flip was refused: {document}")
            self.flips.append(
                Flip(
                    mode=self._mode,
                    way="P->D" if role == "decode" else "D->P",
                    outcome=document["outcome"],
                    client_ms=1000 * taken,
                    server_ms=1000 * document["seconds"],
                    migrated=document["migrated"],
                )
            )
            await asyncio.sleep(self._bench.pause * (0.5 + self._rng.random()))

    async def _window(self, name: str, work: Any) -> None:
        before = await self._totals()
        await work
        after = await self._totals()
        asked = after["prompt_tokens"] - before["prompt_tokens"]
        cached = after["cached_tokens"] - before["cached_tokens"]
        self.hits[name] = cached / asked if asked else 0.0

    async def _totals(self) -> dict[str, int]:
        loop = asyncio.get_running_loop()
        state = await loop.run_in_executor(None, self._server.get, "/admin/state")
        totals: dict[str, int] = json.loads(state)["totals"]
        return totals


def measure(bench: Bench) -> dict[str, Any]:
    """All rounds of both modes, in turns."""
    seen = {mode: Seen() for mode in ("migrate", "wait")}
    flips: list[Flip] = []
    hits: list[dict[str, Any]] = []
    for number in range(bench.rounds):
        for mode, total in (("migrate", bench.flips), ("wait", bench.waits)):
            drain = 2.0 if mode == "migrate" else 600.0
            options = Options(
                devices=f"paced:4@{bench.profile}",
                assignments=(
                    f"roles.initial={ROLES}",
                    f"roles.wind_down={mode}",
                    f"roles.drain_seconds={drain}",
                ),
            )
            with running_server(options, num_workers=4) as server:
                run = Run(server, bench, mode, seen[mode], seed=number + 1)
                asyncio.run(run.run(-(-total // bench.rounds)))
                state = json.loads(server.get("/admin/state"))
            flips += run.flips
            hits.append({"mode": mode, "round": number, "cached_share": run.hits})
            print(mode, run.hits, dict(seen[mode].counts), file=sys.stderr, flush=True)
            moves = Counter(
                {f"{m['kind']} {m['outcome']}": m["count"] for m in state["transfers"]["moves"]}
            )
            seen[mode].counts.update(moves)
    return {
        "flips": [summary(flips, mode, way) for mode in seen for way in ("P->D", "D->P")],
        "cached_share": hits,
        "streams": {mode: streams(each) for mode, each in seen.items()},
        "every_flip": [msgspec.to_builtins(flip) for flip in flips],
    }


def summary(flips: Sequence[Flip], mode: str, way: str) -> dict[str, Any]:
    """One direction of one mode."""
    mine = [flip for flip in flips if (flip.mode, flip.way) == (mode, way)]
    client = [flip.client_ms for flip in mine]
    server = [flip.server_ms for flip in mine]
    return {
        "mode": mode,
        "way": way,
        "number": len(mine),
        "outcomes": Counter(flip.outcome for flip in mine),
        "client_ms": _spread(client),
        "server_ms": _spread(server),
        "migrated": sum(flip.migrated for flip in mine),
    }


def streams(seen: Seen) -> dict[str, Any]:
    """What the clients saw of one mode."""
    return {
        "counts": dict(sorted(seen.counts.items())),
        "gap_ms": {
            phase: _spread([1000 * gap for gap in gaps]) for phase, gaps in seen.gaps.items()
        },
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    shares = {"median": 0.5, "p99": 0.99, "max": 1.0}
    return {name: round(quantile(values, share), 2) for name, share in shares.items()}


def bad(result: dict[str, Any]) -> list[str]:
    """Everything that must not have happened."""
    allowed = ("answers", "compared", "hand-off", "migration")
    found = [
        f"{mode}: {count} {name}"
        for mode, each in result["streams"].items()
        for name, count in each["counts"].items()
        if count and not name.startswith(allowed)
    ]
    found += [
        f"{each['mode']} {each['way']}: {each['outcomes']}"
        for each in result["flips"]
        if set(each["outcomes"]) != {"done"}
    ]
    return found


def main(arguments: Sequence[str]) -> int:
    """Command line; 0 if nothing was lost, doubled or rolled back."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", default="h200-8b")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--flips", type=int, default=208, help="by migration, of all rounds")
    parser.add_argument("--waits", type=int, default=40, help="by waiting, of all rounds")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--pause", type=float, default=0.25)
    parser.add_argument("--window", type=float, default=8.0)
    parser.add_argument("--json", type=Path)
    options = vars(parser.parse_args(arguments))
    file: Path | None = options.pop("json")
    bench = Bench(**options)
    result = {
        "command": list(arguments),
        "machine": machine(),
        "bench": msgspec.to_builtins(bench),
        **measure(bench),
    }
    if file is not None:
        file.write_text(json.dumps(result, indent=1) + "\n")
    shown = {name: result[name] for name in ("flips", "cached_share", "streams")}
    print(json.dumps(shown, indent=1))
    for words in bad(result):
        print("BAD:", words)
    return 1 if bad(result) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
