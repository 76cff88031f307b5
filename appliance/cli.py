"""`appliance start`: the only place where the objects of a node are put together.

Order matters for the time to the first token: what can fail cheaply (arguments, configuration,
devices, the port, the checkpoint's headers) comes first; then the fork server begins its imports in
a process of its own, and this process does its own imports meanwhile.

Exit codes: 0 served and drained, or nothing to do; 1 it could not be served; 2 what was asked for
cannot be understood or cannot fit; 130 or 143 ended at once by a (second) signal. The last line on
stderr names cause and fix.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from appliance.timeline import Timeline

if TYPE_CHECKING:
    from appliance.config import Config
    from appliance.screen import Screen

FLAGS: Sequence[tuple[str, str, str, type, str]] = (
    ("--model", "model", "path", str, "directory, bundled model or local hub-cache id"),
    ("--served-model-name", "model", "served_name", str, "name that requests use"),
    ("--max-model-len", "model", "max_model_len", int, "longest prompt and answer, tokens"),
    ("--dtype", "model", "dtype", str, "auto, float32 or bfloat16"),
    ("--devices", "devices", "spec", str, "auto, cpu:2 or paced:4[@PROFILE]"),
    ("--roles", "roles", "initial", str, "mixed, auto, or one per worker: prefill,decode"),
    (
        "--policy",
        "policy",
        "name",
        str,
        "who is served first, and where: fcfs, edf, hyperflexis, ...",
    ),
    ("--host", "server", "host", str, "address to listen on"),
    ("--port", "server", "port", int, "TCP port, 0 for any free one"),
    ("--log-format", "log", "format", str, "human or json"),
    ("--log-level", "log", "level", str, "debug, info, warning or error"),
)
"""Flags that stand for a key: (flag, section, key, type, help)."""


PRELOAD: Mapping[str, Sequence[str]] = {
    "torch": ("appliance.worker.main", "appliance.worker.torch_engine"),
    "paced": ("appliance.worker.main", "appliance.worker.paced_engine"),
}
"""What the fork server imports before it forks workers, by engine; as names, for it alone."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    try:
        return _main(arguments)
    except KeyboardInterrupt:
        return 130


def _main(arguments: Sequence[str] | None) -> int:
    timeline = Timeline()
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["simulate"]:
        from appliance.simulate import main as simulate

        return simulate(given[1:])
    if given[:1] == ["bench"]:
        from appliance.bench.command import main as bench

        return bench(given[1:])
    if given[:1] == ["profile"]:
        from appliance.profiling import main as profile

        return profile(given[1:])
    parser = _parser()
    options = parser.parse_args(arguments)
    timeline.reached("python")
    if options.version:
        from appliance import __version__

        print(f"appliance {__version__}")
        return 0
    if options.command is None:
        parser.error("say what to do: appliance start")
    from appliance.config import ConfigError, default_text
    from appliance.listening import CannotServe
    from appliance.live.checkpoint import CheckpointError

    if options.command == "config":
        print(default_text(), end="")
        return 0
    try:
        if options.command == "key":
            return _key(options)
        return _start(options, timeline)
    except ConfigError as error:
        return _last_line(error, code=2)
    except (CheckpointError, CannotServe) as error:
        return _last_line(error, code=1)


def _last_line(error: Exception, *, code: int) -> int:
    print(f"appliance: {error}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="appliance", description="Serve a language model.")
    parser.add_argument("--version", action="store_true", help="print the version and end")
    commands = parser.add_subparsers(dest="command")
    start = commands.add_parser("start", help="serve a model over HTTP")
    start.add_argument("--config", metavar="F", help="configuration file (else ./config.toml)")
    for flag, section, key, kind, words in FLAGS:
        text = f"{words} (sets {section}.{key})"
        start.add_argument(flag, dest=f"{section}.{key}", type=kind, metavar="X", help=text)
    start.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="set any key of the configuration",
    )
    start.add_argument("--validate", action="store_true", help="check the scheduler's laws")
    start.add_argument("--dry-run", action="store_true", help="print the plan and end")
    made = commands.add_parser("key", help="make an API key: the entry for the configuration")
    made.add_argument("--name", required=True, help="whose key it is")
    made.add_argument("--admin", action="store_true", help="it opens the admin routes")
    commands.add_parser("simulate", help="try policies on a machine that is not here")
    commands.add_parser("bench", help="offer a workload to a server and score its answers")
    commands.add_parser("profile", help="measure how long steps last on a device")
    commands.add_parser("config", help="print the commented default configuration")
    return parser


def _key(options: argparse.Namespace) -> int:
    """The entry to stdout, to be appended to a file; the key to stderr, to be seen once."""
    from appliance.keys import entry, make_key

    key = make_key()
    print(entry(key, name=options.name, admin=options.admin), end="", flush=True)
    print(f"The key of {options.name}, shown only now: {key}", file=sys.stderr)
    return 0


def _start(options: argparse.Namespace, timeline: Timeline) -> int:
    """Everything that can fail without a process comes before the first process."""
    from appliance.config import fault_rules
    from appliance.devices import count_gpus, plan_devices
    from appliance.listening import listen
    from appliance.startup import make_plan, plan_kernels, read_machine

    config = _configuration(options)
    faults = fault_rules(config, environ=os.environ)
    machine = read_machine(cores=len(os.sched_getaffinity(0)))
    devices = plan_devices(config.devices.spec, cores=machine.cores, count_gpus=count_gpus)
    timeline.reached("configuration read")
    if options.dry_run:
        _screen().plan(make_plan(config, devices, machine=machine))
        return 0
    listener = listen(config.server.host, config.server.port)
    kernels = plan_kernels(config, devices)
    if kernels.fresh:
        timeline.reached("kernels built")
    plan = make_plan(config, devices, machine=machine, kernels=kernels)
    timeline.reached("port taken, checkpoint checked")

    from appliance.live.spawner import Spawner

    spawner = Spawner(PRELOAD[devices.engine])
    timeline.reached("fork server begun")

    from appliance import logs
    from appliance.serve import serve

    timeline.reached("server imported")
    logs.set_up(style=config.log.format, level=config.log.level)
    screen = _screen()
    screen.plan(plan)
    serve(plan, listener=listener, spawner=spawner, faults=faults, timeline=timeline, screen=screen)
    return 0


def _screen() -> "Screen":
    from appliance.screen import Screen

    return Screen()


def _configuration(options: argparse.Namespace) -> "Config":
    """File, then flags, then `--set`."""
    from appliance.config import find_file, load, parse_assignment

    overrides: dict[str, dict[str, Any]] = {}
    for _, section, key, _, _ in FLAGS:
        value = getattr(options, f"{section}.{key}")
        if value is not None:
            overrides.setdefault(section, {})[key] = value
    if options.validate:
        overrides.setdefault("journal", {})["check_laws"] = True
    for assignment in options.set:
        section, key, value = parse_assignment(assignment)
        overrides.setdefault(section, {})[key] = value
    flags = {f"{section}.{key}": flag for flag, section, key, _, _ in FLAGS}
    return load(find_file(options.config, directory=Path.cwd()), overrides, flags=flags)
