"""The shipped model directories keep what their cards and their configurations say."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

from appliance.live.chat_template import ChatTemplates
from tools.model_files import CHAT_TEMPLATE
from tools.model_tasks import CHAT_TASKS, COLORS, TASKS, WORDS, generate, system_message

MODELS = Path(__file__).parents[2] / "models"
MODEL, DRAFT = MODELS / "tiny-tasks", MODELS / "tiny-tasks-draft"
LOOK_UP = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Find it <there>",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
    },
}
LISTED = (
    '# Tools\n<tools>\n{"name": "look_up", "description": "Find it <there>", "parameters": '
    '{"type": "object", "properties": {"word": {"type": "string"}}}}\n{"name": "stop"}\n</tools>\n'
    'To call one, answer:\n<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call><|end|>'
)


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


@pytest.fixture(scope="module")
def templates() -> ChatTemplates:
    settings = _json(MODEL / "tokenizer_config.json")
    return ChatTemplates({"default": settings["chat_template"]}, {"bos_token": "<|bos|>"})


@pytest.mark.parametrize("model", [MODEL, DRAFT], ids=lambda path: path.name)
def test_stored_weights_have_the_configured_shapes(model: Path) -> None:
    config = _json(model / "config.json")
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    with safe_open(model / "model.safetensors", framework="pt") as weights:
        shapes = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
        types = {weights.get_slice(name).get_dtype() for name in shapes}
    assert types == {"BF16"}
    assert shapes["model.embed_tokens.weight"] == (config["vocab_size"], hidden)
    assert "lm_head.weight" not in shapes
    layer = "model.layers.0.self_attn"
    assert shapes[f"{layer}.q_proj.weight"] == (config["num_attention_heads"] * head_dim, hidden)
    assert shapes[f"{layer}.k_proj.weight"] == (config["num_key_value_heads"] * head_dim, hidden)
    assert len(shapes) == 2 + 9 * config["num_hidden_layers"]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_the_draft_reads_and_writes_what_the_model_does(name: str) -> None:
    assert (DRAFT / name).read_bytes() == (MODEL / name).read_bytes()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "plain words",
        "two  spaces\n\ttab",
        "äöü ß 漢字 🙂",
        '{"a": [1, 2]}',
        "\x00\x7f",
        "1234567",
    ],
)
def test_any_text_survives_the_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_words_and_digits_are_single_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == _json(MODEL / "config.json")["vocab_size"]
    assert all(len(tokenizer.encode(word).ids) == 1 for word in WORDS + COLORS)
    assert len(tokenizer.encode("2048").ids) == 4


def test_chat_template_renders_in_a_sandbox(tokenizer: Tokenizer, templates: ChatTemplates) -> None:
    text = templates.render(
        [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": None},
            {"role": "tool", "content": "7"},
        ]
    )
    assert text == (
        "<|bos|><|system|>Be brief.<|end|><|user|>hi<|end|><|assistant|><|end|>"
        "<|tool|>7<|end|><|assistant|>"
    )
    ids = tokenizer.encode(text).ids
    config = _json(MODEL / "config.json")
    assert ids[0] == config["bos_token_id"]
    assert ids.count(config["eos_token_id"]) == 4


def test_without_tools_a_conversation_is_its_turns_and_nothing_else(
    templates: ChatTemplates,
) -> None:
    rng = random.Random(8)
    for name in [*TASKS] * 5:
        turns = [("user", generate(name, rng).prompt), ("assistant", generate(name, rng).answer)]
        turns = [("system", system_message(rng))] * rng.randint(0, 1) + turns * rng.randint(1, 3)
        text = "<|bos|>" + "".join(f"<|{role}|>{content}<|end|>" for role, content in turns)
        messages = [{"role": role, "content": content} for role, content in turns]
        assert templates.render(messages) == text + "<|assistant|>"
        assert templates.render(messages, tools=[], add_generation_prompt=False) == text


def test_shipped_chat_template_is_the_one_trained_with() -> None:
    assert _json(MODEL / "tokenizer_config.json")["chat_template"] == CHAT_TEMPLATE


def test_chat_template_lists_tools_in_the_system_turn(templates: ChatTemplates) -> None:
    tools = [LOOK_UP, {"name": "stop"}]
    user = {"role": "user", "content": "hi"}
    end = "<|user|>hi<|end|><|assistant|>"
    assert templates.render([user], tools=tools) == f"<|bos|><|system|>{LISTED}{end}"
    for role in ("system", "developer"):
        text = templates.render([{"role": role, "content": "Be brief."}, user], tools=tools)
        assert text == f"<|bos|><|system|>Be brief.\n\n{LISTED}{end}"
    assert templates.render([user], tools=[]) == f"<|bos|>{end}"


@pytest.mark.parametrize("arguments", ['{"word": "<a>"}', {"word": "<a>"}])
def test_chat_template_writes_calls_and_results(templates: ChatTemplates, arguments: Any) -> None:
    call = {"type": "function", "function": {"name": "look_up", "arguments": arguments}}
    called = '<tool_call>\n{"name": "look_up", "arguments": {"word": "<a>"}}\n</tool_call>'
    result = {"role": "tool", "tool_call_id": "x", "content": "7"}
    for content, before in ((None, ""), ("So.", "So.\n")):
        message = {"role": "assistant", "content": content, "tool_calls": [call, call]}
        text = templates.render([message, result])
        assert text == (
            f"<|bos|><|assistant|>{before}{called}\n{called}<|end|><|tool|>7<|end|><|assistant|>"
        )


def test_evaluation_covers_every_task_and_backs_the_demonstrations() -> None:
    result = _json(MODEL / "eval.json")
    assert {*TASKS, *CHAT_TASKS} <= set(result["cases"])
    for names, listed in ((TASKS, "demo_tasks"), (CHAT_TASKS, "chat_demo_tasks")):
        assert result[listed] == list(names)
        for name in names:
            single = result["cases"][name]["single"]
            assert single["count"] >= 200
            assert single["accuracy"] >= result["demo_threshold"]
    for name in (*TASKS, "add_two_digit", "subtract_two_digit"):
        assert result["cases"][name]["single"]["accuracy"] >= 0.98
    for name in CHAT_TASKS:
        assert result["cases"][name]["single"]["accuracy"] >= 0.95
    for length in ("1000_tokens", "2000_tokens", "3500_tokens"):
        assert result["cases"]["needle"][length]["accuracy"] >= 0.9


def test_agreement_of_the_draft_is_published_for_every_task() -> None:
    result = _json(DRAFT / "eval.json")
    assert result["agreement_with"] == MODEL.name
    assert {*TASKS, *CHAT_TASKS} <= set(result["agreement"])
    for measured in result["agreement"].values():
        assert measured["tokens"] > 0
        assert 0.0 <= measured["agreement"] <= 1.0
