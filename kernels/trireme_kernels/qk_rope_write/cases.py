"""Cases and inputs of qk_rope_write, for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trireme_kernels.case import Case
from trireme_kernels.qk_rope_write.op import QkRopeWrite

_DEMO = {"num_heads": 9, "num_kv_heads": 3, "head_dim": 64}
CASES = (
    Case("cpu", torch.float32, {**_DEMO, "rows": 5, "norm": 0}),
    Case("cpu", torch.bfloat16, {**_DEMO, "rows": 5, "norm": 1}),
    Case("cpu", torch.float32, {"num_heads": 4, "num_kv_heads": 4, "head_dim": 80, "rows": 1, "norm": 1}),
)


def inputs(case: Case, seed: int) -> tuple[Any, ...]:
    """q, k and v are views of one tensor, as a qkv projection gives them; pools are kv head outermost, as on a CPU."""
    size, draw = case.sizes, torch.Generator().manual_seed(seed)
    rows, heads, kv_heads, dim = size["rows"], size["num_heads"], size["num_kv_heads"], size["head_dim"]
    qkv = torch.randn(rows, heads + 2 * kv_heads, dim, generator=draw).to(case.device, case.dtype)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
    angles = torch.rand(256, dim // 2, generator=draw) * 6.3
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1).to(case.device)
    positions = torch.randint(0, 256, (rows,), generator=draw).to(case.device)
    norms = [torch.randn(dim, generator=draw).to(case.device, case.dtype) if size["norm"] else None for _ in "qk"]
    num_pages = rows // 16 + 2
    pools = [torch.zeros(kv_heads, num_pages, 16, dim, dtype=case.dtype, device=case.device).transpose(0, 1) for _ in "kv"]
    pages = torch.randperm(num_pages * 16, generator=draw)[:rows].to(case.device)
    return (q, k, v, cos_sin, positions, *norms, 1e-6, *pools, pages)


def results(op: QkRopeWrite, inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """All that the op computes: q, and the pools that it wrote."""
    fresh = list(inputs)
    fresh[8:10] = pools = [pool.transpose(0, 1).clone().transpose(0, 1) for pool in inputs[8:10]]
    return (op(*fresh), *pools)
