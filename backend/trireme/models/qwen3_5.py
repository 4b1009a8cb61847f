"""Qwen3.5, dense and with experts: gated delta layers, and now and then attention with a gate. Of checkpoints that see, the text."""

from __future__ import annotations

from trireme.layers.attention import Attention
from trireme.layers.block import Block, Build
from trireme.layers.delta import GatedDeltaNet
from trireme.layers.mlp import GatedMlp
from trireme.layers.moe import Moe
from trireme.layers.names import table
from trireme.models.decoder import EXPERT_NAMES, HYBRID_NAMES, SHARED_EXPERT_NAMES

_TEXT = (
    HYBRID_NAMES
    + EXPERT_NAMES
    + SHARED_EXPERT_NAMES
    + table("""
  model.layers.{i}.linear_attn.in_proj_qkv     -> layers.{i}.delta.proj   join q k v z b a   holds q k v
  model.layers.{i}.linear_attn.in_proj_{z,b,a} -> layers.{i}.delta.proj   join q k v z b a
""")
)
NAMES = _TEXT.nested("model.", "model.language_model.") + table("""
  model.visual.*  -> nothing
  visual.*        -> nothing
""")


def blocks(build: Build, layer: int) -> list[Block]:
    spec = build.spec
    return [
        GatedDeltaNet(build, layer)
        if spec.linear[layer]
        else Attention(build, layer, qkv_bias=spec.qkv_bias, o_bias=spec.o_bias, qk_norm=True, gated=True),
        Moe(build, layer) if spec.sparse[layer] else GatedMlp(build, layer),
    ]
