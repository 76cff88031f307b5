"""Write random Llama checkpoints with a tokenizer of their own, for measurements.

The weights are drawn from a seed, so every machine gets the same files and nothing is downloaded.
Three shapes: `rand5m` (256 x 6, vocabulary 4096, tied embeddings), `rand100m` (768 x 12, vocabulary
8192) and, for what depends on size, `rand140m` (1024 x 11, vocabulary 8192; 563 MB in float32). The
row of the end token is zero in the output projection: its logit is 0 at every position, never the
largest of thousands, so greedy answers have the length that was asked for even where a server knows
no `ignore_eos`.

Beside the Hugging Face files, one GGUF file per wanted precision, written by `tools.gguf_file`.

    python -m tools.make_checkpoint build/checkpoints [--shape rand5m] [--gguf f32 f16 bf16]
"""

import argparse
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from appliance.core.model_shape import ModelShape, parse_config
from appliance.core.types import Record
from appliance.modeling.families import SOURCES
from tools.gguf_file import PRECISIONS, write_llama

SEED = 20
PAD, BOS, END = "<|pad|>", "<|bos|>", "<|end|>"
SPECIAL_TOKENS = (PAD, BOS, END, "<|system|>", "<|user|>", "<|assistant|>")
INITIALIZER_RANGE = 0.02
MAX_POSITIONS = 4096
CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


class Shape(Record, frozen=True, kw_only=True):
    """The numbers that tell one Llama from another."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    tied: bool


SHAPES: Mapping[str, Shape] = {
    "rand5m": Shape(
        vocab_size=4096,
        hidden_size=256,
        num_layers=6,
        num_heads=8,
        num_kv_heads=2,
        intermediate_size=704,
        tied=True,
    ),
    "rand100m": Shape(
        vocab_size=8192,
        hidden_size=768,
        num_layers=12,
        num_heads=12,
        num_kv_heads=4,
        intermediate_size=2304,
        tied=False,
    ),
    "rand140m": Shape(
        vocab_size=8192,
        hidden_size=1024,
        num_layers=11,
        num_heads=16,
        num_kv_heads=4,
        intermediate_size=2816,
        tied=False,
    ),
}

USUAL = ["rand5m", "rand100m"]
"""Written unless others are asked for."""


def config_of(shape: Shape) -> dict[str, Any]:
    """The `config.json` of a shape."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": SPECIAL_TOKENS.index(BOS),
        "eos_token_id": SPECIAL_TOKENS.index(END),
        "head_dim": shape.hidden_size // shape.num_heads,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": INITIALIZER_RANGE,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": MAX_POSITIONS,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": shape.num_heads,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_kv_heads,
        "pad_token_id": SPECIAL_TOKENS.index(PAD),
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": "float32",
        "vocab_size": shape.vocab_size,
    }


def random_words(rng: random.Random, count: int) -> list[str]:
    """Words of one to three random syllables."""
    syllables = [a + b + c for a in "bcdfghklmnprstvw" for b in "aeiou" for c in "lmnrst"]
    return ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(count)]


def make_tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level BPE of exactly `vocab_size` tokens, trained on sentences of random words."""
    rng = random.Random(SEED)
    words = random_words(rng, 2 * vocab_size)

    def sentences() -> Iterator[str]:
        for _ in range(vocab_size):
            yield " ".join(rng.choices(words, k=50))

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the corpus gives {tokenizer.get_vocab_size()} tokens, not {vocab_size}")
    return tokenizer


def make_weights(shape: ModelShape) -> dict[str, torch.Tensor]:
    """Normal weights, norms of one; the end token's output row is zero."""
    generator = torch.Generator().manual_seed(SEED)
    tensors = {
        source.name: torch.ones(source.shape)
        if len(source.shape) == 1
        else torch.randn(source.shape, generator=generator) * INITIALIZER_RANGE
        for source in SOURCES[shape.family](shape)
    }
    output = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    output[SPECIAL_TOKENS.index(END)] = 0.0
    return tensors


def tokenizer_config() -> dict[str, Any]:
    """The `tokenizer_config.json` beside `tokenizer.json`."""
    added = {
        str(number): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for number, token in enumerate(SPECIAL_TOKENS)
    }
    return {
        "added_tokens_decoder": added,
        "bos_token": BOS,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "model_max_length": MAX_POSITIONS,
        "pad_token": PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def make(directory: Path, shape: Shape, *, precisions: Sequence[str]) -> int:
    """Write a checkpoint into `directory`, with GGUF files named after it; the number of
    parameters. `ValueError` if the corpus has too few words for the vocabulary."""
    config = config_of(shape)
    tokenizer, tensors = make_tokenizer(shape.vocab_size), make_weights(parse_config(config))
    directory.mkdir(parents=True, exist_ok=True)
    for file, value in (
        ("config.json", config),
        (
            "generation_config.json",
            {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
        ),
        ("tokenizer_config.json", tokenizer_config()),
    ):
        (directory / file).write_text(json.dumps(value, indent=2) + "\n")
    tokenizer.save(str(directory / "tokenizer.json"))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    for precision in precisions:
        write_llama(
            directory / f"{directory.name}-{precision}.gguf", directory, precision=precision
        )
    return sum(tensor.numel() for tensor in tensors.values())


def main() -> None:
    """Write what was asked for and say where it is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, help="a folder per shape is made in this one")
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=USUAL)
    parser.add_argument("--gguf", nargs="*", choices=list(PRECISIONS), default=[])
    options = parser.parse_args()
    for name in options.shape:
        count = make(options.out / name, SHAPES[name], precisions=options.gguf)
        print(f"{options.out / name}: {count / 1e6:.2f}M parameters")


if __name__ == "__main__":
    main()
