"""What a hand-off costs a request: the first tokens of an answer, disaggregated and mixed.

The prefill worker streams the first token itself, so the time to the first token ends before the
hand-off. What the hand-off delays is the second token. One request at a time, fresh prompts of
each length, two workers, in turns: mixed, and one prefill and one decode worker. Times are taken at
the node, without HTTP. The node's own account of the hand-off (from the stop at the source to going
on at the target) stands beside them.

    python -m tools.bench_handoff --devices cpu:2 --json docs/results/handoff.json
"""

import argparse
import asyncio
import json
import random
import sys
import time
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import uvloop

from appliance.core.payload import Sampling
from appliance.live.node import Node
from appliance.live.records import Delta, End, Submission
from tools.bench_turns import SETTLE_SECONDS, Arm, open_node
from tools.control_kit import machine, quantile

LENGTHS = (128, 4000)
ANSWER_TOKENS = 12
ARMS = (
    Arm(name="mixed", roles="mixed", shared=True),
    Arm(name="1P1D", roles="prefill,decode", shared=True),
)


class Timed:
    """A sink that keeps the time of each token."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.failed = ""

    def push(self, delta: Delta) -> None:
        """Tokens have come."""
        self.times += [time.monotonic()] * len(delta.tokens)

    def end(self, end: End) -> None:
        """The answer is over."""
        self.failed = "" if end.error is None else end.message


async def ask(node: Node, length: int, draw: random.Random) -> dict[str, float]:
    """One request with a prompt that nobody has seen."""
    ids = [draw.randrange(300, node.info.vocab_size) for _ in range(length)]
    prompt = await node.text.encode_ids(array("i", ids))
    sink, began = Timed(), time.monotonic()
    spec = Submission(
        name=f"ask-{began}",
        prompt=prompt,
        sampling=Sampling(temperature=0.0, ignore_eos=True),
        max_tokens=ANSWER_TOKENS,
    )
    await node.submit(spec, [sink]).done
    if sink.failed or len(sink.times) != ANSWER_TOKENS:
        raise SystemExit(f"a prompt of {length} tokens: {len(sink.times)} tokens, {sink.failed}")
    gaps = [later - sooner for sooner, later in zip(sink.times, sink.times[1:], strict=False)]
    return {
        "ttft_ms": 1000 * (sink.times[0] - began),
        "second_ms": 1000 * gaps[0],
        "later_ms": 1000 * quantile(gaps[2:], 0.5),
    }


def pulled(node: Node) -> float:
    """Seconds that all hand-offs so far have taken, by the node's account."""
    paths = node.state()["transfers"]["paths"]
    return float(sum(path["seconds"] for path in paths if path["kind"] == "hand-off"))


async def run_arm(arm: Arm, options: argparse.Namespace, *, seed: int) -> list[dict[str, Any]]:
    """All lengths on a fresh node."""
    node, draw = open_node(arm, options), random.Random(seed)
    node.start()
    try:
        await node.wait_ready(2)
        await asyncio.sleep(SETTLE_SECONDS)  # links are probed
        rows = []
        for length in LENGTHS:
            await ask(node, length, draw)  # the first touches memory
            for _ in range(options.requests):
                before = pulled(node)
                row: dict[str, Any] = {"arm": arm.name, "length": length, "seed": seed}
                row |= await ask(node, length, draw)
                row["handoff_ms"] = 1000 * (pulled(node) - before)
                rows.append(row)
        return rows
    finally:
        await node.close()


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Median, 10 % and 90 % quantile per arm and length."""
    table = []
    for length in LENGTHS:
        for arm in ARMS:
            mine = [row for row in rows if row["arm"] == arm.name and row["length"] == length]
            line: dict[str, Any] = {"arm": arm.name, "length": length, "requests": len(mine)}
            for key in ("ttft_ms", "second_ms", "later_ms", "handoff_ms"):
                values = [row[key] for row in mine]
                line[key] = [round(quantile(values, share), 3) for share in (0.5, 0.1, 0.9)]
            line["handoff_share_of_ttft"] = round(line["handoff_ms"][0] / line["ttft_ms"][0], 4)
            table.append(line)
    return table


def main() -> None:
    """Both arms in turns; one line per arm and length at the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--devices", default="cpu:2")
    parser.add_argument("--requests", type=int, default=8, help="per length, arm and repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for repeat in range(options.repeats):
        for arm in ARMS:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                rows += runner.run(run_arm(arm, options, seed=repeat))
    for line in summary(rows):
        print(
            f"{line['length']:5d} tokens  {line['arm']:6} ttft {line['ttft_ms'][0]:8.2f} ms  "
            f"second token +{line['second_ms'][0]:6.2f} ms  later +{line['later_ms'][0]:5.2f} ms  "
            f"hand-off {line['handoff_ms'][0]:6.2f} ms "
            f"({100 * line['handoff_share_of_ttft']:.1f} % of the ttft)",
            flush=True,
        )
    record = {"command": sys.argv[1:], "machine": machine(), "summary": summary(rows), "rows": rows}
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
