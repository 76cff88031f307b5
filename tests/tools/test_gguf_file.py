"""The GGUF file says what the checkpoint says."""

import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tools.gguf_file import gguf_name, interleaved, write_llama
from tools.make_checkpoint import SHAPES, Shape, make

SMALL = Shape(
    vocab_size=320,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=48,
    tied=False,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("made") / "small"
    make(directory, SMALL, precisions=("f32", "f16"))
    return directory


class Reader:
    """Enough of the format to read a file back."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, form: str) -> Any:
        (value,) = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def text(self) -> str:
        size = self.take("Q")
        self.at += size
        return self.data[self.at - size : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind == 9:
            inner, count = self.take("I"), self.take("Q")
            return [self.value(inner) for _ in range(count)]
        return self.text() if kind == 8 else self.take({4: "I", 5: "i", 6: "f", 7: "?"}[kind])


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    reader = Reader(path.read_bytes())
    assert reader.take("4s") == b"GGUF"
    assert reader.take("I") == 3
    num_tensors, num_pairs = reader.take("Q"), reader.take("Q")
    pairs = {reader.text(): reader.value(reader.take("I")) for _ in range(num_pairs)}
    described = []
    for _ in range(num_tensors):
        name = reader.text()
        dimensions = [reader.take("Q") for _ in range(reader.take("I"))]
        described.append((name, dimensions, reader.take("I"), reader.take("Q")))
    begin = -(-reader.at // 32) * 32
    tensors = {}
    for name, dimensions, kind, offset in described:
        dtype = {0: torch.float32, 1: torch.float16}[kind]
        count = int(torch.tensor(dimensions).prod())
        flat = torch.frombuffer(bytearray(reader.data[begin + offset :]), dtype=dtype, count=count)
        tensors[name] = flat.reshape(dimensions[::-1])
    return pairs, tensors


def test_every_tensor_comes_back_under_its_name(checkpoint: Path) -> None:
    pairs, tensors = read(checkpoint / "small-f32.gguf")
    stored = load_file(checkpoint / "model.safetensors")
    assert len(tensors) == len(stored)
    assert pairs["llama.attention.head_count_kv"] == 2
    assert pairs["llama.rope.dimension_count"] == 8
    for name, tensor in stored.items():
        heads = 4 if "q_proj" in name else 2 if "k_proj" in name else 0
        want = interleaved(tensor, heads) if heads else tensor
        assert torch.equal(tensors[gguf_name(name)], want), name


def test_vocabulary_is_listed_by_id_with_markup_marked(checkpoint: Path) -> None:
    pairs, _ = read(checkpoint / "small-f32.gguf")
    assert len(pairs["tokenizer.ggml.tokens"]) == 320
    assert pairs["tokenizer.ggml.tokens"][2] == "<|end|>"
    assert pairs["tokenizer.ggml.token_type"][:7] == [3] * 6 + [1]
    assert pairs["tokenizer.ggml.eos_token_id"] == 2


def test_norms_stay_in_float32(checkpoint: Path) -> None:
    _, tensors = read(checkpoint / "small-f16.gguf")
    assert tensors["blk.1.ffn_norm.weight"].dtype == torch.float32
    assert tensors["blk.1.ffn_down.weight"].dtype == torch.float16


def test_rotation_pairs_become_neighbours() -> None:
    weight = torch.arange(8.0)[:, None]
    assert interleaved(weight, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_unknown_tensor_and_precision_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rotary"):
        gguf_name("model.layers.0.rotary.weight")
    with pytest.raises(KeyError, match="q4"):
        write_llama(tmp_path / "x.gguf", checkpoint, precision="q4")


def test_equal_seeds_give_equal_weights_and_end_is_never_drawn(
    checkpoint: Path, tmp_path: Path
) -> None:
    make(tmp_path / "small", SMALL, precisions=())
    first = load_file(checkpoint / "model.safetensors")
    second = load_file(tmp_path / "small" / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not first["lm_head.weight"][2].any()
    assert (checkpoint / "tokenizer.json").read_bytes() == (
        tmp_path / "small" / "tokenizer.json"
    ).read_bytes()


def test_published_shapes_have_the_parameters_of_their_names() -> None:
    def count(shape: Shape) -> int:
        head = shape.hidden_size // shape.num_heads
        attention = shape.hidden_size * head * 2 * (shape.num_heads + shape.num_kv_heads)
        layer = attention + 3 * shape.hidden_size * shape.intermediate_size
        return shape.num_layers * layer + shape.vocab_size * shape.hidden_size * (2 - shape.tied)

    assert count(SHAPES["rand5m"]) == pytest.approx(5e6, rel=0.1)
    assert count(SHAPES["rand100m"]) == pytest.approx(100e6, rel=0.1)
