"""A process like the server: uvloop, a node, workers; says what it sees, then serves until it is
killed. Run as `python -m tests.live.server_process ENGINE`.

Prints one JSON line: pids, and the names of modules that must not be in this process.
"""

import asyncio
import json
import sys

import uvloop

from tests.live.node_kit import ENTRY, PRELOAD, make_settings, running, submit


async def serve(engine: str) -> None:
    """Serve one answer, report, wait for the end."""
    settings = make_settings(engine=engine, num_blocks=160, entry=ENTRY)
    async with running(settings) as node:
        ticket, (answer,) = await submit(node, "spell cat", max_tokens=8)
        await ticket.done
        report = {
            "workers": [worker["pid"] for worker in node.state()["workers"]],
            "tokens": answer.tokens,
            "sources": [stats.weights_source for stats in node.stats.workers.values()],
            "torch": sorted(name for name in sys.modules if name.split(".")[0] == "torch"),
            "preload": PRELOAD[engine],
        }
        sys.stdout.write(json.dumps(report) + "\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1]))
