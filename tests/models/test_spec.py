"""config.json to Spec: both spellings of transformers, its silent defaults, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2MoeConfig, Qwen3MoeConfig

from tiny import FAMILIES, MOE_FAMILIES, tiny_checkpoint
from trireme.core.refusal import Refusal
from trireme.models.spec import Rope, make_spec, read_spec

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 100,
}
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 2}
QWEN2_MOE = {**QWEN2, "architectures": ["Qwen2MoeForCausalLM"]}
QWEN3_MOE = {**QWEN2, "architectures": ["Qwen3MoeForCausalLM"]}


def test_what_a_silent_llama_is():
    spec = make_spec(LLAMA)
    assert (spec.family, spec.num_kv_heads, spec.head_dim, spec.eps) == ("llama", 4, 16, 1e-6)
    assert (spec.max_position_embeddings, spec.dtype, spec.tie_word_embeddings) == (2048, "float32", False)
    assert spec.rope == Rope(theta=10_000.0) and spec.windows == (0, 0, 0)
    assert not (spec.qkv_bias or spec.o_bias or spec.mlp_bias or spec.qk_norm)


@pytest.mark.parametrize("family", [*FAMILIES, *MOE_FAMILIES])
def test_a_saved_checkpoint_is_read_as_transformers_reads_it(family: str, tmp_path: Path):
    spec = read_spec(tiny_checkpoint(tmp_path, family, num_hidden_layers=2, eos_token_id=[2, 5]))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert spec.family == family
    assert spec.num_heads == theirs.num_attention_heads and spec.num_kv_heads == theirs.num_key_value_heads
    assert spec.head_dim == getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads)
    assert spec.eps == theirs.rms_norm_eps and spec.rope.theta == theirs.rope_parameters["rope_theta"]
    assert spec.eos_token_ids == (2, 5) and spec.dtype == "float32"


def test_biases_of_the_families():
    qwen2 = make_spec(QWEN2)
    assert qwen2.qkv_bias and not qwen2.o_bias
    qwen3 = make_spec({**QWEN2, "architectures": ["Qwen3ForCausalLM"], "attention_bias": True})
    assert qwen3.qkv_bias and qwen3.o_bias and qwen3.qk_norm and qwen3.head_dim == 128
    llama = make_spec({**LLAMA, "attention_bias": True, "mlp_bias": True})
    assert llama.qkv_bias and llama.o_bias and llama.mlp_bias
    qwen2_moe = make_spec(QWEN2_MOE)
    assert qwen2_moe.qkv_bias and not qwen2_moe.o_bias and not make_spec({**QWEN2_MOE, "qkv_bias": False}).qkv_bias
    qwen3_moe = make_spec({**QWEN3_MOE, "attention_bias": True})
    assert qwen3_moe.qkv_bias and qwen3_moe.o_bias and qwen3_moe.qk_norm and qwen3_moe.head_dim == 16


def test_versions_spell_dtype_and_rope_differently():
    old = make_spec({**LLAMA, "torch_dtype": "bfloat16", "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}})
    new = make_spec({**LLAMA, "dtype": "bfloat16", "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}})
    assert old == new and old.rope == Rope(theta=5e5, kind="linear", factor=2.0)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1},
        {"use_sliding_window": True, "sliding_window": 32},
        {"use_sliding_window": False, "sliding_window": 32, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ],
)
def test_windows_are_transformers(more: dict):
    theirs = Qwen2Config(**{key: value for key, value in QWEN2.items() if key != "architectures"}, **more)
    wanted = tuple(theirs.sliding_window if kind == "sliding_attention" else 0 for kind in theirs.layer_types)
    assert make_spec({**QWEN2, **more}).windows == wanted


@pytest.mark.parametrize("more", [{}, {"use_sliding_window": True}, {"use_sliding_window": True, "max_window_layers": 2}])
def test_windows_of_mixtures_are_transformers(more: dict):
    theirs = Qwen2MoeConfig(num_hidden_layers=3, **more)
    wanted = tuple(theirs.sliding_window if kind == "sliding_attention" else 0 for kind in theirs.layer_types)
    assert make_spec({**QWEN2_MOE, **more}).windows == wanted
    theirs = Qwen3MoeConfig(num_hidden_layers=3, **more)
    assert make_spec({**QWEN3_MOE, **more}).windows == (theirs.sliding_window or 0,) * 3


@pytest.mark.parametrize("family", MOE_FAMILIES)
@pytest.mark.parametrize(
    "more", [{}, {"mlp_only_layers": [0, 3]}, {"decoder_sparse_step": 2}, {"decoder_sparse_step": 2, "mlp_only_layers": [1]}]
)
def test_sparse_layers_are_transformers(family: str, more: dict, tmp_path: Path):
    more = {"decoder_sparse_step": 1, "mlp_only_layers": [], **more}
    spec = read_spec(tiny_checkpoint(tmp_path, family, **more))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert spec.sparse == tuple(hasattr(layer.mlp, "experts") for layer in theirs.model.layers)
    assert (spec.num_experts, spec.num_experts_per_tok, spec.moe_intermediate) == (8, 3, 20)
    assert spec.shared_intermediate == (36 if family == "qwen2_moe" else 0) and spec.norm_topk_prob == (family == "qwen3_moe")


def test_what_silent_mixtures_are():
    for config, theirs in ((QWEN2_MOE, Qwen2MoeConfig()), (QWEN3_MOE, Qwen3MoeConfig())):
        spec = make_spec({key: value for key, value in config.items() if key != "num_key_value_heads"} | {"num_attention_heads": 16})
        assert (spec.num_experts, spec.num_experts_per_tok) == (theirs.num_experts, theirs.num_experts_per_tok)
        assert spec.moe_intermediate == theirs.moe_intermediate_size and spec.num_kv_heads == theirs.num_key_value_heads
        assert spec.shared_intermediate == getattr(theirs, "shared_expert_intermediate_size", 0)
        assert spec.norm_topk_prob == theirs.norm_topk_prob and all(spec.sparse)
    assert not any(make_spec(LLAMA).sparse) and make_spec(LLAMA).num_experts == 0


def test_both_spellings_of_the_number_of_experts():
    assert make_spec({**QWEN3_MOE, "num_experts": 12}) == make_spec({**QWEN3_MOE, "num_local_experts": 12})


def test_more_experts_a_token_than_there_are():
    with pytest.raises(Refusal, match="num_experts_per_tok is 8 of 4 experts"):
        make_spec({**QWEN3_MOE, "num_experts": 4})


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "architecture 'MambaForCausalLM' is not known.*LlamaForCausalLM"),
        ({"architectures": None}, "architecture None"),
        ({"hidden_act": "gelu"}, "hidden_act gelu is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config .* is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope scaling 'longrope' is not known"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "llama3 rope scaling lacks 'low_freq_factor'"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers is 'many'"),
        ({"num_key_value_heads": 3}, "3 key/value heads do not divide 4 heads"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn' is not known"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(more: dict, words: str):
    with pytest.raises(Refusal, match=words):
        make_spec({**LLAMA, **more})


def test_layer_types_must_fit():
    with pytest.raises(Refusal, match="layer_types"):
        make_spec({**QWEN2, "layer_types": ["full_attention"]})


def test_a_directory_without_a_checkpoint_is_refused(tmp_path: Path):
    with pytest.raises(Refusal, match=r"no config.json"):
        read_spec(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA)[:-5])
    with pytest.raises(Refusal, match="is not JSON"):
        read_spec(tmp_path)
