"""Do real clients work unmodified? Each in an environment of its own, against a real server.

For every client: make a virtual environment (once), install the published package, run a short
program that uses it as its manual says, or its command. Nothing of the clients is patched, and the
server gets no special setting. One line per thing tried.

    python -m tools.try_clients --home DIR --only openai litellm

guidellm needs torch: the CPU build is installed first, so that no CUDA packages are drawn. litellm
needs `mcp` as soon as a request has tools, and does not draw it itself.
"""

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from appliance.core.types import Record
from tools.client_programs import INSTRUCTOR, LANGCHAIN, LITELLM, OPENAI, PRELUDE

ROOT = Path(__file__).resolve().parents[1]
MODEL = "tiny-tasks"
TOKENIZER = ROOT / "models" / MODEL
CLIENT_SECONDS = 600


class Client(Record, frozen=True, kw_only=True):
    """One client: what to install, and either a program or a command that stands in for it."""

    packages: Sequence[str]
    shown: Sequence[str]
    """Packages whose versions the report names."""
    program: str = ""
    command: Sequence[str] = ()
    """`{url}`, `{base}`, `{model}`, `{tokenizer}`, `{trace}` and `{out}` are filled in."""
    proof: str = ""
    """A file in `{out}` that the command must have written."""


class Row(Record, frozen=True):
    """One thing tried."""

    client: str
    outcome: str
    what: str
    words: str


CLIENTS: Mapping[str, Client] = {
    "openai": Client(packages=["openai"], shown=["openai"], program=OPENAI),
    "litellm": Client(packages=["litellm", "mcp"], shown=["litellm", "openai"], program=LITELLM),
    "langchain": Client(
        packages=["langchain-openai"], shown=["langchain-openai", "openai"], program=LANGCHAIN
    ),
    "instructor": Client(
        packages=["instructor"], shown=["instructor", "openai"], program=INSTRUCTOR
    ),
    "aiperf": Client(
        packages=["aiperf"],
        shown=["aiperf"],
        command=(
            *("aiperf", "profile", "-m", "{model}", "--url", "{url}", "--endpoint-type", "chat"),
            *("--streaming", "--input-file", "{trace}", "--custom-dataset-type", "mooncake_trace"),
            *("--fixed-schedule", "--tokenizer", "{tokenizer}", "--ui-type", "none"),
            *("--use-server-token-count", "--output-artifact-dir", "{out}", "--random-seed", "1"),
        ),
        proof="profile_export_aiperf.json",
    ),
    "guidellm": Client(
        packages=["torch==2.13.0+cpu", "guidellm"],
        shown=["guidellm", "torch"],
        command=(
            *("guidellm", "run", "--backend", "kind=openai_http,target={url},model={model}"),
            *("--profile", "kind=concurrent,streams=4", "--constraint"),
            *("kind=max_requests,count=24", "--tokenizer"),
            *("kind=huggingface_auto,model={tokenizer}", "--data"),
            *("kind=synthetic_text,prompt_tokens=64,output_tokens=16", "--output"),
            *("kind=json,path={out}/benchmarks.json", "--disable-progress"),
        ),
        proof="benchmarks.json",
    ),
}


def install(home: Path, name: str) -> tuple[Path, str]:
    """The environment's bin folder and the versions in it; made when it is not there."""
    place, client = home / name, CLIENTS[name]
    python = place / "bin" / "python"
    if not python.exists():
        venv.create(place, with_pip=True)
    for package in client.packages:  # one by one: the order matters
        quiet = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*quiet, package], check=True)
    code = (
        "import sys; from importlib.metadata import version; "
        "print(', '.join(f'{name} {version(name)}' for name in sys.argv[1:]))"
    )
    command = [str(python), "-c", code, *client.shown]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    return python.parent, found.stdout.strip()


def write_trace(path: Path) -> None:
    """A small trace with arrival times and, per row, fields of the body."""
    rng = random.Random(1)
    rows = [
        {
            "timestamp": 250 * number,
            "input_length": rng.choice((40, 120, 400)),
            "output_length": rng.choice((8, 24, 60)),
            "extra": {
                "ttft_slo_ms": rng.choice((200, 1000)),
                "tpot_slo_ms": 50,
                "ignore_eos": True,
                "seed": number,
            },
        }
        for number in range(24)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_program(program: str, binaries: Path, url: str) -> list[tuple[str, str, str]]:
    """Run a program of ours around the client; what it says of each thing tried."""
    done = subprocess.run(
        [str(binaries / "python"), "-c", PRELUDE + program],
        env={**os.environ, "BASE_URL": url + "/v1", "MODEL": MODEL},
        capture_output=True,
        text=True,
        timeout=CLIENT_SECONDS,
        check=False,
    )
    lines = [line.split("\t") for line in done.stdout.splitlines() if line.startswith("@\t")]
    found = [(outcome, what, words) for _, outcome, what, words in lines]
    if done.returncode != 0:
        found.append(("FAILED", "program", done.stderr.strip().splitlines()[-1]))
    return found


def run_command(client: Client, binaries: Path, url: str, out: Path) -> list[tuple[str, str, str]]:
    """Run the client's own command; it must end well and leave its report."""
    out.mkdir(parents=True, exist_ok=True)
    trace = out / "trace.jsonl"
    write_trace(trace)
    filled = [
        part.format(
            url=url, base=url + "/v1", model=MODEL, tokenizer=TOKENIZER, trace=trace, out=out
        )
        for part in client.command
    ]
    done = subprocess.run(
        [str(binaries / filled[0]), *filled[1:]],
        env={**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=CLIENT_SECONDS,
        check=False,
    )
    (out / "output.txt").write_text(done.stdout + done.stderr)
    what = " ".join(filled[:2])
    if done.returncode == 0 and (out / client.proof).is_file():
        return [("ok", what, measured(out / client.proof))]
    return [("FAILED", what, f"code {done.returncode}; {(done.stdout + done.stderr)[-300:]}")]


def measured(file: Path) -> str:
    """The counts of requests in a client's report."""
    document = json.loads(file.read_text())
    if "benchmarks" in document:
        totals = document["benchmarks"][0]["metrics"]["request_totals"]
        return ", ".join(f"{name} {count}" for name, count in totals.items())
    counts = {name: document.get(name) for name in ("request_count", "error_request_count")}
    words = ", ".join(f"{name} {(each or {}).get('avg', 0):g}" for name, each in counts.items())
    return f"{words}, {as_long_as_asked(file.parent)} answers as long as their row asked"


def as_long_as_asked(out: Path) -> int:
    """Answers whose length is that of their row in the trace, which only the row's own `ignore_eos`
    makes certain."""
    rows = [json.loads(line) for line in (out / "trace.jsonl").read_text().splitlines()]
    records = (out / "profile_export.jsonl").read_text().splitlines()
    num_equal = 0
    for record in map(json.loads, records):
        row = rows[int(record["metadata"]["conversation_id"].rpartition("_")[2])]
        num_equal += record["metrics"]["usage_completion_tokens"]["value"] == row["output_length"]
    return num_equal


def start_server(devices: str, log: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A server that is ready, and its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "appliance", "start", "--devices", devices]
    command += ["--set", "devices.threads=1"]  # clients and server share few cores
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, "--port", str(port)], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT
        )
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            with urllib.request.urlopen(url + "/ready", timeout=5):
                return process, url
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    process.kill()
    raise SystemExit(f"the server did not become ready:\n{log.read_text()}")


def main(arguments: Sequence[str]) -> int:
    """Try the named clients; 0 if everything worked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--home", type=Path, required=True, help="where the environments live")
    parser.add_argument("--only", nargs="+", choices=list(CLIENTS), default=list(CLIENTS))
    parser.add_argument("--devices", default="cpu:1")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    args.home.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    ready = {name: install(args.home, name) for name in args.only}
    process, url = start_server(args.devices, args.home / "server.log")
    try:
        for name, (binaries, versions) in ready.items():
            client = CLIENTS[name]
            found = (
                run_program(client.program, binaries, url)
                if client.program
                else run_command(client, binaries, url, args.home / f"{name}-out")
            )
            rows.extend(Row(versions, *each) for each in found)
    finally:
        process.terminate()
        process.wait(60)
    table = Table("client", "outcome", "what", "answer")
    for row in rows:
        table.add_row(row.client, row.outcome, row.what, row.words[:100])
    Console(width=160).print(table)
    if args.json:
        args.json.write_bytes(msgspec.json.format(msgspec.json.encode(rows), indent=1) + b"\n")
    return 0 if rows and all(row.outcome == "ok" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
