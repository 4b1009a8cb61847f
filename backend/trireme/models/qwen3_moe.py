"""Qwen3-MoE: Qwen3's attention, with experts in sparse layers."""

from __future__ import annotations

from trireme.layers.attention import Attention
from trireme.layers.block import Block, Build
from trireme.layers.mlp import GatedMlp
from trireme.layers.moe import Moe
from trireme.models.decoder import DENSE_NAMES, EXPERT_NAMES, QK_NORM_NAMES

NAMES = DENSE_NAMES + QK_NORM_NAMES + EXPERT_NAMES


def blocks(build: Build, layer: int) -> list[Block]:
    spec = build.spec
    return [
        Attention(build, layer, qkv_bias=spec.qkv_bias, o_bias=spec.o_bias, qk_norm=True, window=spec.windows[layer]),
        Moe(build, layer) if spec.sparse[layer] else GatedMlp(build, layer),
    ]
