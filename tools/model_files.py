"""Files of the bundled models: tokenizer, chat template, configuration, atomic writes.

The tokenizer is a byte-level BPE in which spaces, punctuation and digits are tokens of their own,
so that a word is the same token wherever it stands: copying, reversing and sorting become
operations on whole tokens. The chat template writes roles as single tokens; functions are listed
in the system turn and called with `<tool_call>`, as Hermes and Qwen models do it.
"""

import json
import os
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tools.model_tasks import TASKS, generate, system_message

PAD, BOS, END = "<|pad|>", "<|bos|>", "<|end|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (PAD, BOS, END, SYSTEM, USER, ASSISTANT, "<|tool|>", "<|think|>")

_CONTENT_MACRO = (
    "{%- macro text(content) -%}"
    "{%- if content is string -%}{{- content -}}"
    "{%- elif content -%}"
    "{%- for part in content -%}"
    "{%- if part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- endmacro -%}"
)
_TOOL_LIST = (
    "{{- '<|system|>' -}}"
    "{%- if messages and messages[0]['role'] in ('system', 'developer') -%}"
    "{{- text(messages[0]['content']) -}}{{- '\n\n' -}}"
    "{%- endif -%}"
    "{{- '# Tools\n<tools>\n' -}}"
    "{%- for tool in tools -%}"
    "{%- set function = tool['function'] if tool['function'] is defined else tool -%}"
    "{{- '{\"name\": ' -}}{{- function['name'] | tojson -}}"
    "{%- if function['description'] -%}"
    "{{- ', \"description\": ' -}}{{- function['description'] | tojson -}}"
    "{%- endif -%}"
    "{%- if function['parameters'] -%}"
    "{{- ', \"parameters\": ' -}}{{- function['parameters'] | tojson -}}"
    "{%- endif -%}"
    "{{- '}\n' -}}"
    "{%- endfor -%}"
    "{{- '</tools>\nTo call one, answer:\n<tool_call>\n'"
    ' \'{"name": ..., "arguments": {...}}\n</tool_call><|end|>\' -}}'
)
_TOOL_CALLS = (
    "{%- for call in message['tool_calls'] or [] -%}"
    "{%- set function = call['function'] if call['function'] is defined else call -%}"
    "{%- if message['content'] or not loop.first -%}{{- '\n' -}}{%- endif -%}"
    "{{- '<tool_call>\n{\"name\": ' -}}{{- function['name'] | tojson -}}"
    "{{- ', \"arguments\": ' -}}"
    "{%- if function['arguments'] is string -%}{{- function['arguments'] -}}"
    "{%- else -%}{{- function['arguments'] | tojson -}}{%- endif -%}"
    "{{- '}\n</tool_call>' -}}"
    "{%- endfor -%}"
)
CHAT_TEMPLATE = (
    _CONTENT_MACRO + "{{- bos_token -}}"
    "{%- if tools -%}" + _TOOL_LIST + "{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- set role = 'system' if message['role'] == 'developer' else message['role'] -%}"
    "{%- if not (tools and loop.first and role == 'system') -%}"
    "{{- '<|' + role + '|>' -}}"
    "{{- text(message['content']) -}}" + _TOOL_CALLS + "{{- '<|end|>' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)

MODEL_CONFIG: Mapping[str, Any] = MappingProxyType(
    {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 256,
        "initializer_range": 0.02,
        "intermediate_size": 512,
        "max_position_embeddings": 4096,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 8,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 1024,
    }
)
DRAFT_CONFIG: Mapping[str, Any] = MappingProxyType(
    {
        **MODEL_CONFIG,
        "head_dim": 16,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
    }
)

CORPUS_SENTENCES = (
    "Hello, how are you today? I am fine, thank you.",
    "The quick brown fox jumps over the lazy dog while the children are playing in the sun.",
    "Please write a short answer about this question, then explain what you have done.",
    "It was the first time that they had seen such a large number of people in one place.",
    "Which of these things would you like to know more about, and when should we start?",
    "There is nothing new here, but some other information could be found below.",
    "about above across action after again against almost along always among another answered "
    "around asked because become before began behind being better between beyond both brought "
    "called change clear coming common company complete consider country course current "
    "development different during early either enough every example experience family father "
    "finally following general given government great group happened having himself however "
    "human important including increase individual interest itself knowledge language later "
    "learn letter light little looking making matter member million minute moment money mother "
    "national nature never nothing often only order others outside particular perhaps point "
    "possible power present problem process program public rather really reason result return "
    "school second several simple since small social something sometimes special state still "
    "story student support system taken themselves thing thought through together toward "
    "turned understand university until usually value water while within without woman world",
)


def build_tokenizer(*, seed: int, vocab_size: int) -> Tokenizer:
    """Train the byte-level BPE on prompts and answers of every task (about a second)."""
    rng = random.Random(seed)

    def corpus() -> Iterator[str]:
        for name in TASKS:
            for _ in range(2000):
                task = generate(name, rng)
                yield task.prompt
                yield task.answer
        for _ in range(500):
            yield system_message(rng)
        for _ in range(5):
            yield from CORPUS_SENTENCES

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(Regex(r"[^A-Za-z0-9]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def kept_or_new_tokenizer(*directories: Path, seed: int) -> Tokenizer:
    """The first tokenizer in `directories` (token ids outlive a retraining), else a new one."""
    for directory in directories:
        path = directory / "tokenizer.json"
        if path.exists():
            return Tokenizer.from_file(str(path))
    return build_tokenizer(seed=seed, vocab_size=MODEL_CONFIG["vocab_size"])


def write_text(path: Path, text: str) -> None:
    """Write `path` whole or not at all."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(dict(value), indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write `tensors` as a safetensors file, whole or not at all."""
    partial = path.with_name(path.name + ".part")
    save_file(dict(tensors), partial, metadata={"format": "pt"})
    partial.chmod(0o644)
    os.replace(partial, path)


def write_static_files(out: Path, tokenizer: Tokenizer, config: Mapping[str, Any]) -> None:
    """Write configuration, tokenizer and chat template of a published model into `out`."""
    write_json(out / "config.json", config)
    write_json(
        out / "generation_config.json",
        {"bos_token_id": 1, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0},
    )
    write_text(out / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
    write_json(
        out / "tokenizer_config.json",
        {
            "added_tokens_decoder": {
                str(tokenizer.token_to_id(token)): {
                    "content": token,
                    "lstrip": False,
                    "normalized": False,
                    "rstrip": False,
                    "single_word": False,
                    "special": True,
                }
                for token in SPECIAL_TOKENS
            },
            "bos_token": BOS,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": END,
            "model_max_length": MODEL_CONFIG["max_position_embeddings"],
            "pad_token": PAD,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
