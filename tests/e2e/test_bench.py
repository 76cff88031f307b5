"""`appliance bench` against `appliance start`: both as their users run them."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

WORKLOAD = """
name = "small"
max_len = 600
length_scale = 0.2
warm_up_seconds = 1
[[class]]
name = "quick"
share = 2
lengths = "azure23_conv"
ttft_ms = 60000
tpot_ms = 60000
[[class]]
name = "hopeless"
share = 1
lengths = { prompt = 400, output = 20 }
ttft_ms = 0.001
"""


@pytest.mark.procs
def test_a_real_node_is_measured_and_told_apart_by_class(
    serve: Callable[..., Any], tmp_path: Path
) -> None:
    server = serve("--devices", "paced:2", workers=2)
    workload, out, report = (tmp_path / name for name in ("small.toml", "out.json", "out.html"))
    workload.write_text(WORKLOAD)
    command = [
        sys.executable, "-m", "appliance", "bench", "--url", server.url, "--workload",
        str(workload), "--rate", "10", "--seconds", "5", "--json", str(out), "--report",
        str(report),
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode in (0, 3), done.stdout + done.stderr  # 3: this machine is very busy
    (run,) = json.loads(out.read_text())["runs"]
    assert run["failed"] == 0, run["note"]
    assert run["per_class"]["quick"]["attainment"] == 1.0
    assert run["per_class"]["hopeless"]["missed"] == {
        "ttft": run["per_class"]["hopeless"]["offered"]
    }
    assert run["offered"] == sum(one["offered"] for one in run["per_class"].values()) > 10
    assert report.is_file() or done.returncode == 3
