"""Registry: a family's name to its file. `read_spec` has refused the families that are not here."""

from __future__ import annotations

from trireme.layers.block import Build
from trireme.models import llama, qwen2, qwen2_moe, qwen3, qwen3_5, qwen3_moe, qwen3_next
from trireme.models.decoder import Decoder

FAMILIES = {
    "llama": llama,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen2_moe": qwen2_moe,
    "qwen3_moe": qwen3_moe,
    "qwen3_5": qwen3_5,
    "qwen3_5_moe": qwen3_5,
    "qwen3_next": qwen3_next,
}


def build_stage(build: Build) -> Decoder:
    """One stage of the checkpoint's model, its parameters still empty."""
    family = FAMILIES[build.spec.family]
    return Decoder(build, family.NAMES, family.blocks)
