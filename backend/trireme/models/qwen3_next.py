"""Qwen3-Next: Qwen3.5's layers. In its checkpoints the delta layers' projections lie key head by key head."""

from __future__ import annotations

from trireme.layers.attention import Attention
from trireme.layers.block import Block, Build
from trireme.layers.delta import GatedDeltaNet
from trireme.layers.mlp import GatedMlp
from trireme.layers.moe import Moe
from trireme.layers.names import table
from trireme.models.decoder import EXPERT_NAMES, HYBRID_NAMES, SHARED_EXPERT_NAMES

NAMES = (
    HYBRID_NAMES
    + EXPERT_NAMES
    + SHARED_EXPERT_NAMES
    + table("""
  model.layers.{i}.linear_attn.in_proj_qkvz -> layers.{i}.delta.proj   join q k v z b a   holds q k v z   interleaved
  model.layers.{i}.linear_attn.in_proj_ba   -> layers.{i}.delta.proj   join q k v z b a   holds b a       interleaved
""")
)


def blocks(build: Build, layer: int) -> list[Block]:
    spec = build.spec
    return [
        GatedDeltaNet(build, layer)
        if spec.linear[layer]
        else Attention(build, layer, qkv_bias=spec.qkv_bias, o_bias=spec.o_bias, qk_norm=True, gated=True),
        Moe(build, layer) if spec.sparse[layer] else GatedMlp(build, layer),
    ]
