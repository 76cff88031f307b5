"""Valid requests of every POST route, and ways to spoil them (for the fuzz tests)."""

import copy
from typing import Any

from hypothesis import strategies as st

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTION = {"name": "weather", "description": "Of a city.", "parameters": CITY}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "spell cat"}]},
]
CALLED = [
    *TALK,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "{}"},
]
SAMPLING = {
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.1,
    "seed": 7,
    "stop": ["END", "\n\n"],
    "stop_token_ids": [5],
    "min_tokens": 1,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "repetition_penalty": 1.1,
    "logit_bias": {"5": -100, "7": 3},
    "slo": {"class": "default", "ttft_ms": 500, "tpot_ms": 50},
    "priority": 1,
    "cache_salt": "salt",
    "user": "somebody",
}
FORM = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
SEEDS: dict[str, tuple[dict[str, Any], ...]] = {
    "/v1/chat/completions": (
        {"model": "tiny", "messages": TALK, "max_tokens": 4, **SAMPLING},
        {"messages": TALK, "max_completion_tokens": 4, "logprobs": True, "top_logprobs": 3, "n": 2},
        {
            "messages": TALK,
            "max_tokens": 4,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
        {"messages": CALLED, "max_tokens": 4, "tools": [TOOL], "tool_choice": "auto"},
        {"messages": TALK, "max_tokens": 8, "response_format": FORM},
        {"messages": TALK, "max_tokens": 8, "response_format": {"type": "json_object"}},
    ),
    "/v1/completions": (
        {"model": "tiny", "prompt": "red", "max_tokens": 4, **SAMPLING},
        {"prompt": ["red", "blue"], "max_tokens": 4, "logprobs": 2, "n": 2},
        {"prompt": ["red", "blue"], "max_tokens": 4, "echo": True},
        {"prompt": [[5, 6, 7], [8]], "max_tokens": 4, "stream": True},
        {"prompt": [5, 6, 7], "max_tokens": 4, "guided_regex": "[a-z]+"},
    ),
    "/tokenize": (
        {"model": "tiny", "prompt": "red", "add_special_tokens": True, "return_token_strs": True},
        {"messages": TALK, "add_generation_prompt": False, "chat_template_kwargs": {"a": 1}},
    ),
    "/detokenize": ({"model": "tiny", "tokens": [5, 6, 7]},),
    "/v1/responses": (
        {"model": "tiny", "input": "red", "max_output_tokens": 4, "instructions": "Be brief."},
        {
            "input": [{"role": "user", "content": [{"type": "input_text", "text": "red"}]}],
            "tools": [{"type": "function", **FUNCTION}],
            "max_output_tokens": 4,
            "stream": True,
        },
    ),
    "/v1/messages": (
        {"model": "tiny", "max_tokens": 4, "messages": [{"role": "user", "content": "red"}]},
        {
            "model": "tiny",
            "max_tokens": 4,
            "system": [{"type": "text", "text": "Be brief."}],
            "messages": [{"role": "user", "content": [{"type": "text", "text": "red"}]}],
            "tools": [{"name": "weather", "description": "d", "input_schema": CITY}],
            "tool_choice": {"type": "auto"},
            "stop_sequences": ["END"],
            "stream": True,
        },
    ),
    "/v1/messages/count_tokens": (
        {"model": "tiny", "messages": [{"role": "user", "content": "red"}]},
    ),
    "/v1/embeddings": ({"model": "tiny", "input": "red"},),
}
ADMIN_SEEDS: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    "/admin/workers/{worker}/role": (
        ("/admin/workers/0/role", {"role": "decode"}),
        ("/admin/workers/1/role", {"role": "mixed"}),
    ),
    "/admin/roles": (("/admin/roles", {"0": "prefill", "1": "decode"}),),
    "/admin/workers/{worker}/park": (("/admin/workers/1/park", {}),),
    "/admin/workers/{worker}/wake": (("/admin/workers/1/wake", {}),),
    "/admin/workers/{worker}/restart": (("/admin/workers/0/restart", {}),),
    "/admin/workers": (
        ("/admin/workers", {"device": "paced:9", "role": "decode", "parked": True}),
        ("/admin/workers", {}),
    ),
}
"""By route: requests (path, body) that operate the node."""
EXTREMES = st.sampled_from(
    [0, -1, 1, 2**31, 2**63, -(2**63), 2**64, 10**30, 1e308, -0.0, 1e-320, 0.5, True, False, None]
)
TEXTS = st.sampled_from(
    ["", " ", "\x00", "\ufffe", "a" * 5000, "{{ x }}", "</s>", "<|im_end|>", "\u202e", "💥" * 50]
) | st.text(max_size=20)
LEAVES = EXTREMES | TEXTS | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
NAMES = st.sampled_from(
    ["type", "role", "content", "text", "name", "properties", "$ref", "items", "enum", "anyOf"]
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES | TEXTS, inner, max_size=4),
    max_leaves=6,
)
OTHER_SEEDS = st.sampled_from([value for seeds in SEEDS.values() for seed in seeds for value in
                               seed.values()])  # fmt: skip
HEADERS = st.dictionaries(
    st.sampled_from(
        [
            "x-slo-class",
            "x-slo-ttft-ms",
            "x-slo-tpot-ms",
            "x-request-id",
            "Content-Type",
            "Content-Encoding",
            "Accept-Encoding",
            "Authorization",
            "x-api-key",
            "Origin",
            "anthropic-version",
        ]
    ),
    st.sampled_from(
        ["", "0", "-1", "1e999", "nan", "default", "gzip", "br", "identity", "Bearer", "Bearer x",
         "application/json; charset=utf-16", "application/x+json", "text/plain", "*", "\xff" * 9]
    ),
    max_size=2,
)  # fmt: skip


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value within a document, its own first."""
    found = [at]
    if isinstance(value, dict):
        for name, inner in value.items():
            found += places(inner, (*at, name))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            found += places(inner, (*at, index))
    return found


@st.composite
def spoilt(draw: Any, seed: dict[str, Any]) -> Any:
    """A valid body after one to three changes somewhere within it."""
    document = {"": copy.deepcopy(seed)}  # so that the body itself has a place too
    for _ in range(draw(st.integers(min_value=1, max_value=3))):
        path = draw(st.sampled_from(places(document)[1:] or [("",)]))
        parent: Any = document
        for step in path[:-1]:
            parent = parent[step]
        _change(draw, parent, path[-1])
        document.setdefault("", None)
    return document[""]


def _change(draw: Any, parent: Any, last: Any) -> None:
    match draw(st.sampled_from(["replace", "replace", "drop", "repeat", "wrap", "add", "other"])):
        case "replace":
            parent[last] = draw(VALUES)
        case "drop":
            del parent[last]
        case "repeat" if isinstance(parent, list):
            parent.extend(copy.deepcopy(parent[last]) for _ in range(draw(st.integers(1, 40))))
        case "wrap":
            parent[last] = draw(st.sampled_from([[parent[last]], {"type": parent[last]}]))
        case "add" if isinstance(parent[last], dict):
            parent[last][draw(NAMES | TEXTS)] = draw(VALUES)
        case _:
            parent[last] = copy.deepcopy(draw(OTHER_SEEDS))


REQUESTS = st.sampled_from(sorted(SEEDS)).flatmap(
    lambda path: st.sampled_from(SEEDS[path]).flatmap(
        lambda seed: st.tuples(st.just(path), spoilt(seed), HEADERS)
    )
)
OPERATIONS = st.sampled_from([each for seeds in ADMIN_SEEDS.values() for each in seeds]).flatmap(
    lambda request: st.tuples(st.just(request[0]), spoilt(request[1]), HEADERS)
)
