"""The unloaded server of a sweep's devices, measured once for all of its runs."""

import json
import subprocess
import tempfile
from pathlib import Path

from msgspec.structs import replace

from tools.control_kit import ROOT, pin, running_server
from tools.sweep_kit import Plan, Setup, client_command, num_workers, server_options

RATE = 0.5
SECONDS = 8.0


def calibrated(setup: Setup, *, max_len: int) -> dict[str, float]:
    """`calibration` of a specification's file: what the client's own calibration finds on a server
    that has nothing else to do."""
    quick = replace(setup, seconds=SECONDS, warm_up=1.0, drain=30.0)
    plan = Plan(policy="fcfs", arrivals="poisson", load=RATE, rate=RATE, seed=0)
    options = server_options(quick, plan, model="tiny-tasks")
    with tempfile.TemporaryDirectory(prefix="sweep-") as name:
        files = (Path(name) / "scores.json", Path(name) / "outcomes.jsonl")
        with running_server(options, num_workers=num_workers(setup.devices)) as server:
            command = client_command(quick, plan, f"http://127.0.0.1:{server.port}", files)
            command += ["--calibrate", "--max-len", str(max_len)]
            client = subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            pin(client.pid, setup.cores.client)
            words = client.communicate(timeout=300)[0].decode(errors="replace")
        if client.returncode not in (0, 3):
            raise SystemExit(f"the calibration has ended with {client.returncode}:\n{words}")
        found = json.loads(files[0].read_text())["spec"]["relative"]
    return {
        "a_ms": round(found["a"] * 1000, 4),
        "b_ms": round(found["b"] * 1000, 6),
        "tpot0_ms": round(found["tpot0"] * 1000, 4),
    }
