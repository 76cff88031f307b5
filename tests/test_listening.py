"""The limit on open files is raised as far as it goes, and what fits is said."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import json, resource, sys
from appliance.listening import room_for
soft, hard, wanted = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
print(json.dumps([room_for(wanted), *resource.getrlimit(resource.RLIMIT_NOFILE)]))
"""


@pytest.mark.parametrize(
    ("soft", "hard", "wanted", "expected"),
    [
        (300, 2000, 1000, [1000, 1256, 2000]),
        (300, 600, 1000, [344, 600, 600]),
        (1500, 2000, 1000, [1000, 1500, 2000]),
        (100, 200, 1000, [1, 200, 200]),
    ],
)
def test_as_many_connections_as_the_hard_limit_allows(soft, hard, wanted, expected):
    command = [sys.executable, "-c", SCRIPT, str(soft), str(hard), str(wanted)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    assert json.loads(done.stdout) == expected
