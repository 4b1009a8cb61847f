"""Qwen3, dense: each head's query and key are normed before they turn."""

from __future__ import annotations

from trireme.layers.attention import Attention
from trireme.layers.block import Block, Build
from trireme.layers.mlp import GatedMlp
from trireme.models.decoder import DENSE_NAMES, QK_NORM_NAMES

NAMES = DENSE_NAMES + QK_NORM_NAMES


def blocks(build: Build, layer: int) -> list[Block]:
    spec = build.spec
    return [
        Attention(build, layer, qkv_bias=spec.qkv_bias, o_bias=spec.o_bias, qk_norm=True, window=spec.windows[layer]),
        GatedMlp(build, layer),
    ]
