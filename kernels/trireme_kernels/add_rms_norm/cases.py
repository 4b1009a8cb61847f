"""Cases and inputs of add_rms_norm, for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from trireme_kernels.add_rms_norm.op import AddRmsNorm
from trireme_kernels.case import Case

CASES = (
    Case("cpu", torch.float32, {"hidden": 576, "rows": 5}),
    Case("cpu", torch.bfloat16, {"hidden": 576, "rows": 5}),
    Case("cpu", torch.float32, {"hidden": 64, "rows": 1}),
    Case("cpu", torch.bfloat16, {"hidden": 40, "rows": 3}),
)


def inputs(case: Case, seed: int) -> tuple[Tensor, Tensor, Tensor, float]:
    rows, hidden, draw = case.sizes["rows"], case.sizes["hidden"], torch.Generator().manual_seed(seed)
    x, residual, weight = (
        torch.randn(*shape, generator=draw).to(case.device, case.dtype) for shape in ((rows, hidden), (rows, hidden), (hidden,))
    )
    return x, residual, weight, 1e-5


def results(op: AddRmsNorm, inputs: tuple) -> tuple[Tensor, ...]:
    """All that the op computes."""
    return op(*inputs)
