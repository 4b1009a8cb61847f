"""Qwen3-Next: Qwen3.5's layers. In its checkpoints the delta layers' projections lie key head by key head."""

from __future__ import annotations

from trireme.layers.names import table
from trireme.models.decoder import HYBRID_NAMES, hybrid_blocks

NAMES = HYBRID_NAMES + table("""
  model.layers.{i}.linear_attn.in_proj_qkvz -> layers.{i}.delta.proj   join q k v z b a   holds q k v z   interleaved
  model.layers.{i}.linear_attn.in_proj_ba   -> layers.{i}.delta.proj   join q k v z b a   holds b a       interleaved
""")
blocks = hybrid_blocks
