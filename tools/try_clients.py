"""Do real clients work unmodified? Each in an environment of its own, against a real server.

For every client: make a virtual environment (once), install the published package, run a short
program that uses it as its manual says, or its command. Nothing of the clients is patched, and the
server gets no special setting. One line per thing tried.

    python tools/try_clients.py --home /tmp/clients --only openai litellm

guidellm needs torch: the CPU build is installed first, so that no CUDA packages are drawn.
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

ROOT = Path(__file__).resolve().parents[1]
MODEL = "tiny-tasks"
TOKENIZER = ROOT / "models" / MODEL
CLIENT_SECONDS = 600
PRELUDE = """
import os
BASE, MODEL = os.environ["BASE_URL"], os.environ["MODEL"]
ASK = [{"role": "user", "content": "Spell ocean letter by letter."}]
def check(name, function):
    try:
        words, outcome = function(), "ok"
    except Exception as error:
        words, outcome = f"{type(error).__name__}: {error}", "FAILED"
    print("@", outcome, name, " ".join(str(words).split())[:300], sep="\\t", flush=True)
def raises(kind, function):
    try:
        function()
    except kind as error:
        return f"{type(error).__name__} {getattr(error, 'code', None) or ''}"
    raise AssertionError("nothing was raised")
"""
OPENAI = """
import openai
from openai import OpenAI
from pydantic import BaseModel
client = OpenAI(base_url=BASE, api_key="none")
chat, completions = client.chat.completions.create, client.completions.create
settings = {"model": MODEL, "messages": ASK, "temperature": 0}
class Person(BaseModel):
    name: str
    age: int
weather = {"type": "function", "function": {"name": "get_weather", "description": "Weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}},
                   "required": ["city"]}}}
def streamed():
    chunks = list(chat(stream=True, stream_options={"include_usage": True}, **settings))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert chunks[-1].usage.completion_tokens > 0 and not chunks[-1].choices
    return text
def helper():
    with client.chat.completions.stream(**settings) as stream:
        for _ in stream:
            pass
        return stream.get_final_completion().choices[0].message.content
def responded():
    with client.responses.stream(model=MODEL, input="Spell ocean letter by letter.") as stream:
        for _ in stream:
            pass
        return stream.get_final_response().output_text
def called():
    answer = chat(model=MODEL, messages=[{"role": "user", "content": "Weather in Paris?"}],
                  tools=[weather], tool_choice="required", temperature=0, max_tokens=200)
    return answer.choices[0].message.tool_calls[0].function
check("models", lambda: [m.id for m in client.models.list()] + [client.models.retrieve(MODEL).id])
check("chat", lambda: chat(**settings).choices[0].message.content)
check("chat, streamed, with usage", streamed)
check("chat, stream helper", helper)
check("completion, n=2, logprobs", lambda: len(completions(
    model=MODEL, prompt="repeat ox", n=2, logprobs=2, max_tokens=8, temperature=0.7).choices))
check("completion of token ids", lambda: completions(
    model=MODEL, prompt=[5, 6, 7], max_tokens=4).usage.completion_tokens)
check("unknown model", lambda: raises(openai.NotFoundError, lambda: chat(
    **{**settings, "model": "x"})))
check("prompt too long", lambda: raises(openai.BadRequestError, lambda: completions(
    model=MODEL, prompt="word " * 9000)))
check("embeddings refused by name", lambda: raises(openai.NotFoundError, lambda:
    client.embeddings.create(model=MODEL, input="x")))
check("responses", lambda: client.responses.create(
    model=MODEL, input="Spell ocean letter by letter.", temperature=0).output_text)
check("responses, streamed", responded)
check("JSON schema (parse)", lambda: client.chat.completions.parse(
    model=MODEL, messages=[{"role": "user", "content": "A person as JSON."}],
    response_format=Person, temperature=0, max_tokens=300).choices[0].message.parsed)
check("tool call, required", called)
"""
LITELLM = """
import asyncio, json, litellm
at = {"api_base": BASE, "api_key": "none"}
settings = {"model": "openai/" + MODEL, "messages": ASK, "temperature": 0, **at}
complete = litellm.completion
check("chat", lambda: complete(**settings).choices[0].message.content)
check("chat, streamed", lambda: "".join(c.choices[0].delta.content or "" for c in complete(
    stream=True, stream_options={"include_usage": True}, **settings)))
check("chat, async", lambda: asyncio.run(litellm.acompletion(**settings)).usage.total_tokens)
check("chat as hosted_vllm", lambda: complete(
    **{**settings, "model": "hosted_vllm/" + MODEL}).choices[0].message.content)
check("text completion", lambda: litellm.text_completion(
    model="text-completion-openai/" + MODEL, prompt="repeat ox", max_tokens=8, **at).usage)
check("prompt too long", lambda: raises(litellm.ContextWindowExceededError, lambda: complete(
    **{**settings, "messages": [{"role": "user", "content": "word " * 9000}]})))
check("unknown model", lambda: raises(litellm.NotFoundError, lambda: complete(
    **{**settings, "model": "openai/other"})))
schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"],
          "additionalProperties": False}
wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
check("JSON schema", lambda: json.loads(complete(
    response_format=wanted, max_tokens=200, **settings).choices[0].message.content)["a"])
"""
LANGCHAIN = """
import asyncio
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel
class Person(BaseModel):
    name: str
    age: int
at = {"model": MODEL, "base_url": BASE, "api_key": "none"}
chat = ChatOpenAI(temperature=0, **at)
words = ASK[0]["content"]
async def streamed():
    return "".join([chunk.content async for chunk in chat.astream(words)])
check("invoke", lambda: chat.invoke(words).content)
check("stream", lambda: "".join(chunk.content for chunk in chat.stream(words)))
check("stream, async", lambda: asyncio.run(streamed()))
check("batch", lambda: [m.content for m in chat.batch([words, "Reverse the word stone."])])
check("usage", lambda: chat.invoke(words).usage_metadata)
check("completion", lambda: repr(OpenAI(max_tokens=6, **at).invoke("repeat ox")))
check("structured output, JSON schema", lambda: ChatOpenAI(
    temperature=0, max_tokens=300, **at).with_structured_output(
        Person, method="json_schema").invoke("A person as JSON."))
"""
INSTRUCTOR = """
import instructor
from openai import OpenAI
from pydantic import BaseModel
class Person(BaseModel):
    name: str
    age: int
def ask(mode):
    client = instructor.from_openai(OpenAI(base_url=BASE, api_key="none"), mode=mode)
    return client.chat.completions.create(
        model=MODEL, response_model=Person, max_retries=0, temperature=0, max_tokens=300,
        messages=[{"role": "user", "content": "A person."}])
for mode in (instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS):
    check(f"mode {mode.value}", lambda: ask(mode))
"""


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
    "litellm": Client(packages=["litellm"], shown=["litellm", "openai"], program=LITELLM),
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
