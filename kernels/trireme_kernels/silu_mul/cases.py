"""Cases and inputs of silu_mul, for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from trireme_kernels.case import Case
from trireme_kernels.silu_mul.op import SiluMul

CASES = (
    Case("cpu", torch.float32, {"intermediate": 1536, "rows": 3}),
    Case("cpu", torch.bfloat16, {"intermediate": 1536, "rows": 3}),
    Case("cpu", torch.float32, {"intermediate": 100, "rows": 7}),
)


def inputs(case: Case, seed: int) -> tuple[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(case.sizes["rows"], 2 * case.sizes["intermediate"], generator=draw).to(case.device, case.dtype),)


def results(op: SiluMul, inputs: tuple) -> tuple[Tensor, ...]:
    """All that the op computes."""
    return (op(*inputs),)
