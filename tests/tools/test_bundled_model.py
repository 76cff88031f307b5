"""The shipped model directory keeps what its card and its configuration say."""

import json
from pathlib import Path
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import safe_open
from tokenizers import Tokenizer

from tools.model_tasks import COLORS, TASKS, WORDS

MODEL = Path(__file__).parents[2] / "models/tiny-tasks"


def _json(name: str) -> Any:
    return json.loads((MODEL / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


def test_stored_weights_have_the_configured_shapes() -> None:
    config = _json("config.json")
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    with safe_open(MODEL / "model.safetensors", framework="pt") as weights:
        shapes = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
        types = {weights.get_slice(name).get_dtype() for name in shapes}
    assert types == {"BF16"}
    assert shapes["model.embed_tokens.weight"] == (config["vocab_size"], hidden)
    assert "lm_head.weight" not in shapes
    layer = "model.layers.0.self_attn"
    assert shapes[f"{layer}.q_proj.weight"] == (config["num_attention_heads"] * head_dim, hidden)
    assert shapes[f"{layer}.k_proj.weight"] == (config["num_key_value_heads"] * head_dim, hidden)
    assert len(shapes) == 2 + 9 * config["num_hidden_layers"]


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
    assert tokenizer.get_vocab_size() == _json("config.json")["vocab_size"]
    assert all(len(tokenizer.encode(word).ids) == 1 for word in WORDS + COLORS)
    assert len(tokenizer.encode("2048").ids) == 4


def test_chat_template_renders_in_a_sandbox(tokenizer: Tokenizer) -> None:
    settings = _json("tokenizer_config.json")
    template = ImmutableSandboxedEnvironment().from_string(settings["chat_template"])
    text = template.render(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": None},
            {"role": "tool", "content": "7"},
        ],
        bos_token=settings["bos_token"],
        add_generation_prompt=True,
    )
    assert text == (
        "<|bos|><|system|>Be brief.<|end|><|user|>hi<|end|><|assistant|><|end|>"
        "<|tool|>7<|end|><|assistant|>"
    )
    ids = tokenizer.encode(text).ids
    config = _json("config.json")
    assert ids[0] == config["bos_token_id"]
    assert ids.count(config["eos_token_id"]) == 4


def test_evaluation_covers_every_task_and_backs_the_demonstrations() -> None:
    result = _json("eval.json")
    assert set(TASKS) <= set(result["cases"])
    for name in TASKS:
        single = result["cases"][name]["single"]
        assert single["count"] >= 100
        is_demo = single["accuracy"] >= result["demo_threshold"]
        assert is_demo == (name in result["demo_tasks"])
    for name in ("repeat", "reverse", "spell", "add", "add_two_digit", "json"):
        assert result["cases"][name]["single"]["accuracy"] >= 0.86
