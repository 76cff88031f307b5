"""Whatever is sent: a typed error or an answer, never a 500, and never more than one end (R1)."""

import http.client
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from appliance.api.schemas import REFUSED, ChatBody, CompletionBody, fields_of

pytestmark = pytest.mark.procs

KNOWN = sorted(fields_of(ChatBody) | fields_of(CompletionBody) | set(REFUSED))
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(min_value=-3, max_value=40)
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["text", "none", "user", "tiny", "default", "chat", "assistant", "\x00"])
)
KEYS = st.sampled_from([*KNOWN, "role", "content", "type", "text", "ttft_ms", "class"])
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)
SENSIBLE = {
    "temperature": st.floats(min_value=0, max_value=2) | st.none(),
    "top_p": st.floats(min_value=0, max_value=1),
    "top_k": st.integers(min_value=-1, max_value=2000),
    "min_p": st.floats(min_value=0, max_value=1),
    "n": st.integers(min_value=1, max_value=4),
    "stop": st.lists(st.text(min_size=1, max_size=3), max_size=3) | st.none(),
    "seed": st.integers(min_value=-(2**63), max_value=2**63 - 1),
    "min_tokens": st.integers(min_value=0, max_value=3),
    "ignore_eos": st.booleans(),
    "skip_special_tokens": st.booleans(),
    "include_stop_str_in_output": st.booleans(),
    "cache_salt": st.text(min_size=1, max_size=3),
    "priority": st.integers(min_value=-5, max_value=5),
    "ttft_slo_ms": st.floats(min_value=1, max_value=1e6),
    "slo": st.sampled_from(["chat", "default", {"class": "chat", "e2e_ms": 5}]),
    "user": st.text(max_size=5),
}
STREAMING = st.just({}) | st.fixed_dictionaries(
    {"stream": st.just(True)},
    optional={
        "stream_options": st.sampled_from(  # running counts are refused without the last one
            [
                {},
                {"include_usage": False, "continuous_usage_stats": False},
                {"include_usage": True},
                {"include_usage": True, "continuous_usage_stats": True},
            ]
        )
    },
)
IDS = st.lists(st.integers(0, 1023), min_size=1, max_size=4)
TALKS = st.fixed_dictionaries(
    {
        "messages": st.lists(
            st.fixed_dictionaries(
                {
                    "role": st.sampled_from(["user", "system", "assistant", "developer"]),
                    "content": st.text(max_size=8)
                    | st.lists(
                        st.fixed_dictionaries(
                            {"type": st.just("text"), "text": st.text(max_size=4)}
                        ),
                        max_size=2,
                    ),
                }
            ),
            min_size=1,
            max_size=3,
        )
    },
    optional={"logprobs": st.booleans(), **SENSIBLE},
)
PROMPTS = st.fixed_dictionaries(
    {
        "prompt": st.text(min_size=1, max_size=8)
        | st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=3)
        | IDS
        | st.lists(IDS, min_size=1, max_size=3)
    },
    optional={"logprobs": st.integers(min_value=0, max_value=20), **SENSIBLE},
)
SPOILT = st.dictionaries(KEYS, VALUES, max_size=2)
BODIES = st.builds(
    lambda body, stream, spoilt: {"max_tokens": 3, **body, **stream, **spoilt},
    TALKS | PROMPTS,
    STREAMING,
    SPOILT,
)
PATHS = st.sampled_from(["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"])
ROUTINE = settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def send(server: Any, path: str, raw: bytes) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        connection.request("POST", path, raw, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


def check(status: int, raw: bytes) -> None:
    """One end, well formed."""
    assert status in (200, 400, 404), (status, raw)
    event(f"status {status}")
    if status != 200:
        error = json.loads(raw)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        assert error["code"]
    elif raw.startswith(b"data: "):
        assert raw.endswith(b"data: [DONE]\n\n")
        chunks = [json.loads(part[6:]) for part in raw.split(b"\n\n")[:-2]]
        ends = [
            choice["index"]
            for chunk in chunks
            for choice in chunk["choices"]
            if choice["finish_reason"]
        ]
        assert sorted(ends) == list(range(len(ends)))
    else:
        assert isinstance(json.loads(raw), dict)


@ROUTINE
@given(body=TALKS | PROMPTS, stream=STREAMING)
def test_every_sensible_body_is_answered(server, body, stream):
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    status, raw = send(server, path, json.dumps({"max_tokens": 3, **body, **stream}).encode())
    check(status, raw)
    assert status == 200, raw


@ROUTINE
@given(path=PATHS, body=BODIES)
def test_any_body_gets_an_answer_or_a_typed_error(server, path, body):
    check(*send(server, path, json.dumps(body).encode()))
    assert not server.node.broken


@ROUTINE
@given(
    path=PATHS,
    body=BODIES,
    cut=st.integers(min_value=0, max_value=400),
    junk=st.binary(max_size=4),
)
def test_any_bytes_get_an_answer_or_a_typed_error(server, path, body, cut, junk):
    raw = json.dumps(body).encode()
    position = cut % (len(raw) + 1)
    check(*send(server, path, raw[:position] + junk + raw[position + len(junk) :]))
    assert not server.node.broken


def test_every_fuzzed_request_has_ended(server):
    state = server.read(lambda node: node.state())
    assert state["totals"]["live"] == 0
    assert state["totals"]["sequences"] == sum(state["totals"]["ended"].values())
