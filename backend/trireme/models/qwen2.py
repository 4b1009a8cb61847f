"""Qwen2 and Qwen2.5: query, key and value biases, and a sliding window in some layers where the config uses one."""

from __future__ import annotations

from trireme.layers.attention import Attention
from trireme.layers.block import Block, Build
from trireme.layers.mlp import GatedMlp
from trireme.models.decoder import DENSE_NAMES

NAMES = DENSE_NAMES


def blocks(build: Build, layer: int) -> list[Block]:
    return [
        Attention(build, layer, qkv_bias=True, window=build.spec.windows[layer]),
        GatedMlp(build, layer),
    ]
