"""Rotary tables against transformers' own, plain and stretched."""

import pytest
import torch

from appliance.modeling import rotary
from appliance.worker.torch_engine import read_shape
from tests.modeling.checkpoints import CheckpointStore, load_oracle


@pytest.mark.parametrize("name", ["llama", "llama3-rope-untied-sharded", "qwen3"])
def test_tables_equal_those_of_transformers(checkpoint: CheckpointStore, name: str) -> None:
    directory = checkpoint(name)
    cos, sin = rotary.tables(read_shape(directory), max_positions=512, dtype=torch.float32)
    embedding = load_oracle(directory, dtype=torch.float32).model.rotary_emb
    positions = torch.arange(512).unsqueeze(0)
    want_cos, want_sin = embedding(torch.zeros(1), positions)
    half = cos.shape[-1] // 2
    assert torch.allclose(cos[:, 0], want_cos[0], atol=1e-6)
    assert torch.allclose(sin[:, 0, half:], want_sin[0, :, half:], atol=1e-6)
    assert torch.allclose(-sin[:, 0, :half], want_sin[0, :, :half], atol=1e-6)
