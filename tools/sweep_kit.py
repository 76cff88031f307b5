"""One run of a live sweep: a fresh server, the open-loop client against it, what came of it.

The server and its workers are those of `appliance start`, the client is `appliance bench`, each a
process of its own on cores of its own where the machine has them. Every run has a server of its
own, so that nothing learnt or cached passes from one to the next.
"""

import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import msgspec
from msgspec import field

from appliance.config import bundled_models
from appliance.core.types import Record
from appliance.metrics.document import read_lines
from appliance.metrics.outcome import Outcome
from appliance.metrics.phases import Recovery, recoveries
from appliance.metrics.score import Summary, attained, first_miss
from appliance.policy.choice import PolicyChoice, parse_choice
from appliance.workload.arrivals import change_times, parse_arrivals
from appliance.workload.spec import WorkloadSpec, load_spec
from tools.control_kit import ROOT, Options, Server, cpu_seconds, pin, running_server

VOID = 3
"""Exit code of a client that was late."""
BLOCK_SECONDS = 5.0
"""Length of the blocks that intervals are drawn from (`tools.sweep_report`)."""
LIMITS = (
    "queue.max_requests=1000000",
    "queue.max_tokens=10000000000",
    "limits.max_connections=18000",
)
"""Nothing is turned away at the door: what waits is the policy's business."""


class Cores(Record, frozen=True, kw_only=True):
    """Who runs where."""

    server: tuple[int, ...] = (0,)
    workers: tuple[int, ...] = (0, 1)
    client: tuple[int, ...] = (1,)


class Setup(Record, frozen=True, kw_only=True):
    """What all runs of a sweep have in common."""

    devices: str
    workload: str = "five"
    seconds: float = 75.0
    warm_up: float = 10.0
    drain: float = 120.0
    positions: int = 16384
    """Longest prompt and answer, tokens."""
    max_num_seqs: int = 256
    max_batch_tokens: int = 2048
    cores: Cores = Cores()
    priority: int = 0
    assignments: tuple[str, ...] = ()
    """Further `--set` arguments."""


class Plan(Record, frozen=True, kw_only=True):
    """One run. `policy` is a word of `appliance.policy.choice`; `load` is what the results call the
    rate (requests per second)."""

    policy: str
    arrivals: str
    load: float
    rate: float
    seed: int

    @property
    def key(self) -> tuple[str, str, float, int]:
        """What tells runs of one file apart."""
        return self.policy, self.arrivals, self.load, self.seed


class Block(Record, frozen=True, kw_only=True):
    """Requests due in one stretch of the span: (offered, attained) by class."""

    counts: Mapping[str, tuple[int, int]]


MOST_BUSY = 0.93
"""Share of all cores in use above which a run is void: workers would not keep their pace."""
TICKS = os.sysconf("SC_CLK_TCK")


class LiveRun(Summary, frozen=True, kw_only=True):
    """A line of the results: the scores, and what the tables and tests of differences need."""

    devices: str = ""
    rate: float = 0.0
    """As asked for; `offered_rate` is what chance made of it."""
    blocks: tuple[Block, ...] = ()
    recoveries: tuple[Recovery, ...] = ()
    span_end: float = 0.0
    """Seconds from the start of the run to the end of what counts."""
    piece_goodput: tuple[float, ...] = ()
    """Attained requests per second between the changes of the arrivals."""
    batch_done: float | None = None
    """Seconds from the end of the load to the last token of what has no first-token target; None:
    some never ended."""
    cpu: Mapping[str, float] = field(default_factory=dict)
    """Share of one core, by who used it, while requests were sent; "machine": share of all cores,
    whoever used them."""
    version: str = ""
    when: float = 0.0

    @property
    def key(self) -> tuple[str, str, float, int]:
        """As that of its `Plan`."""
        return self.policy, self.arrivals, self.load, self.seed


def read_runs(path: Path) -> list[LiveRun]:
    """Runs of a file of lines; a cut-off last line is none, void ones are left out."""
    return [run for run in read_lines(path, LiveRun) if not run.void]


def model_directory(positions: int, *, parent: Path) -> Path:
    """The bundled model with that many positions: links to its files, and a changed config.json.
    For paced workers, which compute nothing and so need no trained positions."""
    source = bundled_models() / "tiny-tasks"
    target = parent / f"tiny-{positions}"
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        link = target / path.name
        if path.name != "config.json" and not link.exists():
            link.symlink_to(path)
    config = json.loads((source / "config.json").read_text())
    text = json.dumps(config | {"max_position_embeddings": positions}, indent=1)
    (target / "config.json").write_text(text + "\n")
    return target


def num_workers(devices: str) -> int:
    """4 of "paced:4@h200-8b"."""
    return int(devices.partition("@")[0].rpartition(":")[2])


def server_options(setup: Setup, plan: Plan, *, model: str) -> Options:
    """How the server of this run is started."""
    choice = parse_choice(plan.policy)
    return Options(
        devices=setup.devices,
        model=model,
        assignments=(
            f"batch.max_num_seqs={setup.max_num_seqs}",
            f"batch.max_batch_tokens={setup.max_batch_tokens}",
            *LIMITS,
            *policy_assignments(choice, num_workers(setup.devices)),
            *slo_assignments(load_spec(setup.workload)),
            *setup.assignments,
        ),
        server_cores=setup.cores.server,
        worker_cores=setup.cores.workers,
        priority=setup.priority,
    )


def policy_assignments(choice: PolicyChoice, workers: int) -> list[str]:
    """`--set` arguments that make a server use this policy and these roles."""
    roles = "auto"
    if not choice.controller:
        roles = ",".join(role.value for role in choice.role_tuple(workers))
    settings = ", ".join(f"{name} = {_toml(value)}" for name, value in choice.settings.items())
    return [
        f'policy.name="{choice.name}"',
        f"policy.settings={{{settings}}}",
        f'roles.initial="{roles}"',
    ]


def slo_assignments(spec: WorkloadSpec) -> list[str]:
    """The classes of the workload, known to the server by name, without targets: those come with
    each request."""
    return [f"slo.{one.name}.weight={one.weight:g}" for one in spec.classes]


def run_live(setup: Setup, plan: Plan, *, outcomes_directory: Path) -> LiveRun:
    """Start a server, run the client against it, stop it; what came of it.

    Every outcome is kept as a line of a gzip'd file in `outcomes_directory`. Raises `SystemExit`,
    and keeps nothing, if the client fails or the server ends by itself."""
    with tempfile.TemporaryDirectory(prefix="sweep-") as name:
        place = Path(name)
        model = "tiny-tasks"
        if setup.devices.startswith("paced"):
            model = str(model_directory(setup.positions, parent=place))
        options = server_options(setup, plan, model=model)
        with running_server(options, num_workers=num_workers(setup.devices)) as server:
            files = (place / "scores.json", place / "outcomes.jsonl")
            before = server.cpu()
            command = client_command(setup, plan, f"http://127.0.0.1:{server.port}", files)
            began = time.monotonic()
            with subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            ) as client:
                try:
                    pin(client.pid, setup.cores.client)
                    cpu = _watch(client, server, before, began=began, seconds=setup.seconds)
                finally:
                    client.kill()  # does nothing to one that has ended
        outcomes = read_outcomes(files[1])
        summary = _only_summary(files[0])
    keep_outcomes(outcomes_directory / f"{file_name(plan)}.jsonl.gz", outcomes)
    return live_run(setup, plan, summary, outcomes, cpu=cpu)


def client_command(setup: Setup, plan: Plan, url: str, files: tuple[Path, Path]) -> list[str]:
    """The client of one run, writing scores and outcomes."""
    return [
        sys.executable, "-m", "appliance", "bench", "--url", url,
        "--workload", setup.workload, "--rate", repr(plan.rate), "--seconds", repr(setup.seconds),
        "--warm-up", repr(setup.warm_up), "--drain", repr(setup.drain),
        "--arrivals", plan.arrivals, "--seed", str(plan.seed), "--policy-name", plan.policy,
        "--json", str(files[0]), "--outcomes", str(files[1]),
    ]  # fmt: skip


def _watch(
    client: "subprocess.Popen[bytes]",
    server: Server,
    before: Mapping[str, float],
    *,
    began: float,
    seconds: float,
) -> dict[str, float]:
    """Wait for the client; CPU shares of everybody over the time in which it sends. Raises
    `SystemExit` if the server has ended meanwhile, or one of its workers, or the client failed."""
    shares: dict[str, float] = {}
    machine = machine_seconds()
    try:
        client.wait(max(1.0, seconds - 1.0))
    except subprocess.TimeoutExpired:
        _must_live(server)
        took = time.monotonic() - began
        try:
            after = server.cpu()
        except FileNotFoundError as error:
            raise SystemExit(
                f"a worker has ended during the run, which is not kept: {error}"
            ) from error
        used = {name: after[name] - before[name] for name in after if name in before}
        shares = {
            "server": used.pop("server", 0.0) / took,
            "client": cpu_seconds(client.pid) / took,
            "workers": sum(used.values()) / took,
        }
        busy, idle = (
            after - before for after, before in zip(machine_seconds(), machine, strict=True)
        )
        shares["machine"] = busy / max(1e-9, busy + idle)
    words = client.communicate()[0].decode(errors="replace")
    _must_live(server)
    if client.returncode not in (0, VOID):
        raise SystemExit(f"the client has ended with {client.returncode}:\n{words[-4000:]}")
    return {name: round(share, 3) for name, share in shares.items()}


def _must_live(server: Server) -> None:
    code = server.process.poll()
    if code is not None:
        raise SystemExit(
            f"the server has ended with {code} during the run, which is not kept; see what it said"
            " above, then give the same command again"
        )


def machine_seconds() -> tuple[float, float]:
    """Seconds that all cores together were busy, and idle, since the machine started."""
    fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    idle = fields[3] + fields[4]
    return (sum(fields) - idle) / TICKS, idle / TICKS


def live_run(
    setup: Setup,
    plan: Plan,
    summary: Summary,
    outcomes: Sequence[Outcome],
    *,
    cpu: Mapping[str, float],
) -> LiveRun:
    """The line of a run, from its scores and outcomes."""
    spec = load_spec(setup.workload)
    shares = {one.name: one.share for one in spec.classes}
    arrivals = parse_arrivals(plan.arrivals)
    changes = change_times(arrivals, rate=plan.rate, seconds=setup.seconds, shares=shares)
    fields = {name: getattr(summary, name) for name in summary.__struct_fields__}
    fields |= {"policy": plan.policy, "arrivals": plan.arrivals, "load": plan.load}
    if cpu.get("machine", 0.0) > MOST_BUSY:
        fields |= {"void": True, "note": f"{fields['note']} the machine was busy".strip()}
    ordered = [0.0, *changes, setup.seconds]
    return LiveRun(
        **fields,
        devices=setup.devices,
        rate=plan.rate,
        blocks=blocks_of(outcomes, span=(setup.warm_up, setup.seconds)),
        recoveries=tuple(recoveries(outcomes, changes, end=setup.seconds)),
        span_end=setup.seconds,
        piece_goodput=tuple(goodput(outcomes, (start, end)) for start, end in pairwise(ordered)),
        batch_done=batch_done(outcomes),
        cpu=cpu,
        version=_version(),
        when=round(time.time(), 1),
    )


def blocks_of(outcomes: Iterable[Outcome], *, span: tuple[float, float]) -> tuple[Block, ...]:
    """Counts of the span, block by block; what is left over at the end joins the last one."""
    start, end = span
    number = max(1, int((end - start) / BLOCK_SECONDS))
    counts: list[dict[str, tuple[int, int]]] = [{} for _ in range(number)]
    for outcome in outcomes:
        if start <= outcome.at < end:
            block = counts[min(int((outcome.at - start) / BLOCK_SECONDS), number - 1)]
            offered, hits = block.get(outcome.class_name, (0, 0))
            block[outcome.class_name] = (offered + 1, hits + attained(outcome))
    return tuple(Block(counts=one) for one in counts)


def goodput(outcomes: Iterable[Outcome], span: tuple[float, float]) -> float:
    """Attained requests per second of those due in the span."""
    hits = sum(attained(each) for each in outcomes if span[0] <= each.at < span[1])
    return hits / (span[1] - span[0]) if span[1] > span[0] else 0.0


def batch_done(outcomes: Sequence[Outcome]) -> float | None:
    """Seconds from the last arrival to the last token of what has no TTFT target."""
    batch = [outcome for outcome in outcomes if outcome.slo.ttft is None]
    if any(first_miss(outcome) in ("error", "unfinished") for outcome in batch):
        return None
    ends = [outcome.last for outcome in batch if outcome.last is not None]
    last_due = max((outcome.at for outcome in outcomes), default=0.0)
    return max(0.0, max(ends, default=0.0) - last_due)


def read_outcomes(path: Path) -> list[Outcome]:
    """Outcomes of a file of lines, plain or gzip'd."""
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    return [msgspec.json.decode(line, type=Outcome) for line in data.splitlines() if line]


def keep_outcomes(path: Path, outcomes: Iterable[Outcome]) -> None:
    """Write outcomes as gzip'd lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = b"\n".join(msgspec.json.encode(outcome) for outcome in outcomes)
    path.write_bytes(gzip.compress(lines + b"\n", 5))


def file_name(plan: Plan) -> str:
    """A name for the files of a run."""
    words = f"{plan.policy}-{plan.arrivals}-{plan.load:g}-{plan.seed}"
    return "".join(letter if letter.isalnum() or letter in "-.@" else "_" for letter in words)


def _only_summary(path: Path) -> Summary:
    runs = json.loads(path.read_bytes())["runs"]
    return msgspec.convert(runs[-1], Summary)


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _version() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip()
