"""Llama, the plain dense decoder: biases where the config has them. SmolLM2 and many others are llamas."""

from __future__ import annotations

from trireme.layers.attention import Attention
from trireme.layers.block import Block, Build
from trireme.layers.mlp import GatedMlp
from trireme.models.decoder import DENSE_NAMES

NAMES = DENSE_NAMES


def blocks(build: Build, layer: int) -> list[Block]:
    spec = build.spec
    return [
        Attention(build, layer, qkv_bias=spec.qkv_bias, o_bias=spec.o_bias),
        GatedMlp(build, layer, bias=spec.mlp_bias),
    ]
