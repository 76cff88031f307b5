"""Configuration: strict, self-describing, refused by name (R20)."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from appliance import config as configuration
from appliance.config import (
    Config,
    ConfigError,
    KeySection,
    from_table,
    load,
    parse_assignment,
    parse_size,
)
from appliance.core.types import Slo
from appliance.wiring import slo_class
from appliance.workload.spec import class_slos, load_spec

A, B = "a" * 64, "b" * 64
ROOT = Path(__file__).resolve().parent.parent


def all_keys() -> list[str]:
    """Every key there is, as `section.key`."""
    names = []
    for section in msgspec.structs.fields(Config):
        kind = {"slo": configuration.SloSection, "key": KeySection}.get(section.name, section.type)
        prefix = "slo.default" if section.name == "slo" else section.name
        names += [f"{prefix}.{field.name}" for field in msgspec.structs.fields(kind)]
    return names


def entry(**fields: str) -> str:
    """A [[key]] entry."""
    return "[[key]]\n" + "".join(f"{name} = {json.dumps(v)}\n" for name, v in fields.items())


KEY_EXAMPLE = re.compile(r"^# \[\[key\]\]\n(?:^# .*\n)+", re.MULTILINE)
"""An entry that is a comment, because without one there are no keys."""


SLO_EXAMPLES = re.compile(r"^# \[slo\.chat\]\n(?:^#.*\n)+", re.MULTILINE)
"""Classes that are comments, because without them there is only the default one."""


def key_example(text: str) -> str:
    """That entry as if it were none."""
    return re.sub(r"^# ", "", KEY_EXAMPLE.search(text)[0], flags=re.MULTILINE)


def write(directory: Path, text: str) -> Path:
    path = directory / "given.toml"
    path.write_text(text)
    return path


def refused(directory: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(write(directory, text))
    return str(caught.value)


def test_the_commented_file_equals_the_built_in_defaults() -> None:
    assert load(ROOT / "config.toml") == Config() == load(None)
    assert configuration.default_text() == (ROOT / "config.toml").read_text()


def test_the_commented_file_lists_every_key_and_says_its_default() -> None:
    section, comment, found = "", "", {}
    text = (ROOT / "config.toml").read_text()
    for line in text.replace(KEY_EXAMPLE.search(text)[0], key_example(text)).splitlines():
        if line.startswith("["):
            section, comment = line.strip("[]"), ""
        elif line.startswith("#"):
            comment += line.lstrip("#")
        elif "=" in line:
            found[f"{section}.{line.split('=')[0].strip()}"] = comment
            comment = ""
    assert list(found) == all_keys()
    silent = [key for key, text in found.items() if "Default" not in text]
    assert not silent, f"no default named in the comment of {silent}"


def test_the_example_of_a_key_says_the_defaults() -> None:
    (key,) = from_table(tomllib.loads(key_example(configuration.default_text()))).key
    assert key == KeySection(name="alice", sha256="0" * 64)


def test_the_example_classes_are_those_of_the_workload_five() -> None:
    example = SLO_EXAMPLES.search(configuration.default_text())[0]
    text = re.sub(r"^# ?", "", example, flags=re.MULTILINE)
    given = from_table(tomllib.loads(text)).slo
    classes = {name: slo_class(name, section) for name, section in given.items()}
    assert classes == {"default": Slo(), **class_slos(load_spec("five"))}


def test_every_duration_and_size_names_its_unit() -> None:
    units = ("_ms", "_seconds", "_bytes", "_tokens", "_records", "_requests", "_deaths", "_seqs")
    units += ("_messages", "_answers", "_strings", "_chars", "_headers", "_connections", "_trials")
    units += ("_workers",)
    unitless = {
        field: key
        for key in all_keys()
        if (field := key.rpartition(".")[2]).startswith("max_")
        and not field.endswith((*units, "_len"))
    }
    assert not unitless


def test_order_of_search_is_given_then_local_then_built_in(tmp_path: Path) -> None:
    assert configuration.find_file(None, directory=tmp_path) is None
    local = tmp_path / "config.toml"
    local.write_text("")
    given = write(tmp_path, "[server]\nport = 1\n")
    assert configuration.find_file(None, directory=tmp_path) == local
    assert configuration.find_file(str(given), directory=tmp_path) == given
    with pytest.raises(ConfigError, match=r"--config .*absent\.toml: no such file"):
        configuration.find_file(str(tmp_path / "absent.toml"), directory=tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[server]\nprot = 1", "unknown key server.prot; did you mean server.port?"),
        ("[servr]\nport = 1", "unknown section servr; did you mean server?"),
        ("[kv]\nzzz = 1", "unknown key kv.zzz; known: block_tokens, memory, prefix_cache"),
        ("[slo.chat]\ntftt_ms = 1", "unknown key slo.chat.tftt_ms; did you mean slo.chat.ttft_ms?"),
        ("[server]\nport = 70000", "server.port = 70000: expected an integer from 0 to 65535"),
        ("[server]\nport = '80'", "server.port = '80': expected an integer from 0 to 65535"),
        (
            "[batch]\nmax_num_seqs = true",
            "batch.max_num_seqs = true: expected an integer of at least 1",
        ),
        ("[batch]\nmax_num_seqs = 0", "batch.max_num_seqs = 0: expected an integer of at least 1"),
        ("[batch]\ndepth = 3", "batch.depth = 3: expected an integer from 0 to 2"),
        ("[kv]\nmemory = '12 parsecs'", "kv.memory = '12 parsecs': '12 parsecs' is not a size"),
        (
            "[kv]\nmemory = false",
            "kv.memory = false: expected an integer of at least 1 (bytes), or",
        ),
        ("[kv]\nprefix_cache = 1", "kv.prefix_cache = 1: expected true or false"),
        ("[workers]\nheartbeat_ms = 0", "workers.heartbeat_ms = 0: expected a number above 0"),
        ("[log]\nformat = 'xml'", "log.format = 'xml': expected one of: human, json"),
        ("[slo]\ndefault = 3", "slo.default: is a section; write [slo.default]"),
        ("server = 3", "server: is a section; write [server]"),
        ("[server", "is not TOML"),
        ("[workers]\nstop_detect_ms = 50", "workers.stop_detect_ms = 50.0: must be at least twice"),
        ("[workers]\nrespawn_backoff_ms = 20000", "workers.respawn_backoff_max_ms = 10000.0"),
        ("[batch]\nmax_batch_tokens = 8", "batch.max_batch_tokens = 8: must not be below"),
        ("[key]\nname = 'a'", "key: write each key as an entry [[key]]"),
        (entry(nmae="a"), "unknown key key[0].nmae; did you mean key[0].name?"),
        (entry(name="a"), "key[0].sha256: is missing"),
        (entry(name="a", sha256="00"), "key[0].sha256 = '00': expected "),
        (entry(name="a b", sha256=A), "key[0].name = 'a b'"),
        (entry(name="a\n", sha256=A), "key[0].name = 'a\\n'"),
        (entry(name="", sha256=A), "key[0].name = ''"),
        (entry(name="a", sha256=A, slo_class="x"), "key[0].slo_class = 'x': is not configured"),
        (entry(name="a", sha256=A) + entry(name="a", sha256=B), "key[1].name = 'a': is taken"),
        (entry(name="a", sha256=A) + entry(name="b", sha256=A.upper()), "that of the key 'a'"),
        (
            entry(name="a", sha256=A) + entry(name="b", sha256=B, cache_group="a"),
            "key[1].cache_group = 'a': is the name of a key that shares its cache with nobody",
        ),
        ("[cors]\norigins = ['chat.example']", "cors.origins[0] = 'chat.example'"),
        ("[cors]\norigins = ['http://a/b']", "cors.origins[0] = 'http://a/b'"),
        ("[cors]\norigins = ['*', 'http://a']", '"*" allows all; write it alone'),
        ("[slo.chat]\nttft_ms = inf", "slo.chat.ttft_ms = inf: expected a number from 0"),
        ("[slo.chat]\ntpot_ms = nan", "slo.chat.tpot_ms = nan: expected a number from 0"),
        ("[slo.chat]\ne2e_ms = 1.1e9", "slo.chat.e2e_ms = 1100000000.0: expected a number from 0"),
        ("[slo.chat]\nweight = inf", "slo.chat.weight = inf: expected a number "),
        ("[limits]\nmax_line_bytes = 5", "limits.max_line_bytes = 5: expected "),
        ("[limits]\nmax_prompt_tokens = 0", "limits.max_prompt_tokens = 0"),
        ("[limits]\nreceive_seconds = 0", "limits.receive_seconds = 0"),
    ],
)
def test_R20_what_cannot_be_used_is_refused_by_name(tmp_path: Path, text: str, words: str) -> None:
    said = refused(tmp_path, text)
    assert words in said
    assert said.startswith(str(tmp_path / "given.toml"))
    assert "\n" not in said


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"server": {"port": 70000}}, "--port: server.port = 70000: expected an integer from 0"),
        ({"server": {"prot": 1}}, "--set: unknown key server.prot"),
        ({"batch": {"max_batch_tokens": 1}}, "--set: batch.max_batch_tokens = 1: must not be"),
    ],
)
def test_R20_a_mistake_on_the_command_line_is_not_blamed_on_the_file(
    tmp_path: Path, overrides: dict[str, dict[str, Any]], words: str
) -> None:
    path = write(tmp_path, "[server]\nport = 1\n")
    for source in (path, None):
        with pytest.raises(ConfigError, match="^" + re.escape(words)):
            load(source, overrides, flags={"server.port": "--port"})
    broken = write(tmp_path, "[server]\nport = -1\n")
    with pytest.raises(ConfigError, match=r"given\.toml: server\.port = -1"):
        load(broken, {"server": {"host": "::1"}}, flags={"server.port": "--port"})
    assert load(broken, {"server": {"port": 1}}).server.port == 1


def test_overrides_win_over_the_file_and_leave_the_rest(tmp_path: Path) -> None:
    path = write(tmp_path, "[server]\nport = 1\nhost = '::1'\n[slo.chat]\nttft_ms = 200\n")
    overrides = {"server": {"port": 2}, "slo.chat": {"weight": 3.0}, "slo.batch": {"tpot_ms": 9}}
    config = load(path, overrides)
    assert (config.server.port, config.server.host) == (2, "::1")
    assert (config.slo["chat"].ttft_ms, config.slo["chat"].weight) == (200.0, 3.0)
    assert config.slo["batch"].tpot_ms == 9.0
    assert config.slo["default"] == configuration.SloSection()


def test_policy_settings_are_a_free_table_of_plain_values(tmp_path: Path) -> None:
    config = load(write(tmp_path, "[policy.settings]\nalpha = 0.5\nmode = 'x'\non = true\n"))
    assert config.policy.settings == {"alpha": 0.5, "mode": "x", "on": True}
    assert "policy.settings" in refused(tmp_path, "[policy.settings]\nalpha = [1]\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("server.port=1", 1), ("kv.memory=64MiB", "64MiB"), ("kv.memory='1KB'", "1KB")],
)
def test_assignments_from_the_command_line(text: str, expected: Any) -> None:
    section, key, value = parse_assignment(text)
    assert value == expected
    load(None, {section: {key: value}})


@pytest.mark.parametrize("text", ["port=1", "server.port", ".port=1", "server.=1"])
def test_a_malformed_assignment_says_how_to_write_it(text: str) -> None:
    with pytest.raises(ConfigError, match=r"write --set section\.key=value"):
        parse_assignment(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4096", 4096),
        ("256MiB", 256 * 2**20),
        ("1.5 GB", 1_500_000_000),
        ("2k", 2000),
        ("1 TiB", 2**40),
        ("7B", 7),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_size(text) == expected
    if expected > 1:
        assert load(None, {"kv": {"memory": text}}).kv.memory == expected


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1 parsec", "0x10"])
def test_what_is_not_a_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="256MiB"):
        parse_size(text)


def test_keys_that_name_one_cache_group_share_it() -> None:
    group = {"cache_group": "a"}
    keys = [{"name": "a", "sha256": A, **group}, {"name": "b", "sha256": B, **group}]
    assert [key.cache_group for key in from_table({"key": keys}).key] == ["a", "a"]


def test_keys_are_not_set_from_the_command_line() -> None:
    with pytest.raises(ConfigError, match=r"in the file only, each as \[\[key\]\]"):
        load(None, {"key": {"name": "a"}})


def test_sections_are_frozen() -> None:
    with pytest.raises(AttributeError):
        Config().server.port = 1  # type: ignore[misc]


def test_fault_plans_come_from_the_environment_or_the_file(tmp_path: Path) -> None:
    rule = '[{"point": "worker.start", "action": "exit", "worker": 1}]'
    path = tmp_path / "plan.json"
    path.write_text(rule)
    from_file = configuration.fault_rules(load(None, {"faults": {"plan": str(path)}}), environ={})
    inline = configuration.fault_rules(Config(), environ={"APPLIANCE_FAULTS": rule})
    assert from_file == inline
    assert inline[0].action == "exit"
    assert configuration.fault_rules(Config(), environ={}) == ()


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ("absent.json", "neither a JSON list nor a file"),
        ("[{]", "faults.plan"),
        ('[{"point": "here", "action": "kill"}]', "unknown fault point 'here'"),
        ('[{"point": "worker.start", "action": "sing"}]', "unknown fault action 'sing'"),
        ('[{"point": "worker.start", "action": "kill", "when": 1}]', "when"),
    ],
)
def test_R20_a_bad_fault_plan_is_refused_by_name(plan: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        configuration.fault_rules(load(None, {"faults": {"plan": plan}}), environ={})


def test_the_bundled_models_are_found() -> None:
    assert (configuration.bundled_models() / "tiny-tasks" / "config.json").is_file()
