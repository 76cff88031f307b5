"""Small random checkpoints of each family, written by transformers itself (the oracle)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
COMMON: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 84,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Variant:
    """One checkpoint: the family's config class by name, its settings, and how it is saved."""

    family: str
    settings: dict[str, Any]
    shard: str = "1GB"


VARIANTS: dict[str, Variant] = {
    "llama": Variant("Llama", {"tie_word_embeddings": True}),
    "llama3-rope-untied-sharded": Variant(
        "Llama",
        {"tie_word_embeddings": False, "rope_parameters": LLAMA3_ROPE, "num_attention_heads": 4},
        shard="40KB",
    ),
    "llama-biased-mha": Variant("Llama", {"attention_bias": True, "num_key_value_heads": 6}),
    "qwen2": Variant("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": Variant("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "mistral": Variant("Mistral", {"sliding_window": None, "head_dim": 12}),
}


def write_checkpoint(directory: Path, variant: Variant, *, seed: int = 0) -> Path:
    """Save a random model of that variant; biases and norms are random too. Returns `directory`."""
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, f"{variant.family}Config")(**{**COMMON, **variant.settings})
    model = getattr(transformers, f"{variant.family}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            if name.endswith("bias"):
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory, max_shard_size=variant.shard)
    return directory


def load_oracle(directory: Path, *, dtype: torch.dtype) -> Any:
    """The same checkpoint in transformers."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager"
    )
    return model.eval()


class CheckpointStore:
    """Writes each variant once per test session."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self._factory = factory
        self._written: dict[str, Path] = {}

    def __call__(self, name: str) -> Path:
        if name not in self._written:
            directory = self._factory.mktemp(name.replace("-", "_"))
            self._written[name] = write_checkpoint(directory, VARIANTS[name])
        return self._written[name]
