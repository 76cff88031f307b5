"""Write a Hugging Face Llama checkpoint as a GGUF file, for other engines on the same weights.

The format (version 3, little-endian): magic, version, counts, then key-value pairs, then a
description of every tensor (name, dimensions innermost first, type, offset), then the data, each
tensor at a multiple of 32 bytes. Source: the specification in the ggml repository, docs/gguf.md.

Two things differ from the checkpoint. The readers rotate neighbouring pairs of a head's dimensions
where Hugging Face rotates the first half against the second, so the rows of the query and key
projections are interleaved. And norms stay float32 in every precision.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import torch
from safetensors.torch import load_file

ALIGNMENT = 32
_UINT32, _FLOAT32, _BOOL, _STRING, _ARRAY, _INT32 = 4, 6, 7, 8, 9, 5
_NORMAL_TOKEN, _CONTROL_TOKEN = 1, 3

PRECISIONS: Mapping[str, tuple[torch.dtype, int, int]] = MappingProxyType(
    {
        "f32": (torch.float32, 0, 0),
        "f16": (torch.float16, 1, 1),
        "bf16": (torch.bfloat16, 30, 32),
    }
)
"""Name -> torch's type, the tensor type and the file type of GGUF."""

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_TOP_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_name(name: str) -> str:
    """The GGUF name of a Llama checkpoint's tensor. `ValueError` if there is none."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    part = rest.removesuffix(".weight")
    if part not in _NAMES:
        raise ValueError(f"tensor {name!r} has no place in a GGUF Llama")
    return f"blk.{layer}.{_NAMES[part]}.weight"


def interleaved(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of each head from (first half, second half) to pairs of one of each. `[rows, k]`."""
    rows, width = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, width)
    return halves.transpose(1, 2).reshape(rows, width)


def write_llama(path: Path, directory: Path, *, precision: str) -> None:
    """Write the checkpoint in `directory` to `path`. `KeyError` for an unknown precision."""
    dtype, tensor_type, file_type = PRECISIONS[precision]
    config = json.loads((directory / "config.json").read_text())
    metadata = _model_pairs(config, name=directory.name, file_type=file_type)
    metadata += _tokenizer_pairs(directory, config)
    tensors = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        if "q_proj" in name:
            tensor = interleaved(tensor, config["num_attention_heads"])
        elif "k_proj" in name:
            tensor = interleaved(tensor, config["num_key_value_heads"])
        tensors[gguf_name(name)] = tensor if tensor.dim() == 1 else tensor.to(dtype)
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
        file.write(b"".join(metadata))
        _write_tensors(file, tensors, tensor_type)


def _write_tensors(file: BinaryIO, tensors: Mapping[str, torch.Tensor], tensor_type: int) -> None:
    offset = 0
    for name, tensor in tensors.items():
        dimensions = tuple(reversed(tensor.shape))
        kind = 0 if tensor.dim() == 1 else tensor_type
        file.write(_text(name) + struct.pack("<I", len(dimensions)))
        file.write(struct.pack(f"<{len(dimensions)}QIQ", *dimensions, kind, offset))
        offset += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    for tensor in tensors.values():
        file.write(bytes(-file.tell() % ALIGNMENT))
        file.write(tensor.contiguous().view(torch.uint8).numpy().tobytes())


def _model_pairs(config: Mapping[str, Any], *, name: str, file_type: int) -> list[bytes]:
    return [
        _pair("general.architecture", _STRING, "llama"),
        _pair("general.name", _STRING, name),
        _pair("general.file_type", _UINT32, file_type),
        _pair("general.alignment", _UINT32, ALIGNMENT),
        _pair("llama.context_length", _UINT32, config["max_position_embeddings"]),
        _pair("llama.embedding_length", _UINT32, config["hidden_size"]),
        _pair("llama.block_count", _UINT32, config["num_hidden_layers"]),
        _pair("llama.feed_forward_length", _UINT32, config["intermediate_size"]),
        _pair("llama.attention.head_count", _UINT32, config["num_attention_heads"]),
        _pair("llama.attention.head_count_kv", _UINT32, config["num_key_value_heads"]),
        _pair("llama.attention.layer_norm_rms_epsilon", _FLOAT32, config["rms_norm_eps"]),
        _pair("llama.rope.dimension_count", _UINT32, config["head_dim"]),
        _pair("llama.rope.freq_base", _FLOAT32, config["rope_theta"]),
        _pair("llama.vocab_size", _UINT32, config["vocab_size"]),
    ]


def _tokenizer_pairs(directory: Path, config: Mapping[str, Any]) -> list[bytes]:
    saved = json.loads((directory / "tokenizer.json").read_text())
    model = saved["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    special = {token["id"] for token in saved["added_tokens"] if token["special"]}
    kinds = [
        _CONTROL_TOKEN if number in special else _NORMAL_TOKEN for number in range(len(tokens))
    ]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    template = json.loads((directory / "tokenizer_config.json").read_text())["chat_template"]
    return [
        _pair("tokenizer.ggml.model", _STRING, "gpt2"),
        _pair("tokenizer.ggml.pre", _STRING, "gpt-2"),
        _array("tokenizer.ggml.tokens", _STRING, tokens),
        _array("tokenizer.ggml.token_type", _INT32, kinds),
        _array("tokenizer.ggml.merges", _STRING, merges),
        _pair("tokenizer.ggml.bos_token_id", _UINT32, config["bos_token_id"]),
        _pair("tokenizer.ggml.eos_token_id", _UINT32, config["eos_token_id"]),
        _pair("tokenizer.ggml.padding_token_id", _UINT32, config["pad_token_id"]),
        _pair("tokenizer.ggml.add_bos_token", _BOOL, 0),
        _pair("tokenizer.chat_template", _STRING, template),
    ]


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _value(kind: int, value: Any) -> bytes:
    if kind == _STRING:
        return _text(value)
    return struct.pack({_UINT32: "<I", _INT32: "<i", _FLOAT32: "<f", _BOOL: "<?"}[kind], value)


def _pair(key: str, kind: int, value: Any) -> bytes:
    return _text(key) + struct.pack("<I", kind) + _value(kind, value)


def _array(key: str, kind: int, values: Sequence[Any]) -> bytes:
    head = _text(key) + struct.pack("<IIQ", _ARRAY, kind, len(values))
    return head + b"".join(_value(kind, value) for value in values)
