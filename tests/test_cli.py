"""The command itself, run as its users run it (R17, R20)."""

import http.client
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from appliance.listening import listen, url_of
from appliance.screen import curl

COMMAND = [sys.executable, "-m", "appliance"]


def run(*arguments: str, directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command to its end, in an empty directory."""
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    return done.stderr.rstrip().splitlines()[-1]


class Running:
    """`appliance start` on a free port, until the address is printed."""

    def __init__(self, directory: Path, arguments: Sequence[str]) -> None:
        self.log = directory / "stderr.log"
        self._stderr = self.log.open("wb")
        self.process = subprocess.Popen(
            [*COMMAND, "start", "--port", "0", *arguments],
            cwd=directory,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
            stdout=subprocess.PIPE,
            stderr=self._stderr,
        )
        self.output = ""
        self.port = 0
        self.wait_for(r"curl http")
        found = re.search(r"serving .* at http://127\.0\.0\.1:(\d+)", self.output)
        assert found, self.output
        self.port = int(found[1])

    def wait_for(self, pattern: str, *, seconds: float = 90) -> None:
        """Read stdout until it has `pattern`."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.output):
            left = deadline - time.monotonic()
            assert select.select([self.process.stdout], [], [], max(0, left))[0], self.story()
            data = os.read(self.process.stdout.fileno(), 1 << 16)
            assert data, self.story()
            self.output += data.decode()

    def story(self) -> str:
        return f"{self.output}\n--- stderr\n{self.log.read_text()}"

    def get(self, path: str) -> tuple[int, Any]:
        return self.request("GET", path)

    def request(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        text = None if body is None else json.dumps(body)
        try:
            connection.request(method, path, text, {"content-type": "application/json"})
            reply = connection.getresponse()
            return reply.status, json.loads(reply.read())
        finally:
            connection.close()

    def stop(self, *signals: signal.Signals, pause: float = 0.3) -> int:
        for index, number in enumerate(signals):
            time.sleep(pause if index else 0)
            self.process.send_signal(number)
        return self.process.wait(60)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._stderr.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Start servers; what still runs at the end is killed."""
    running: list[Running] = []

    def begin(*arguments: str) -> Running:
        directory = tmp_path / f"server{len(running)}"
        directory.mkdir()
        running.append(Running(directory, arguments))
        return running[-1]

    yield begin
    for server in running:
        server.close()


def endless(server: Running, **changes: Any) -> tuple[http.client.HTTPConnection, Any]:
    """A stream that does not end by itself; returned once its first event has come."""
    body = {
        "model": "tiny-tasks",
        "prompt": "once",
        "max_tokens": 3000,
        "ignore_eos": True,
        "stream": True,
    }
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    headers = {"content-type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body | changes), headers)
    reply = connection.getresponse()
    assert reply.status == 200
    assert reply.readline().startswith(b"data: ")
    return connection, reply


# --- what ends before anything is served ---------------------------------------------------


@pytest.mark.procs
@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (
            ["--set", "server.prot=1"],
            2,
            "--set: unknown key server.prot; did you mean server.port?",
        ),
        (["--set", "servr.port=1"], 2, "--set: unknown section servr; did you mean server?"),
        (
            ["--port", "70000"],
            2,
            "--port: server.port = 70000: expected an integer from 0 to 65535",
        ),
        (["--config", "absent.toml"], 2, "--config absent.toml: no such file"),
        (["--set", "port=1"], 2, "--set port=1: write --set section.key=value"),
        (
            ["--devices", "cuda:0"],
            2,
            "devices.spec = 'cuda:0' (--devices): this version does not compute on CUDA devices "
            "(none is visible on this machine); use --devices cpu:2",
        ),
        (
            ["--devices", "paced:2@b1000"],
            2,
            "devices.spec = 'paced:2@b1000' (--devices): unknown device profile 'b1000'; "
            "use one of: cpu, h100-8b, h200-8b, or fixed-20ms",
        ),
        (
            ["--max-model-len", "9000"],
            2,
            "model.max_model_len = 9000 (--max-model-len): tiny-tasks was built for 4096 "
            "positions; write at most 4096",
        ),
        (
            ["--set", "kv.memory=1MiB"],
            2,
            "kv.memory = 1048576 bytes: room for 512 tokens, fewer than one sequence of 4096; "
            "write kv.memory = 8388608 or model.max_model_len = 512 (--max-model-len)",
        ),
        (
            ["--policy", "fcsf"],
            2,
            "policy.name (--policy) or policy.settings: no policy 'fcsf'; did you mean 'fcfs'?",
        ),
        (
            ["--model", "./absent"],
            1,
            "model './absent': no such directory; set [model] path (--model) to a directory with "
            "config.json, tokenizer.json and safetensors files",
        ),
        (
            ["--host", "203.0.113.9"],
            1,
            "cannot listen on 203.0.113.9:0: Cannot assign requested address; set server.host "
            "(--host) to an address of this machine, 127.0.0.1 for this machine only",
        ),
    ],
)
def test_R20_the_last_line_names_cause_and_fix(
    tmp_path: Path, arguments: list[str], code: int, line: str
) -> None:
    given = arguments if "--port" in arguments else ["--port", "0", *arguments]
    done = run("start", *given, directory=tmp_path)
    assert last_line(done) == f"appliance: {line}"
    assert done.returncode == code
    assert "Traceback" not in done.stderr


@pytest.mark.procs
def test_R20_a_bad_key_in_a_file_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[kv]\nblok_tokens = 16\n")
    done = run("start", directory=tmp_path)
    assert last_line(done) == (
        f"appliance: {tmp_path}/config.toml: unknown key kv.blok_tokens; "
        "did you mean kv.block_tokens?"
    )


@pytest.mark.procs
def test_R20_a_port_in_use_is_found_before_the_model_is_read(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("start", "--port", str(port), "--model", "./absent", directory=tmp_path)
    assert done.returncode == 1
    assert last_line(done) == (
        f"appliance: cannot listen on 127.0.0.1:{port}: Address already in use; stop what uses the "
        "port, or set server.port (--port) to another one, 0 for any free one"
    )


@pytest.mark.procs
def test_R20_an_architecture_that_is_not_built_is_named(tmp_path: Path, tiny_model: Path) -> None:
    copy = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((copy / "config.json").read_text())
    changed = config | {"architectures": ["MambaForCausalLM"]}
    (copy / "config.json").write_text(json.dumps(changed))
    done = run("start", "--port", "0", "--model", str(copy), directory=tmp_path)
    assert done.returncode == 1
    assert re.fullmatch(
        r"appliance: .*config\.json: architectures: 'MambaForCausalLM' is not built; known: .*",
        last_line(done),
    )


@pytest.mark.procs
def test_R20_a_checkpoint_cut_short_is_named(tmp_path: Path, tiny_model: Path) -> None:
    copy = shutil.copytree(tiny_model, tmp_path / "model")
    weights = copy / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 100)
    done = run("start", "--port", "0", "--model", str(copy), directory=tmp_path)
    assert done.returncode == 1
    assert re.fullmatch(
        rf"appliance: {weights} is cut short or too long \(\d+ bytes\); fetch it again",
        last_line(done),
    )


@pytest.mark.procs
def test_R20_a_missing_tokenizer_is_named(tmp_path: Path, tiny_model: Path) -> None:
    copy = shutil.copytree(tiny_model, tmp_path / "model")
    (copy / "tokenizer.json").unlink()
    done = run("start", "--port", "0", "--model", str(copy), directory=tmp_path)
    assert done.returncode == 1
    assert last_line(done).startswith(f"appliance: {copy}/tokenizer.json is missing; ")


@pytest.mark.procs
def test_R20_a_worker_that_cannot_start_says_why_on_the_last_line(tmp_path: Path) -> None:
    plan = '[{"point": "worker.start", "action": "raise", "repeat": true}]'
    done = run(
        "start", "--port", "0", "--devices", "paced:1", directory=tmp_path, APPLIANCE_FAULTS=plan
    )
    assert done.returncode == 1
    assert last_line(done).startswith("appliance: ")
    assert "worker.start" in last_line(done)


@pytest.mark.procs
def test_a_dry_run_prints_the_plan_and_starts_nothing(tmp_path: Path) -> None:
    begun = run("start", "--dry-run", "--devices", "cpu:3", directory=tmp_path)
    assert begun.returncode == 0
    for word in ("model", "devices", "3 workers on cpu", "roles", "links", "memory", "kv cache"):
        assert word in begun.stdout
    assert "serving" not in begun.stdout


def test_the_plan_names_the_policy_and_its_settings(tmp_path: Path) -> None:
    flags = ("--policy", "all-mixed", "--set", "policy.settings.chunk=99")
    shown = run("start", "--dry-run", "--devices", "paced:2", *flags, directory=tmp_path).stdout
    assert "all-mixed, settings: chunk 99; the priority of requests is ignored" in shown
    flags = ("--policy", "static-priority")
    shown = run("start", "--dry-run", "--devices", "paced:2", *flags, directory=tmp_path).stdout
    assert "static-priority, settings: defaults\n" in shown


@pytest.mark.parametrize(
    ("policy", "said"), [("fcfs", "; it refuses nobody (on_miss of picky)"), ("hyperflexis", "")]
)
def test_the_plan_says_that_a_policy_refuses_nobody(tmp_path: Path, policy: str, said: str) -> None:
    (tmp_path / "config.toml").write_text("[slo.picky]\nttft_ms = 10\non_miss = 'refuse'\n")
    flags = ("--devices", "paced:2", "--policy", policy)
    shown = run("start", "--dry-run", *flags, directory=tmp_path).stdout
    (line,) = [line for line in shown.splitlines() if f"{policy}, settings:" in line]
    assert ("refuses nobody" in line) == bool(said)
    assert line.endswith(said)


@pytest.mark.procs
def test_the_default_configuration_can_be_printed_and_used(tmp_path: Path) -> None:
    printed = run("config", directory=tmp_path)
    assert printed.returncode == 0
    (tmp_path / "mine.toml").write_text(printed.stdout)
    used = run("start", "--dry-run", "--config", "mine.toml", directory=tmp_path)
    assert used.returncode == 0


@pytest.mark.procs
def test_a_wrong_flag_is_refused_with_the_usage(tmp_path: Path) -> None:
    done = run("start", "--prot", "1", directory=tmp_path)
    assert done.returncode == 2
    assert "--prot" in last_line(done)
    assert run("--version", directory=tmp_path).stdout.startswith("appliance ")


def test_the_address_is_one_that_a_client_can_use() -> None:
    for host, expected in (("127.0.0.1", "http://127.0.0.1:"), ("0.0.0.0", "http://127.0.0.1:")):
        with listen(host, 0) as listener:
            assert re.fullmatch(re.escape(expected) + r"\d+", url_of(listener))


# --- what serves ---------------------------------------------------------------------------


@pytest.mark.procs
def test_it_serves_as_printed_and_drains_on_sigterm(start: Callable[..., Running]) -> None:
    server = start("--devices", "paced:2", "--served-model-name", "given-name")
    stages = re.findall(r"^\s+(\d+\.\d\d)  (.+)$", server.output, re.MULTILINE)
    times = [float(seconds) for seconds, _ in stages]
    assert times == sorted(times)
    names = [name for _, name in stages]
    assert {"configuration read", "listening"} <= set(names)
    assert any(re.fullmatch(r"worker \d: ready, role mixed", name) for name in names)
    pasted = re.search(r"^curl .*$", server.output, re.MULTILINE)[0]  # type: ignore[index]
    assert pasted == curl(f"http://127.0.0.1:{server.port}", "given-name")
    body = json.loads(re.search(r"-d '(.*)'", pasted)[1])  # type: ignore[index]
    status, answer = server.request("POST", "/v1/chat/completions", body)
    assert status == 200
    assert answer["model"] == "given-name"
    assert server.get("/ready")[0] == 200
    assert server.stop(signal.SIGTERM) == 0


@pytest.mark.procs
def test_the_serving_process_maps_no_torch(start: Callable[..., Running]) -> None:
    server = start("--devices", "cpu:1")
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "libtorch" not in maps
    assert "uvloop" in maps
    assert server.stop(signal.SIGINT) == 0


@pytest.mark.procs
def test_R17_what_does_not_end_in_time_gets_a_typed_error(start: Callable[..., Running]) -> None:
    server = start("--devices", "paced:1", "--set", "server.drain_seconds=0.3")
    connection, reply = endless(server)
    code = server.stop(signal.SIGTERM)
    events = [line for line in reply.read().decode().splitlines() if line.startswith("data: ")]
    connection.close()
    errors = [json.loads(line[6:])["error"] for line in events if '"error"' in line]
    assert [error["code"] for error in errors] == ["drain_timeout"]
    assert code == 0


@pytest.mark.procs
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_R17_a_second_signal_ends_it_at_once(
    start: Callable[..., Running], second: signal.Signals
) -> None:
    server = start("--devices", "paced:1")
    connection, _ = endless(server)
    assert server.stop(signal.SIGTERM, second) == 128 + second
    connection.close()
    last = server.log.read_text().rstrip().splitlines()[-1]
    assert last == (
        f"appliance: ended at once by a second signal ({second.name}); open requests are lost"
    )


@pytest.mark.procs
def test_two_instances_on_one_machine_do_not_meet(start: Callable[..., Running]) -> None:
    first, second = start("--devices", "paced:1"), start("--devices", "paced:1")
    assert first.port != second.port
    assert first.stop(signal.SIGTERM) == 0
    assert second.get("/ready")[0] == 200
    assert second.stop(signal.SIGTERM) == 0


@pytest.mark.procs
def test_logs_are_json_with_the_id_of_the_request_and_never_a_prompt(
    start: Callable[..., Running],
) -> None:
    server = start("--devices", "paced:1", "--log-format", "json")
    body = {"model": "tiny-tasks", "prompt": "a secret of mine", "max_tokens": 3}
    _, answer = server.request("POST", "/v1/completions", body)
    assert server.stop(signal.SIGTERM) == 0
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    assert any(answer["id"] in json.dumps(line) and "request_id" in line for line in lines)
    assert any(line["logger"].startswith("worker") or "worker" in line for line in lines)
    assert "secret" not in server.log.read_text()
