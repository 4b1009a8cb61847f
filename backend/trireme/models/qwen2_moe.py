"""Qwen2-MoE (Qwen1.5-MoE, Qwen2-57B-A14B): Qwen2's attention; in sparse layers experts, and one that every row passes."""

from __future__ import annotations

from trireme.layers.attention import Attention
from trireme.layers.block import Block, Build
from trireme.layers.mlp import GatedMlp
from trireme.layers.moe import Moe
from trireme.models.decoder import DENSE_NAMES, EXPERT_NAMES, SHARED_EXPERT_NAMES

NAMES = DENSE_NAMES + EXPERT_NAMES + SHARED_EXPERT_NAMES


def blocks(build: Build, layer: int) -> list[Block]:
    spec = build.spec
    return [
        Attention(build, layer, qkv_bias=spec.qkv_bias, window=spec.windows[layer]),
        Moe(build, layer) if spec.sparse[layer] else GatedMlp(build, layer),
    ]
