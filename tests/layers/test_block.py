"""What blocks keep: bytes and memory order of pools."""

from __future__ import annotations

import torch

from trireme.core.step import PAGE
from trireme.layers.block import PerToken


def test_pools_are_as_large_as_they_say():
    keeps = PerToken(num_kv_heads=3, head_dim=10, dtype=torch.bfloat16)
    pools = keeps.allocate(7, torch.device("cpu"))
    assert all(pool.shape == (7, 3, PAGE, 10) and pool.dtype == torch.bfloat16 and not pool.any() for pool in pools)
    assert sum(pool.nbytes for pool in pools) == 7 * keeps.bytes_per_page


def test_a_heads_pages_lie_together_on_a_cpu():
    keys, _ = PerToken(num_kv_heads=3, head_dim=10, dtype=torch.float32).allocate(7, torch.device("cpu"))
    assert keys[:, 1].is_contiguous()
