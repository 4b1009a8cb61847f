"""Cases and inputs of silu_mul, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trireme_kernels.case import Case, Work
from trireme_kernels.silu_mul.op import SiluMul

CASES = (
    Case("cpu", torch.float32, {"intermediate": 1536, "rows": 3}),
    Case("cpu", torch.bfloat16, {"intermediate": 1536, "rows": 3}),
    Case("cpu", torch.float32, {"intermediate": 100, "rows": 7}),
    Case("cpu", torch.bfloat16, {"intermediate": 100, "rows": 0}),
)
# Qwen3-8B, and the experts of Qwen3-30B-A3B: 8 rows a token
BENCH = tuple(
    Case("cpu", torch.bfloat16, {"intermediate": width, "rows": rows})
    for width, rows in ((12288, 1), (12288, 32), (12288, 256), (12288, 8192), (768, 2048), (768, 65536))
)


def inputs(case: Case, seed: int) -> tuple[Tensor]:
    draw = torch.Generator(case.device).manual_seed(seed)
    return (torch.randn(case.sizes["rows"], 2 * case.sizes["intermediate"], generator=draw, device=case.device).to(case.dtype),)


def results(op: SiluMul, inputs: tuple) -> tuple[Tensor, ...]:
    """All that the op computes."""
    return (op(*inputs),)


def timed(op: SiluMul, inputs: tuple) -> Callable[[], Any]:
    """What a benchmark repeats."""
    return lambda: op(*inputs)


def work(inputs: tuple) -> Work:
    return Work(inputs[0].nbytes * 3 // 2)
