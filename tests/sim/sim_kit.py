"""Small machines and workloads for runs of the simulator."""

from collections.abc import Sequence

from msgspec.structs import replace

from appliance.core.types import Slo
from appliance.metrics.outcome import Outcome
from appliance.policy.choice import parse_choice
from appliance.sim.machine import Machine, parse_machine
from appliance.sim.simulation import SimulationResult, simulate
from appliance.workload.generate import generate
from appliance.workload.items import Item
from appliance.workload.spec import load_spec

MAX_LEN = 512


def small_machine(num_workers: int = 3, **changes: object) -> Machine:
    """Few blocks, so that laws are checked in no time and memory is short."""
    wanted: dict[str, object] = {
        "num_blocks": 96,
        "max_num_seqs": 8,
        "max_batch_tokens": 96,
        "max_model_len": MAX_LEN,
        "start_seconds": 0.3,
        **changes,
    }
    return parse_machine(f"h200:{num_workers}", **wanted)


def some_items(num: float = 60, *, rate: float = 60.0, seed: int = 1) -> list[Item]:
    """Short requests of the workload "five"."""
    spec = replace(load_spec("five"), length_scale=0.1, max_len=MAX_LEN)
    return generate(spec, rate=rate, seconds=num / rate, seed=seed)


def sharing(items: Sequence[Item], *, every: int = 3) -> list[Item]:
    """Items that begin alike in groups: three blocks of 24 tokens of which the last one differs."""
    return [
        replace(
            item,
            prompt_tokens=max(item.prompt_tokens, 80),
            output_tokens=min(item.output_tokens, 300),
            max_tokens=min(item.max_tokens, 300),
            prefix=(item.index % every, 7, 100 + item.index),
            prefix_block_tokens=24,
        )
        for item in items
    ]


def run(
    policy: str, items: Sequence[Item], machine: Machine, **options: object
) -> SimulationResult:
    """A validated run."""
    options.setdefault("validate", True)
    return simulate(items, parse_choice(policy), machine, **options)  # type: ignore[arg-type]


def one_item(prompt: int, answer: int, *, at: float = 0.0, index: int = 0) -> Item:
    return Item(
        index=index,
        at=at,
        class_name="one",
        prompt_tokens=prompt,
        output_tokens=answer,
        max_tokens=MAX_LEN,
        slo=Slo(),
    )


def fates(outcomes: Sequence[Outcome]) -> dict[int, tuple[bool, int]]:
    return {each.index: (each.finished, each.num_tokens) for each in outcomes}
