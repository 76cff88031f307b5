"""ModelShape: what config.json says in numbers, and what is refused by name."""

from typing import Any

import pytest

from appliance.core.model_shape import (
    TENSOR_ALIGNMENT,
    Llama3Scaling,
    UnsupportedModel,
    kv_slab_bytes,
    parse_config,
    parse_dtype,
    slab_bytes,
    slab_header_bytes,
    slab_offsets,
    weight_tensors,
)

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 704,
    "vocab_size": 4096,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def config(**changes: object) -> dict[str, Any]:
    return {**LLAMA, **changes}


def test_a_plain_llama_is_read_whole() -> None:
    shape = parse_config(LLAMA)
    assert (shape.family, shape.num_layers, shape.hidden, shape.head_dim) == ("llama", 6, 256, 32)
    assert (shape.num_heads, shape.num_kv_heads, shape.ff, shape.vocab_size) == (8, 2, 704, 4096)
    assert (shape.rope_theta, shape.rope_scaling, shape.norm_eps) == (500000.0, None, 1e-5)
    assert (shape.tied, shape.qkv_bias, shape.output_bias, shape.qk_norm) == (True, False) + (
        False,
    ) * 2
    assert shape.eos_ids == (2,)


def test_byte_arithmetic_of_a_5m_model() -> None:
    shape = parse_config(LLAMA)
    # embedding, 6 x (qkv, o, gate_up, down, two norms), last norm
    layer = (8 + 4) * 32 * 256 + 256 * 256 + 3 * 704 * 256 + 2 * 256
    assert shape.num_parameters == 4096 * 256 + 6 * layer + 256
    assert shape.weight_bytes("float32") == 2 * shape.weight_bytes("bfloat16")
    assert [g.bytes_per_token for g in shape.kv_groups("float32")] == [2 * 6 * 2 * 32 * 4]
    assert shape.kv_block_bytes("bfloat16", block_tokens=16) == 16 * 2 * 6 * 2 * 32 * 2
    needed = 11 * shape.kv_block_bytes("float32", block_tokens=16)
    size = kv_slab_bytes(shape, "float32", num_blocks=10, block_tokens=16)
    assert needed <= size < needed + 4096
    assert size % 4096 == 0


def test_slab_places_every_tensor_aligned_and_apart() -> None:
    shape = parse_config(config(tie_word_embeddings=False, architectures=["Qwen3ForCausalLM"]))
    offsets, end = slab_offsets(shape, "bfloat16"), slab_header_bytes(shape)
    for spec in weight_tensors(shape):
        assert offsets[spec.name] >= end
        assert offsets[spec.name] % TENSOR_ALIGNMENT == 0
        end = offsets[spec.name] + 2 * spec.num_elements
    assert slab_bytes(shape, "bfloat16") >= end
    assert {"lm_head", "layers.0.q_norm", "layers.5.down"} <= offsets.keys()


@pytest.mark.parametrize(
    ("changes", "scaling"),
    [
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3}}, True),
        ({"rope_scaling": {"type": "llama3", **LLAMA3}}, True),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}}, True),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}, False),
        ({"rope_scaling": {"rope_type": "default"}}, False),
    ],
)
def test_old_and_new_rope_keys_mean_the_same(changes: dict[str, Any], scaling: bool) -> None:
    base = config(**changes)
    if "rope_parameters" in changes:
        del base["rope_theta"]
    shape = parse_config(base)
    assert shape.rope_theta == 500000.0
    expected = Llama3Scaling(
        factor=8, low_freq_factor=1, high_freq_factor=4, original_max_positions=8192
    )
    assert shape.rope_scaling == (expected if scaling else None)


def test_families_set_their_switches() -> None:
    qwen2 = parse_config(config(architectures=["Qwen2ForCausalLM"], use_sliding_window=False))
    assert (qwen2.qkv_bias, qwen2.output_bias, qwen2.qk_norm) == (True, False, False)
    qwen3 = parse_config(config(architectures=["Qwen3ForCausalLM"]))
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim) == (False, True, 128)
    biased = parse_config(config(attention_bias=True))
    assert (biased.qkv_bias, biased.output_bias) == (True, True)
    by_type = {k: v for k, v in LLAMA.items() if k != "architectures"} | {"model_type": "mistral"}
    assert parse_config(by_type | {"head_dim": None}).family == "mistral"


def test_eos_ids_of_both_files_are_united_generation_first() -> None:
    shape = parse_config(config(eos_token_id=7), generation_config={"eos_token_id": [9, 7, 8]})
    assert shape.eos_ids == (9, 7, 8)
    assert parse_config(config(eos_token_id=None)).eos_ids == ()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            r"architectures.*GPT2LMHeadModel.*LlamaForCausalLM",
        ),
        ({"architectures": None, "model_type": "phi"}, r"model_type.*phi.*qwen3"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantization_config.*gptq"),
        ({"hidden_act": "gelu"}, r"hidden_act.*gelu"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, r"rope_type.*yarn.*llama3"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        (
            {"architectures": ["MistralForCausalLM"], "sliding_window": 1024},
            r"sliding_window.*1024",
        ),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "sliding_window": 1024,
                "use_sliding_window": True,
            },
            "sliding_window",
        ),
        ({"layer_types": ["full_attention", "linear_attention"]}, r"layer_types.*linear_attention"),
        ({"layer_types": ["sliding_attention"], "sliding_window": 64}, "sliding_window"),
        ({"architectures": ["MistralForCausalLM"], "attention_bias": True}, "attention_bias"),
        ({"num_attention_heads": 9}, r"num_attention_heads=9"),
        ({"hidden_size": None}, r"hidden_size.*None"),
        ({"num_hidden_layers": "six"}, r"num_hidden_layers.*six"),
        ({"head_dim": 33}, r"head_dim.*33"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
    ],
)
def test_what_is_not_built_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModel, match=named):
        parse_config(config(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["MistralForCausalLM"], "sliding_window": None},
        {"architectures": ["MistralForCausalLM"], "sliding_window": 4096},
        {
            "architectures": ["Qwen2ForCausalLM"],
            "sliding_window": 1024,
            "use_sliding_window": False,
            "layer_types": ["full_attention"],
        },
        {"quantization_config": None},
        {"hidden_act": "silu", "partial_rotary_factor": 1.0},
    ],
)
def test_settings_without_effect_are_accepted(changes: dict[str, Any]) -> None:
    assert parse_config(config(**changes)).num_layers == 6


def test_dtypes() -> None:
    assert [parse_dtype(name) for name in ("float32", "bfloat16")] == ["float32", "bfloat16"]
    with pytest.raises(UnsupportedModel, match="float16"):
        parse_dtype("float16")
