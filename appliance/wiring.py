"""From the plan to the objects of a node: each package gets its own frozen settings.

Nothing here decides anything; it translates names and units (milliseconds of the configuration into
the seconds of everything else).
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from appliance import __version__
from appliance.api.limits import KeyLimits
from appliance.api.settings import ApiKey, ApiSettings, ConnectionLimits
from appliance.config import Config
from appliance.config_sections import KeySection, LimitsSection, SloSection
from appliance.core.dispatcher import DispatcherConfig
from appliance.core.faults import FaultRule
from appliance.core.types import OnMiss, Slo
from appliance.live.holding import HoldSettings
from appliance.live.journal_file import JournalFile
from appliance.live.node import Node
from appliance.live.settings import NodeSettings
from appliance.live.spawner import Spawner
from appliance.live.tokenise import TextService, TextSettings
from appliance.live.weight_slabs import WeightSettings
from appliance.live.workers import PoolPlan, WatchSettings
from appliance.staff import controller_settings, has_controller
from appliance.startup import Plan

WORKER_ENTRY = "appliance.worker.main:run"
MAX_WEIGHT_THREADS = 4
"""A name and not a function: this process never imports what a worker imports."""


def build_node(
    plan: Plan,
    *,
    faults: Sequence[FaultRule],
    spawner: Spawner,
    stderr: Callable[[str], object],
) -> Node:
    """The node of this plan, not started. `stderr` takes the lines that workers write to theirs.

    Raises `TokenizerError`, `TemplateFailed` or `JournalFileError`."""
    config = plan.config
    text = TextService(
        plan.checkpoint.directory,
        TextSettings(
            max_model_len=plan.batcher.max_model_len,
            vocab_size=plan.checkpoint.shape.vocab_size,
            block_tokens=config.kv.block_tokens,
            hash_key=os.urandom(32),
            prefix_cache=config.kv.prefix_cache,
            max_pending_bytes=config.limits.max_tokenising_bytes,
        ),
    )
    return Node(
        node_settings(plan, faults),
        text,
        policy=plan.policy,
        spawner=spawner,
        stderr=stderr,
        journal_file=_journal_file(config.journal.path),
    )


def dispatcher_config(plan: Plan) -> DispatcherConfig:
    """Bounds of the node's scheduler."""
    queue, workers = plan.config.queue, plan.config.workers
    roles, transfer = plan.config.roles, plan.config.transfer
    return DispatcherConfig(
        max_model_len=plan.batcher.max_model_len,
        max_queue=queue.max_requests,
        max_queue_tokens=queue.max_tokens,
        respawn_backoff=workers.respawn_backoff_ms / 1000,
        respawn_backoff_max=workers.respawn_backoff_max_ms / 1000,
        quarantine_deaths=workers.quarantine_deaths,
        poison_deaths=workers.poison_deaths,
        trial_steps=workers.trial_steps,
        max_trials=workers.max_trials,
        spared_deaths=workers.spared_deaths,
        lease_seconds=transfer.lease_seconds,
        prefix_pull=transfer.prefix_pull and plan.config.kv.prefix_cache,
        pull_gain=transfer.pull_gain,
        block_bytes=plan.memory.block,
        steps=plan.steps,
        drain_seconds=roles.drain_seconds,
        wind_down=roles.wind_down,
        flip_seconds=roles.flip_seconds,
        park_seconds=roles.park_seconds,
        spares=plan.devices.spares,
    )


def node_settings(plan: Plan, faults: Sequence[FaultRule]) -> NodeSettings:
    """Everything the live node is told."""
    config, checkpoint = plan.config, plan.checkpoint
    return NodeSettings(
        model=plan.served_name,
        version=__version__,
        fingerprint=checkpoint.fingerprint,
        model_dir=str(checkpoint.directory),
        dtype=plan.dtype,
        eos_token_ids=checkpoint.eos_ids,
        workers=plan.devices.workers,
        engine=plan.devices.engine,
        pool=PoolPlan(
            entry=WORKER_ENTRY,
            weight_bytes=plan.memory.weights,
            num_blocks=plan.num_blocks,
            block_bytes=plan.memory.block,
            weights=weight_settings(plan),
        ),
        batcher=plan.batcher,
        block_tokens=config.kv.block_tokens,
        num_blocks=plan.num_blocks,
        host_blocks=plan.host_blocks,
        dispatcher=dispatcher_config(plan),
        policy=config.policy.name,
        policy_settings=config.policy.settings,
        role_settings=controller_settings(config) if has_controller(config) else None,
        profile=plan.devices.profile,
        threads=plan.threads,
        native=config.engine.native,
        watch=WatchSettings(
            silence_seconds=config.workers.stop_detect_ms / 1000,
            kill_seconds=config.workers.stall_kill_seconds,
        ),
        holding=HoldSettings(
            busy_above=config.stream.join_above,
            relaxed_below=config.stream.join_above * 5 / 6,
            calm_below=config.stream.join_above / 2,
            longest=config.stream.join_ms / 1000,
        ),
        heartbeat_seconds=config.workers.heartbeat_ms / 1000,
        stall_seconds=config.workers.stall_seconds,
        journal_records=config.journal.ring_records,
        faults=tuple(faults),
        validate=config.journal.check_laws,
        log_level=config.log.level,
        log_json=config.log.format == "json",
    )


def weight_settings(plan: Plan) -> WeightSettings:
    """How workers come to their weights."""
    section = plan.config.weights
    threads = section.threads
    return WeightSettings(
        share=section.share,
        threads=min(MAX_WEIGHT_THREADS, plan.machine.cores) if threads == "auto" else threads,
        full_check=section.checksums == "full" or plan.config.journal.check_laws,
    )


def api_settings(config: Config) -> ApiSettings:
    """Everything the HTTP surface is told."""
    limits = config.limits
    longest = limits.max_prompt_tokens
    return ApiSettings(
        max_body_bytes=config.server.max_body_bytes,
        max_stream_buffer_bytes=config.server.max_stream_buffer_bytes,
        tool_format=config.model.tool_format,
        reasoning=config.model.reasoning,
        slo_classes={name: slo_class(name, section) for name, section in config.slo.items()},
        max_sequences=limits.max_answers,
        max_prompt_tokens=None if longest == "auto" else longest,
        max_messages=limits.max_messages,
        max_stop_strings=limits.max_stop_strings,
        max_stop_length=limits.max_stop_chars,
        connections=connection_limits(limits),
        keys=tuple(api_key(section) for section in config.key),
        metrics_need_key=config.server.metrics_need_key,
        cors_origins=config.cors.origins,
    )


def connection_limits(section: LimitsSection) -> ConnectionLimits:
    """Bounds of connections."""
    return ConnectionLimits(
        max_connections=section.max_connections,
        max_line_bytes=section.max_line_bytes,
        max_headers=section.max_headers,
        receive_seconds=section.receive_seconds,
        idle_seconds=section.idle_seconds,
        stuck_seconds=section.stuck_seconds,
        max_receiving_bytes=section.max_receiving_bytes,
    )


def api_key(section: KeySection) -> ApiKey:
    """One key; 0 is "no limit"."""
    return ApiKey(
        name=section.name,
        digest=bytes.fromhex(section.sha256),
        slo_class=section.slo_class,
        admin=section.admin,
        cache_group=section.cache_group,
        limits=KeyLimits(
            requests_per_minute=section.requests_per_minute or None,
            tokens_per_minute=section.tokens_per_minute or None,
            max_concurrent_requests=section.max_concurrent_requests or None,
        ),
    )


def slo_class(name: str, section: SloSection) -> Slo:
    """The class in seconds; 0 ms is "no target"."""
    return Slo(
        class_name=name,
        ttft=section.ttft_ms / 1000 or None,
        tpot=section.tpot_ms / 1000 or None,
        e2e=section.e2e_ms / 1000 or None,
        weight=section.weight,
        on_miss=OnMiss(section.on_miss),
    )


def _journal_file(path: str) -> JournalFile | None:
    return JournalFile(Path(path)) if path else None
