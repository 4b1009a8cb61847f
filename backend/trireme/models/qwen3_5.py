"""Qwen3.5, dense and with experts: gated delta layers, and now and then attention with a gate. Of checkpoints that see, the text."""

from __future__ import annotations

from trireme.layers.names import table
from trireme.models.decoder import HYBRID_NAMES, hybrid_blocks

_TEXT = HYBRID_NAMES + table("""
  model.layers.{i}.linear_attn.in_proj_qkv     -> layers.{i}.delta.proj   join q k v z b a   holds q k v
  model.layers.{i}.linear_attn.in_proj_{z,b,a} -> layers.{i}.delta.proj   join q k v z b a
""")
NAMES = _TEXT.nested("model.", "model.language_model.") + table("""
  model.visual.*  -> nothing
  visual.*        -> nothing
""")
blocks = hybrid_blocks
