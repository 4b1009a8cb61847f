"""Cases and inputs of qk_rope_write, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trireme_kernels.case import Case, Work
from trireme_kernels.qk_rope_write.op import QkRopeWrite

_DEMO = {"num_heads": 9, "num_kv_heads": 3, "head_dim": 64}
CASES = (
    Case("cpu", torch.float32, {**_DEMO, "rows": 5, "norm": 0}),
    Case("cpu", torch.bfloat16, {**_DEMO, "rows": 5, "norm": 1}),
    Case("cpu", torch.float32, {"num_heads": 4, "num_kv_heads": 4, "head_dim": 80, "rows": 1, "norm": 1}),
    Case("cpu", torch.bfloat16, {"num_heads": 4, "num_kv_heads": 2, "head_dim": 96, "rows": 5, "norm": 1, "rotary": 24, "wide_norm": 1}),
    Case("cpu", torch.float32, {**_DEMO, "rows": 3, "norm": 0, "rotary": 16}),
    Case("cpu", torch.bfloat16, {**_DEMO, "rows": 5, "norm": 1, "only_q": 1}),
    Case("cpu", torch.bfloat16, {**_DEMO, "rows": 0, "norm": 1, "only_q": 1}),
    Case("cpu", torch.bfloat16, {**_DEMO, "rows": 5, "norm": 1, "only_kv": 1}),
)
# Qwen3-8B; Qwen3.5-35B-A3B, that turns a quarter of a head, with zero-centred norms
_QWEN3 = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "norm": 1}
_QWEN35 = {"num_heads": 16, "num_kv_heads": 2, "head_dim": 256, "norm": 1, "rotary": 64, "wide_norm": 1}
BENCH = tuple(Case("cpu", torch.bfloat16, {**heads, "rows": rows}) for heads in (_QWEN3, _QWEN35) for rows in (1, 32, 256, 8192))


def inputs(case: Case, seed: int) -> tuple[Any, ...]:
    """q, k and v are views of one tensor, as a qkv projection gives them; pools are kv head outermost, as on a CPU."""
    size, draw = case.sizes, torch.Generator(case.device).manual_seed(seed)
    rows, heads, kv_heads, dim = size["rows"], size["num_heads"], size["num_kv_heads"], size["head_dim"]
    qkv = torch.randn(rows, heads + 2 * kv_heads, dim, generator=draw, device=case.device).to(case.dtype)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
    q, k, v = q[:, : 0 if size.get("only_kv") else None], *(x[:, : 0 if size.get("only_q") else None] for x in (k, v))
    angles = torch.rand(256, size.get("rotary", dim) // 2, generator=draw, device=case.device) * 6.3
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1)
    positions = torch.randint(0, 256, (rows,), generator=draw, device=case.device)
    kind = torch.float32 if size.get("wide_norm") else case.dtype
    norms = [torch.randn(dim, generator=draw, device=case.device).to(kind) if size["norm"] else None for _ in "qk"]
    num_pages = rows // 16 + 2
    pools = [torch.zeros(kv_heads, num_pages, 16, dim, dtype=case.dtype, device=case.device).transpose(0, 1) for _ in "kv"]
    pages = torch.randperm(num_pages * 16, generator=draw, device=case.device)[:rows]
    return (q, k, v, cos_sin, positions, *norms, 1e-6, *pools, pages)


def results(op: QkRopeWrite, inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """All that the op computes: q, and the pools that it wrote."""
    fresh = list(inputs)
    fresh[8:10] = pools = [pool.transpose(0, 1).clone().transpose(0, 1) for pool in inputs[8:10]]
    return (op(*fresh), *pools)


def timed(op: QkRopeWrite, inputs: tuple) -> Callable[[], Any]:
    """What a benchmark repeats."""
    return lambda: op(*inputs)


def work(inputs: tuple) -> Work:
    q, k, v, cos_sin, positions = inputs[:5]
    angles = min(len(positions), len(cos_sin)) * cos_sin.shape[1] * cos_sin.itemsize
    return Work(2 * (q.nbytes + k.nbytes + v.nbytes) + angles + 2 * positions.nbytes)
