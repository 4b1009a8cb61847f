"""config.json to Spec: both spellings of transformers, its silent defaults, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from real_configs import QWEN3_5_35B
from tiny import FAMILIES, HYBRID_FAMILIES, MOE_FAMILIES, tiny_checkpoint, without_vision
from trireme.core.refusal import Refusal
from trireme.models.spec import Delta, Rope, make_spec, read_spec

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
HYBRID = {
    "Qwen3_5ForCausalLM": Qwen3_5TextConfig,
    "Qwen3_5MoeForCausalLM": Qwen3_5MoeTextConfig,
    "Qwen3NextForCausalLM": Qwen3NextConfig,
}


def test_what_a_silent_llama_is():
    spec = make_spec(LLAMA)
    assert (spec.family, spec.num_kv_heads, spec.head_dim, spec.eps) == ("llama", 4, 16, 1e-6)
    assert (spec.max_position_embeddings, spec.dtype, spec.tie_word_embeddings) == (2048, "float32", False)
    assert spec.rope == Rope(theta=10_000.0) and spec.windows == (0, 0, 0)
    assert not (spec.qkv_bias or spec.o_bias or spec.mlp_bias or spec.qk_norm)


@pytest.mark.parametrize("family", [*FAMILIES, *MOE_FAMILIES, *HYBRID_FAMILIES])
def test_a_saved_checkpoint_is_read_as_transformers_reads_it(family: str, tmp_path: Path):
    spec = read_spec(tiny_checkpoint(tmp_path, family, num_hidden_layers=2, eos_token_id=[2, 5]))
    theirs = AutoConfig.from_pretrained(tmp_path).get_text_config()
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


@pytest.mark.parametrize("architecture", HYBRID)
def test_what_silent_hybrids_are(architecture: str):
    theirs = HYBRID[architecture]()
    sizes = {"hidden_size": 64, "num_hidden_layers": theirs.num_hidden_layers, "num_attention_heads": 16, "vocab_size": 100}
    spec = make_spec({"architectures": [architecture], "intermediate_size": 96, **sizes})
    assert (spec.num_kv_heads, spec.head_dim) == (theirs.num_key_value_heads, theirs.head_dim)
    assert spec.max_position_embeddings == theirs.max_position_embeddings
    assert spec.rotary_dim == theirs.head_dim * theirs.rope_parameters["partial_rotary_factor"] == 64
    assert spec.linear == tuple(kind == "linear_attention" for kind in theirs.layer_types)
    assert spec.delta == Delta(
        num_key_heads=theirs.linear_num_key_heads,
        num_value_heads=theirs.linear_num_value_heads,
        key_dim=theirs.linear_key_head_dim,
        value_dim=theirs.linear_value_head_dim,
        kernel=theirs.linear_conv_kernel_dim,
    )
    assert spec.num_experts == getattr(theirs, "num_experts", 0)
    assert spec.num_experts_per_tok == getattr(theirs, "num_experts_per_tok", 0)
    assert spec.shared_intermediate == getattr(theirs, "shared_expert_intermediate_size", 0)
    assert spec.norm_topk_prob == (spec.num_experts > 0) and all(each == (spec.num_experts > 0) for each in spec.sparse)
    assert spec.gated_attention and spec.zero_centred and spec.qk_norm and not spec.qkv_bias and spec.windows == (0,) * len(spec.linear)
    assert spec.num_mtp_layers == (architecture == "Qwen3NextForCausalLM")  # its published configs do not say


def test_a_published_hybrid():
    """Its config has no width of dense MLPs, and its text is nested."""
    spec = make_spec(QWEN3_5_35B)
    assert (spec.family, spec.hidden, spec.dtype, spec.intermediate) == ("qwen3_5_moe", 2048, "bfloat16", 0)
    assert [layer for layer, linear in enumerate(spec.linear) if not linear] == list(range(3, 40, 4))
    assert (spec.rotary_dim, spec.rope.theta, spec.num_mtp_layers) == (64, 1e7, 1)
    assert spec.delta is not None and spec.delta.channels == 8192
    alone = {**QWEN3_5_35B["text_config"], "architectures": ["Qwen3_5MoeForCausalLM"]}
    assert make_spec(alone) == spec


def test_embeddings_are_tied_where_either_place_says_so():
    text = QWEN3_5_35B["text_config"]
    for tied in (False, True):
        assert make_spec({**QWEN3_5_35B, "tie_word_embeddings": tied}).tie_word_embeddings == tied
        silent = {key: value for key, value in QWEN3_5_35B.items() if key != "tie_word_embeddings"}
        assert make_spec({**silent, "text_config": {**text, "tie_word_embeddings": tied}}).tie_word_embeddings == tied


def test_a_head_that_was_not_saved_is_not_counted_on(tmp_path: Path):
    """transformers keeps the config's word for it, but not its tensors."""
    assert read_spec(tiny_checkpoint(tmp_path / "with", "qwen3_5")).num_mtp_layers == 1
    assert read_spec(without_vision(tmp_path / "with")).num_mtp_layers == 1
    tiny_checkpoint(tmp_path / "without", "qwen3_5", max_shard_size="100KB", mtp_num_hidden_layers=0)
    path = tmp_path / "without" / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["mtp_num_hidden_layers"] = 1
    path.write_text(json.dumps(config))
    assert make_spec(config).num_mtp_layers == 1 and read_spec(tmp_path / "without").num_mtp_layers == 0


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"attn_output_gate": False}, "attn_output_gate False is not supported"),
        ({"norm_topk_prob": False}, "norm_topk_prob False is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"] * 20}, "layer_types"),
        ({"linear_num_value_heads": 24}, "16 key heads do not divide 24 value heads"),
        ({"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim is 1"),
        ({"rope_parameters": {"partial_rotary_factor": 1.5}}, "partial_rotary_factor 1.5 turns 384 of 256 numbers"),
        ({"rope_parameters": {"partial_rotary_factor": 0.02}}, "partial_rotary_factor 0.02 turns 5 of 256 numbers"),
    ],
)
def test_what_of_a_hybrid_cannot_be_computed(more: dict, words: str):
    with pytest.raises(Refusal, match=words):
        make_spec({**QWEN3_5_35B, "text_config": {**QWEN3_5_35B["text_config"], **more}})


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
