"""One run: items, a policy, a machine; what the clients saw of it."""

from collections.abc import Sequence
from typing import NamedTuple

from msgspec.structs import replace

from appliance.core.messages import Input
from appliance.core.node_config import DispatcherConfig
from appliance.core.slots import Policy
from appliance.core.types import BatcherConfig, Record, WorkerId, WorkerSpec
from appliance.metrics.outcome import Outcome
from appliance.policy.choice import PolicyChoice
from appliance.sim.machine import Machine
from appliance.sim.node import Kill, Setting, Tape, VirtualNode
from appliance.workload.items import Item

MAX_QUEUE, MAX_QUEUE_TOKENS = 10**6, 10**10
DRAIN_SECONDS = 600.0
"""How long after the last arrival answers may take."""


class Extras(Record, frozen=True, kw_only=True):
    """What else is known of a run. `seconds` is its length, drain included."""

    seconds: float
    steps: int
    busy_share: float
    """Of the workers' time, in which a step was computed."""
    flips: int
    """Roles that were set."""
    moves: int
    """Sequences that went on at another worker."""
    demotions: int
    copies: int
    copied_bytes: int


class SimulationResult(NamedTuple):
    """What a run was like."""

    outcomes: list[Outcome]
    """One per item, in their order."""
    instance_seconds: float
    extras: Extras


class Ablation(Record, frozen=True, kw_only=True):
    """What is taken away from the system under test."""

    budgets: bool = False
    """Requests do not say their targets."""
    migration: bool = False
    """Nothing moves to balance the node (hand-offs and drains still do)."""
    flips: bool = False
    """Nobody changes its role."""
    prefix_cache: bool = False
    """No block is found by content."""
    prefix_pull: bool = False
    """No cached block is copied from a peer."""


def simulate(
    items: Sequence[Item],
    choice: PolicyChoice,
    machine: Machine,
    *,
    seed: int = 0,
    validate: bool = False,
    ablation: Ablation | None = None,
    kills: Sequence[Kill] = (),
    script: Sequence[tuple[float, Input]] = (),
    drain_seconds: float = DRAIN_SECONDS,
    tape: Tape | None = None,
    dispatcher: DispatcherConfig | None = None,
) -> SimulationResult:
    """Let `items` (sorted by their times) be served on `machine` by this policy.

    Equal arguments give equal results, to the bit. `seed` is that of the step times. `validate`
    checks the laws after every message and step (slow: for small machines). `kills` and `script`
    say what else happens when. `tape` records what the Dispatcher hears and says. Raises
    `PolicySettingsError` for roles that do not fit the machine.
    """
    ablation = ablation or Ablation()
    policy = _without(choice.make(), ablation)
    setting = Setting(
        machine=machine,
        dispatcher=dispatcher_config(machine, ablation, dispatcher),
        batcher=batcher_config(machine, ablation),
        workers=worker_specs(choice, machine),
        seed=seed,
        blind=ablation.budgets,
        validate=validate,
        kills=tuple(kills),
        script=tuple(script),
    )
    node = VirtualNode(setting, policy, items=items, tape=tape)
    last = items[-1].at if items else 0.0
    node.run(until=last + drain_seconds)
    outcomes = sorted(node.outcomes, key=lambda outcome: outcome.index)
    instance_seconds = node.dispatcher.instance_seconds(node.events.now)
    busy = node.busy_seconds + sum(worker.busy_seconds for worker in node.workers.values())
    steps = node.finished_steps + sum(worker.steps for worker in node.workers.values())
    extras = Extras(
        seconds=node.seconds,
        steps=steps,
        busy_share=busy / instance_seconds if instance_seconds else 0.0,
        flips=node.flips,
        moves=node.moves,
        demotions=node.demotions,
        copies=node.traffic.num_jobs,
        copied_bytes=node.traffic.num_bytes,
    )
    return SimulationResult(outcomes, instance_seconds, extras)


def dispatcher_config(
    machine: Machine, ablation: Ablation, base: DispatcherConfig | None = None
) -> DispatcherConfig:
    """The node's bounds on this machine: those of `base`, or the default ones with a queue in which
    everything finds room (what waits is then the policy's business, as in the live sweeps)."""
    first = machine.num_workers + machine.num_standby
    spares = tuple(
        WorkerSpec(id=WorkerId(first + index), devices=(f"sim:{first + index}",))
        for index in range(machine.num_spares)
    )
    config = base or DispatcherConfig(
        max_model_len=machine.max_model_len, max_queue=MAX_QUEUE, max_queue_tokens=MAX_QUEUE_TOKENS
    )
    return replace(
        config,
        max_model_len=machine.max_model_len,
        block_bytes=machine.block_bytes,
        prefix_pull=config.prefix_pull and not (ablation.prefix_pull or ablation.prefix_cache),
        spares=spares,
    )


def batcher_config(machine: Machine, ablation: Ablation) -> BatcherConfig:
    """The bounds of every worker."""
    return BatcherConfig(
        max_model_len=machine.max_model_len,
        max_num_seqs=machine.max_num_seqs,
        max_batch_tokens=machine.max_batch_tokens,
        depth=machine.depth,
        enable_prefix_cache=not ablation.prefix_cache,
    )


def worker_specs(choice: PolicyChoice, machine: Machine) -> tuple[WorkerSpec, ...]:
    """Those that serve, with their roles, then those on standby. Raises `PolicySettingsError`."""
    roles = choice.role_tuple(machine.num_workers)
    serving = [
        WorkerSpec(id=WorkerId(index), devices=(f"sim:{index}",), role=role)
        for index, role in enumerate(roles)
    ]
    first = machine.num_workers
    standby = [
        WorkerSpec(id=WorkerId(index), devices=(f"sim:{index}",), parked=True)
        for index in range(first, first + machine.num_standby)
    ]
    return (*serving, *standby)


def _without(policy: Policy, ablation: Ablation) -> Policy:
    dispatch = policy.dispatch
    if ablation.migration:
        dispatch = replace(dispatch, migrate=None)
    if ablation.flips:
        dispatch = replace(dispatch, roles=None)
    return replace(policy, dispatch=dispatch)
