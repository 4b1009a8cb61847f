"""Cases and inputs of rms_norm, for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from trireme_kernels.case import Case
from trireme_kernels.rms_norm.op import RmsNorm

CASES = (
    Case("cpu", torch.float32, {"hidden": 576, "rows": 5}),
    Case("cpu", torch.bfloat16, {"hidden": 576, "rows": 5}),
    Case("cpu", torch.float32, {"hidden": 64, "rows": 1}),
    Case("cpu", torch.bfloat16, {"hidden": 40, "rows": 3}),
)


def inputs(case: Case, seed: int) -> tuple[Tensor, Tensor, float]:
    rows, hidden, draw = case.sizes["rows"], case.sizes["hidden"], torch.Generator().manual_seed(seed)
    x, weight = torch.randn(rows, hidden, generator=draw), torch.randn(hidden, generator=draw)
    return x.to(case.device, case.dtype), weight.to(case.device, case.dtype), 1e-5


def results(op: RmsNorm, inputs: tuple) -> tuple[Tensor, ...]:
    """All that the op computes."""
    return (op(*inputs),)
