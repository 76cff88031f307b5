"""A checkpoint that says what a test wants: a real model, real weights, known words.

Its last prompt token names a script; after each token of a script the next one is (nearly)
certain: embeddings are one-hot, the only layer adds nothing, and the output matrix holds "what
follows what".
So every piece of a script is a token that occurs in no other place.
"""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HIDDEN = 640
LETTERS = 256
"""The tokens of single bytes come first."""
WEATHER = '{"city": "Paris", "days": 3}'
SCRIPTS: Mapping[str, str] = {
    "plain": "Good morning to you, dear reader.",
    "weather": "Let me look.\n<tool_call>\n"
    f'{{"name": "weather", "arguments": {WEATHER}}}\n</tool_call>',
    "both": '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2, {"c": "}"}]}}\n</tool_call>',
    "malformed": 'Hm. <tool_call>\n{"name": "weather", "arguments": {"city": }}\n</tool_call>',
    "unknown": '<tool_call>\n{"name": "nobody", "arguments": {}}\n</tool_call>',
    "think": "<think>\nTwo and two.\n</think>\n\nThe answer is four.",
    "thinkcall": '<think>It may rain.</think>\n<tool_call>{"name": "weather", "arguments": '
    '{"city": "Oslo"}}</tool_call>',
    "deep": "It is late by now.\n</think>\n\nGood night.",
    "after": "It is sunny in Paris today.",
}
"""What follows the name of a script, up to the end of the answer."""

TEMPLATE = """{{- bos_token -}}
{%- if tools -%}You may call {% for tool in tools %}{{ tool | tojson }}{% endfor %} between
<tool_call> tags.{%- endif -%}
{%- for message in messages -%}
<|{{ message.role }}|>
{%- if message.reasoning_content is defined -%}
<think>{{ message.reasoning_content }}</think>{%- endif -%}
{{- message.content -}}
{%- for call in message.tool_calls or [] -%}
<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{%- endfor -%}
<|end|>
{%- endfor -%}
{%- if add_generation_prompt -%}
{%- set last = messages[-1] -%}
{%- if enable_thinking is defined and enable_thinking is false -%}<|go:plain|>
{%- elif last.role == "tool" -%}<|go:after|>
{%- elif last.content == "deep" -%}<|go:deep|><think>
{%- else -%}<|go:{{ last.content }}|>{%- endif -%}
{%- endif -%}"""


def start_of(script: str) -> str:
    """The token that begins a script."""
    return f"<|go:{script}|>" + ("<think>" if script == "deep" else "")


def cut(text: str, used: set[str]) -> list[str]:
    """Divide a text into pieces of a few letters that are not in `used`, which grows."""
    if not text:
        return []
    for size in range(3, 13):
        piece = text[:size]
        if piece in used or (0 < len(text) - size < 3):
            continue
        rest = cut(text[size:], used | {piece})
        if rest or size >= len(text):
            used.update((piece, *rest))
            return [piece, *rest]
    return []


def write_scripted_model(directory: Path, template: str = TEMPLATE) -> Path:
    """Write config, tokenizer and weights; returns `directory`."""
    special = ["<|pad|>", "<|bos|>", "<|end|>", *map(start_of, SCRIPTS)]
    used: set[str] = set()
    scripts = {name: cut(text, used) for name, text in SCRIPTS.items()}
    assert all("".join(pieces) == SCRIPTS[name] for name, pieces in scripts.items())
    added = [*special, *(piece for pieces in scripts.values() for piece in pieces)]
    _write_tokenizer(directory, added, special=len(special), template=template)
    ids = {text: LETTERS + index for index, text in enumerate(added)}
    follows = torch.zeros(HIDDEN, HIDDEN)
    for name, pieces in scripts.items():
        chain = [start_of(name), *pieces, "<|end|>"]
        for text, then in itertools.pairwise(chain):
            follows[ids[then], ids[text]] = 1.0
    _write_weights(directory, follows)
    return directory


def _write_tokenizer(directory: Path, added: list[str], *, special: int, template: str) -> None:
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [chr(byte) for byte in visible] + [chr(256 + i) for i in range(256 - len(visible))]
    assert len(added) + len(letters) <= HIDDEN
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
             "use_regex": False}  # fmt: skip
    vocab = {letter: index for index, letter in enumerate(letters)}
    document = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
        "added_tokens": [
            {"id": LETTERS + index, "content": text, "special": index < special,
             "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
            for index, text in enumerate(added)
        ],
        "pre_tokenizer": level, "decoder": level, "post_processor": None,
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": False},
    }  # fmt: skip
    config = {"bos_token": "<|bos|>", "eos_token": "<|end|>", "chat_template": template}
    _write_json(directory / "tokenizer.json", document)
    _write_json(directory / "tokenizer_config.json", config)


def _write_weights(directory: Path, follows: torch.Tensor) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": HIDDEN,
        "hidden_size": HIDDEN, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "max_position_embeddings": 4096, "tie_word_embeddings": False,
        "hidden_act": "silu", "bos_token_id": LETTERS + 1, "eos_token_id": LETTERS + 2,
        "torch_dtype": "float32",
    }  # fmt: skip
    layer = "model.layers.0."
    shapes = {
        "self_attn.q_proj": (32, HIDDEN), "self_attn.k_proj": (8, HIDDEN),
        "self_attn.v_proj": (8, HIDDEN), "self_attn.o_proj": (HIDDEN, 32),
        "mlp.gate_proj": (16, HIDDEN), "mlp.up_proj": (16, HIDDEN), "mlp.down_proj": (HIDDEN, 16),
    }  # fmt: skip
    tensors = {f"{layer}{name}.weight": torch.zeros(shape) for name, shape in shapes.items()}
    for name in (layer + "input_layernorm", layer + "post_attention_layernorm", "model.norm"):
        tensors[f"{name}.weight"] = torch.ones(HIDDEN)
    tensors["model.embed_tokens.weight"] = torch.eye(HIDDEN)
    tensors["lm_head.weight"] = follows
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    _write_json(directory / "config.json", config)


def _write_json(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document), encoding="utf-8")
