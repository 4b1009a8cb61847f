"""The name-table language."""

from __future__ import annotations

import pytest

from trireme.layers.names import NOTHING, Match, table
from trireme.models import qwen3
from trireme.models.decoder import DENSE_NAMES

NAMES = table("""
  model.embed_tokens                      -> embed
  layers.{i}.{q,k,v}_proj                 -> layers.{i}.attn.qkv   join q k v
  layers.{i}.norm.weight                  -> layers.{i}.attn.norm
  layers.{i}.experts.{e}.{gate,up}.weight -> layers.{i}.mlp.gate_up  join gate up  stack e
  layers.{i}.experts.gate_up              -> layers.{i}.mlp.gate_up  holds gate up
  layers.{i}.qk_proj                      -> layers.{i}.attn.qkv   join q k v      holds q k   interleaved
  lm_head                                 -> head.proj             tie model.embed_tokens
  *.inv_freq                              -> nothing
""")


def test_a_module_carries_its_weight_and_bias():
    assert NAMES.find("layers.12.k_proj.bias") == [Match("layers.12.attn.qkv.bias", (1,), layer=12)]
    assert NAMES.find("layers.3.q_proj.weight") == [Match("layers.3.attn.qkv.weight", (0,), layer=3)]


def test_a_tensor_may_be_named_itself():
    assert NAMES.find("layers.0.norm.weight") == [Match("layers.0.attn.norm", layer=0)]
    assert NAMES.find("layers.0.norm.bias") == []


def test_a_tensor_may_hold_some_parts_and_interleave_their_units():
    assert NAMES.find("layers.1.qk_proj.weight") == [Match("layers.1.attn.qkv.weight", (0, 1), layer=1, interleaved=True)]


def test_a_model_inside_a_larger_one():
    nested = NAMES.nested("model.", "model.language_model.")
    for name in ("model.embed_tokens.weight", "model.language_model.embed_tokens.weight"):
        assert nested.find(name) == [Match("embed.weight")]
        assert nested.tied().find(name) == [Match("embed.weight"), Match("head.proj.weight")]
    assert nested.find("lm_head.weight") == [Match("head.proj.weight")]
    [head] = nested.tied().find("lm_head.weight")
    assert head.twins == ("model.embed_tokens.weight", "model.language_model.embed_tokens.weight")


def test_experts_are_stacked_or_whole():
    assert NAMES.find("layers.2.experts.17.up.weight") == [Match("layers.2.mlp.gate_up", (1,), expert=17, layer=2)]
    assert NAMES.find("layers.2.experts.gate_up") == [Match("layers.2.mlp.gate_up", (0, 1), layer=2)]
    assert NAMES.find("layers.2.experts.x.up.weight") == []


@pytest.mark.parametrize("name", ["layers.x.q_proj.weight", "layers.0.o_proj.weight", "xlm_head.weight", "lm_head.weight.scale"])
def test_other_names_are_not_known(name: str):
    assert NAMES.find(name) == []


def test_nothing_and_any_prefix():
    assert NAMES.find("model.layers.7.rotary.inv_freq") == [Match(NOTHING)]


def test_a_tied_checkpoint_feeds_both_ends():
    assert NAMES.find("lm_head.weight") == [Match("head.proj.weight")]
    assert NAMES.find("model.embed_tokens.weight") == [Match("embed.weight")]
    tied = NAMES.tied()
    assert tied.find("lm_head.weight") == [Match(NOTHING, twins=("model.embed_tokens.weight",))]
    assert tied.find("model.embed_tokens.weight") == [Match("embed.weight"), Match("head.proj.weight")]


def test_a_table_is_a_sum_of_lines():
    assert qwen3.NAMES.rules[: len(DENSE_NAMES.rules)] == DENSE_NAMES.rules
    assert qwen3.NAMES.find("model.layers.1.self_attn.q_norm.weight") == [Match("layers.1.attn.q_norm", layer=1)]


@pytest.mark.parametrize("line", ["a = b", "a -> b glue c", "a.{e} -> b", "a -> b stack e"])
def test_a_line_that_is_none_is_our_fault(line: str):
    with pytest.raises(AssertionError):
        table(line)
