"""What the configuration says is what each package is told, in its own units."""

import msgspec

from appliance.api.limits import KeyLimits
from appliance.api.settings import ApiKey, ConnectionLimits
from appliance.config import Config, from_table, load
from appliance.devices import plan_devices
from appliance.live.weight_slabs import WeightSettings
from appliance.startup import Machine, Plan, make_plan
from appliance.wiring import api_settings, dispatcher_config, node_settings

CONFIGURED = {
    "server": {
        "max_body_bytes": "1MiB",
        "max_stream_buffer_bytes": "2KiB",
        "metrics_need_key": True,
    },
    "model": {
        "served_name": "mine",
        "max_model_len": 512,
        "dtype": "bfloat16",
        "tool_format": "hermes",
        "reasoning": "none",
    },
    "devices": {"threads": 3},
    "engine": {"native": "off"},
    "weights": {"share": "copy", "threads": 7, "checksums": "full"},
    "kv": {"block_tokens": 32, "memory": "64MiB", "prefix_cache": False},
    "batch": {"max_num_seqs": 7, "max_batch_tokens": 99, "depth": 2},
    "policy": {"settings": {"max_waiting": 5}},
    "stream": {"join_above": 0.8, "join_ms": 30.0},
    "queue": {"max_requests": 11, "max_tokens": 222},
    "workers": {
        "heartbeat_ms": 250,
        "stop_detect_ms": 900,
        "stall_seconds": 4,
        "stall_kill_seconds": 8,
        "respawn_backoff_ms": 50,
        "respawn_backoff_max_ms": 2000,
        "quarantine_deaths": 4,
        "poison_deaths": 5,
        "trial_steps": 6,
        "max_trials": 7,
        "spared_deaths": 0,
    },
    "roles": {
        "controller": "on",
        "settings": {"dwell": 4.0},
        "drain_seconds": 1.5,
        "flip_seconds": 2.5,
        "park_seconds": 3.5,
    },
    "transfer": {"lease_seconds": 4.5, "prefix_pull": False, "pull_gain": 0.5},
    "limits": {
        "max_prompt_tokens": 100,
        "max_messages": 5,
        "max_answers": 6,
        "max_stop_strings": 7,
        "max_stop_chars": 8,
        "max_line_bytes": 2048,
        "max_headers": 20,
        "max_connections": 9,
        "max_receiving_bytes": "1MiB",
        "max_tokenising_bytes": "3MiB",
        "receive_seconds": 10,
        "idle_seconds": 11,
        "stuck_seconds": 12,
    },
    "cors": {"origins": ["https://chat.example"]},
    "slo.chat": {"ttft_ms": 200, "tpot_ms": 0, "e2e_ms": 9000, "weight": 2},
    "log": {"format": "json", "level": "debug"},
    "journal": {"ring_records": 77, "check_laws": True},
}
"""Every key that reaches a package below, with a value that is not its default."""


def plan(config: Config, spec: str = "cpu:2") -> Plan:
    devices = plan_devices(spec, cores=2, count_gpus=lambda: 0)
    return make_plan(config, devices, machine=Machine(cores=2, free_bytes=8 * 1024**3))


def test_every_setting_arrives_in_seconds_and_bytes() -> None:
    given = load(None, CONFIGURED)
    settings = node_settings(plan(given), ())
    assert settings.model == "mine"
    assert settings.dtype == "bfloat16"
    assert settings.threads == 3
    assert settings.native == "off"
    assert (settings.block_tokens, settings.batcher.enable_prefix_cache) == (32, False)
    assert settings.batcher.max_model_len == settings.dispatcher.max_model_len == 512
    batcher = settings.batcher
    assert (batcher.max_num_seqs, batcher.max_batch_tokens, batcher.depth) == (7, 99, 2)
    assert settings.policy_settings == {"max_waiting": 5}
    assert settings.heartbeat_seconds == 0.25
    assert (settings.watch.silence_seconds, settings.watch.kill_seconds) == (0.9, 8.0)
    assert settings.stall_seconds == 4.0
    held = settings.holding
    assert (held.busy_above, held.calm_below, held.longest) == (0.8, 0.4, 0.03)
    assert round(held.relaxed_below, 3) == 0.667
    assert settings.journal_records == 77
    assert settings.validate is True
    assert (settings.log_level, settings.log_json) == ("debug", True)


def test_bounds_of_the_scheduler_arrive() -> None:
    found = dispatcher_config(plan(load(None, CONFIGURED)))
    assert (found.max_queue, found.max_queue_tokens) == (11, 222)
    assert (found.respawn_backoff, found.respawn_backoff_max) == (0.05, 2.0)
    assert (found.quarantine_deaths, found.poison_deaths) == (4, 5)
    assert (found.trial_steps, found.max_trials, found.spared_deaths) == (6, 7, 0)
    assert (found.drain_seconds, found.flip_seconds, found.park_seconds) == (1.5, 2.5, 3.5)
    assert (found.lease_seconds, found.prefix_pull, found.pull_gain) == (4.5, False, 0.5)


def test_copies_are_priced_with_the_size_of_a_block_and_not_made_without_a_cache() -> None:
    planned = plan(Config())
    found = dispatcher_config(planned)
    assert (found.prefix_pull, found.block_bytes) == (True, planned.memory.block)
    uncached = plan(load(None, {"kv": {"prefix_cache": False}}))
    assert not dispatcher_config(uncached).prefix_pull


def test_the_controller_of_roles_arrives_where_it_is_on() -> None:
    planned = plan(load(None, CONFIGURED))
    assert planned.policy.dispatch.roles is not None
    assert node_settings(planned, ()).role_settings == {"dwell": 4.0}
    usual = plan(Config())
    assert usual.policy.dispatch.roles is None
    assert node_settings(usual, ()).role_settings is None
    assert plan(load(None, {"roles": {"initial": "auto"}})).policy.dispatch.roles is not None


def test_roles_and_standby_workers_arrive() -> None:
    given = load(None, {"roles": {"initial": "prefill,decode"}, "standby": {"workers": 1}})
    workers = node_settings(plan(given), ()).workers
    assert [(each.id, each.role.value, each.parked) for each in workers] == [
        (0, "prefill", False),
        (1, "decode", False),
        (2, "mixed", True),
    ]


def test_classes_arrive_in_seconds_and_zero_is_no_target() -> None:
    found = api_settings(load(None, CONFIGURED))
    assert found.max_body_bytes == 1024**2
    assert found.max_stream_buffer_bytes == 2048
    assert (found.tool_format, found.reasoning) == ("hermes", "none")
    chat, default = found.slo_classes["chat"], found.slo_classes["default"]
    assert (chat.class_name, chat.ttft, chat.tpot, chat.weight) == ("chat", 0.2, None, 2.0)
    assert (chat.e2e, default.e2e) == (9.0, None)
    assert (default.class_name, default.ttft, default.tpot) == ("default", None, None)


def test_bounds_of_requests_and_connections_arrive() -> None:
    found = api_settings(load(None, CONFIGURED))
    assert (found.max_prompt_tokens, found.max_messages, found.max_sequences) == (100, 5, 6)
    assert (found.max_stop_strings, found.max_stop_length) == (7, 8)
    assert (found.metrics_need_key, found.cors_origins) == (True, ("https://chat.example",))
    assert found.connections == ConnectionLimits(
        max_line_bytes=2048,
        max_headers=20,
        max_connections=9,
        max_receiving_bytes=1024**2,
        receive_seconds=10.0,
        idle_seconds=11.0,
        stuck_seconds=12.0,
    )
    assert api_settings(Config()).max_prompt_tokens is None
    assert api_settings(Config()).connections == ConnectionLimits()


def test_keys_arrive_with_their_limits_and_zero_is_no_limit() -> None:
    table = {"name": "a", "sha256": "0A" * 32, "admin": True, "cache_group": "g"}
    limited = {"requests_per_minute": 1, "tokens_per_minute": 2, "max_concurrent_requests": 3}
    plain = {"name": "b", "sha256": "0b" * 32}
    found = api_settings(from_table({"key": [{**table, **limited}, plain]})).keys
    assert found == (
        ApiKey(
            name="a",
            digest=b"\n" * 32,
            admin=True,
            cache_group="g",
            limits=KeyLimits(requests_per_minute=1, tokens_per_minute=2, max_concurrent_requests=3),
        ),
        ApiKey(name="b", digest=b"\v" * 32),
    )
    assert api_settings(Config()).keys == ()


def test_weights_are_copied_as_configured_and_the_laws_check_every_byte() -> None:
    found = node_settings(plan(load(None, CONFIGURED), "cpu:2"), ()).pool.weights
    assert found == WeightSettings(share="copy", threads=7, full_check=True)
    planned = plan(Config(), "cpu:2")
    usual = node_settings(planned, ()).pool.weights
    assert usual == WeightSettings(threads=min(4, planned.machine.cores))
    checked = from_table({"journal": {"check_laws": True}})
    assert node_settings(plan(checked, "cpu:2"), ()).pool.weights.full_check


def test_slabs_are_those_of_the_plan() -> None:
    for spec in ("cpu:2", "paced:3"):
        planned = plan(Config(), spec)
        pool = node_settings(planned, ()).pool
        assert (pool.weight_bytes, pool.kv_bytes) == (planned.memory.weights, planned.memory.kv)
        assert (pool.weight_bytes > 0) == (spec == "cpu:2")


def test_no_value_here_is_a_default() -> None:
    given, built_in = (msgspec.to_builtins(c) for c in (load(None, CONFIGURED), Config()))
    same = [
        f"{section}.{key}"
        for section, values in CONFIGURED.items()
        if section in built_in
        for key in values
        if given[section][key] == built_in[section][key]
    ]
    assert not same
