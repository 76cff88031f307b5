"""What it costs to bring KV from one worker to another over shared memory.

    python -m tools.bench_transfer [--megabytes 100] [--repeats 9] [--moves 30] [--json OUT]

Rates: blocks at random places of one pool are copied to random places of another, no two of them
adjacent, by the copying thread of a worker: from handing over the job to the wake-up of the loop,
generations looked up before and after. Beside each copy, in turn, one plain `memcpy` of as many
bytes between the same two pools; the share is the median of the quotients.

Latency: a sequence is handed from one step loop to another (paced engine, both in threads of this
process, which has nothing else to do meanwhile): from the moment when the copy of the last block
ends to the moment when the engine gets the first step that computes the sequence.
"""

import argparse
import ctypes
import json
import mmap
import os
import random
import select
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from appliance.core.faults import FaultPlan
from appliance.core.kv_layout import index_offset, pool_bytes
from appliance.core.peer import CopyDone, CopyJob
from appliance.core.peer_links import PeerUp
from appliance.core.types import MoveId, WorkerId
from appliance.worker.fault_actions import FaultPoints
from appliance.worker.kv_index import OwnIndex, map_own_index
from appliance.worker.mover import Mover
from appliance.worker.transfer import Bytes, SharedMemoryTransfer
from tools.transfer_pair import Pair

BLOCK_KIB = (16, 32, 128)
PROMPTS = (128, 4096)
PEER = WorkerId(1)


class Pool:
    """A pool in shared memory, every page touched."""

    def __init__(self, *, num_blocks: int, block_bytes: int) -> None:
        self.up = PeerUp(
            peer=PEER,
            epoch=1,
            num_blocks=num_blocks,
            block_bytes=block_bytes,
            index_offset=index_offset(num_blocks=num_blocks, block_bytes=block_bytes),
        )
        self.fd = os.memfd_create("pool")
        size = pool_bytes(num_blocks=num_blocks, block_bytes=block_bytes)
        os.ftruncate(self.fd, size)
        self.memory = memoryview(mmap.mmap(self.fd, size))
        whole: Bytes = np.frombuffer(self.memory, np.uint8)
        whole[: self.up.index_offset] = 1
        self.address = whole.ctypes.data
        index = map_own_index(self.fd, num_blocks=num_blocks, offset=self.up.index_offset)
        OwnIndex(index, num_blocks=num_blocks, block_bytes=block_bytes, epoch=1)

    def close(self) -> None:
        """Close the descriptor; the memory goes with its last mapping."""
        os.close(self.fd)


def spread_blocks(rng: random.Random, num_blocks: int, count: int) -> tuple[int, ...]:
    """`count` blocks in random order, no two of them neighbours."""
    return tuple(2 * place for place in rng.sample(range(num_blocks // 2), count))


def measure_rate(block_bytes: int, *, num_bytes: int, repeats: int) -> dict[str, object]:
    """Copies of `num_bytes` in blocks of this size, beside one plain copy each."""
    count = num_bytes // block_bytes
    num_blocks = 2 * count
    theirs = Pool(num_blocks=num_blocks, block_bytes=block_bytes)
    ours = Pool(num_blocks=num_blocks, block_bytes=block_bytes)
    transfer = SharedMemoryTransfer(ours.memory, num_blocks=num_blocks, block_bytes=block_bytes)
    pool = transfer.open(theirs.up, theirs.fd)
    pool.probe()
    faults = FaultPoints(FaultPlan((), worker=PEER, epoch=1))
    mover = Mover(checksum=transfer.checksum, faults=faults)
    rng = random.Random(block_bytes)
    whole = count * block_bytes

    def blocks() -> float:
        job = CopyJob(
            move=MoveId(1),
            peer=PEER,
            sources=spread_blocks(rng, num_blocks, count),
            targets=spread_blocks(rng, num_blocks, count),
            generations=(0,) * count,
        )
        began = time.perf_counter()
        mover.copy(job, pool)
        select.select([mover.fileno()], [], [])
        (done,) = mover.drain()
        seconds = time.perf_counter() - began
        if not isinstance(done, CopyDone) or done.failed:
            raise RuntimeError(f"the copy failed: {done}")
        return seconds

    shares, rates, plain_rates = list[float](), list[float](), list[float]()
    for turn in range(repeats + 1):
        seconds, began = blocks(), time.perf_counter()
        ctypes.memmove(ours.address, theirs.address, whole)
        plain = time.perf_counter() - began
        if turn:  # the first one warms
            shares.append(plain / seconds)
            rates.append(whole / seconds / 1e9)
            plain_rates.append(whole / plain / 1e9)
    mover.stop()
    theirs.close()
    ours.close()
    return {
        "block_kib": block_bytes // 1024,
        "blocks": count,
        "gb_per_s": spread(rates),
        "memcpy_gb_per_s": spread(plain_rates),
        "share": spread(shares),
    }


def measure_latency(prompt_tokens: int, *, moves: int) -> dict[str, object]:
    """Hand-offs of one sequence at a time; seconds between landing and first step, and between the
    source's stop and the report of the target, in milliseconds."""
    pair = Pair(max_model_len=max(PROMPTS) + 64)
    landed: list[float] = []
    stopped: list[float] = []
    try:
        for number in range(moves + 3):
            handed = pair.hand_off(number + 1, prompt_tokens=prompt_tokens)
            if number >= 3:  # the first ones warm
                landed.append(1000 * handed.landed_to_step)
                stopped.append(1000 * handed.stopped_to_pulled)
    finally:
        pair.close()
    return {
        "prompt_tokens": prompt_tokens,
        "moves": moves,
        "landed_to_first_step_ms": spread(landed),
        "stopped_to_pulled_ms": spread(stopped),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, extremes and the 90th percentile."""
    ordered = sorted(values)
    return {
        "median": statistics.median(ordered),
        "min": ordered[0],
        "p90": ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))],
        "max": ordered[-1],
    }


def lines(results: dict[str, list[dict[str, object]]]) -> Iterator[str]:
    """For people."""
    yield "block KiB  GB/s (min-max)            memcpy GB/s   share (min-max)"
    for row in results["rates"]:
        rate, plain, share = row["gb_per_s"], row["memcpy_gb_per_s"], row["share"]
        assert isinstance(rate, dict)
        assert isinstance(plain, dict)
        assert isinstance(share, dict)
        yield (
            f"{row['block_kib']:>9}  {rate['median']:5.2f} ({rate['min']:.2f}-{rate['max']:.2f})"
            f"{plain['median']:20.2f}   {share['median']:6.1%} "
            f"({share['min']:.1%}-{share['max']:.1%})"
        )
    for row in results["latency"]:
        landed, stopped = row["landed_to_first_step_ms"], row["stopped_to_pulled_ms"]
        assert isinstance(landed, dict)
        assert isinstance(stopped, dict)
        yield (
            f"prompt {row['prompt_tokens']}: last block to first step {landed['median']:.3f} ms "
            f"(p90 {landed['p90']:.3f}, max {landed['max']:.3f}); source's stop to KvPulled "
            f"{stopped['median']:.3f} ms (max {stopped['max']:.3f})"
        )


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=100, help="10^6 bytes of one copy")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--moves", type=int, default=30)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    results: dict[str, list[dict[str, object]]] = {
        "rates": [
            measure_rate(1024 * kib, num_bytes=given.megabytes * 10**6, repeats=given.repeats)
            for kib in BLOCK_KIB
        ],
        "latency": [measure_latency(tokens, moves=given.moves) for tokens in PROMPTS],
    }
    for line in lines(results):
        print(line)
    if given.json:
        given.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
