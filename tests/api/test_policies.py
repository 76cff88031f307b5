"""What clients are told of the policy."""

import json
import urllib.request

import pytest

from appliance.policy import make_policy
from tests.api.conftest import start_server


@pytest.mark.procs
@pytest.mark.parametrize(("name", "ignored"), [("edf", "priority"), ("static-priority", None)])
def test_a_priority_is_said_to_be_ignored_by_those_who_ignore_it(
    name: str, ignored: str | None
) -> None:
    live = start_server(num_workers=1, policy=make_policy(name, {}))
    try:
        body = {"model": "tiny", "prompt": "Spell ocean.", "max_tokens": 2, "priority": -1}
        url, headers = f"{live.url}/v1/completions", {"content-type": "application/json"}
        question = urllib.request.Request(url, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(question, timeout=60) as reply:
            assert reply.headers.get("x-appliance-ignored") == ignored
    finally:
        live.close()
