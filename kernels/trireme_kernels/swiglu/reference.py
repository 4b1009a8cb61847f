"""swiglu in PyTorch; its definition."""

from __future__ import annotations

from torch import Tensor

from trireme_kernels.case import Case
from trireme_kernels.linear.reference import linear
from trireme_kernels.silu_mul.reference import silu_mul
from trireme_kernels.swiglu.op import SwiGlu


def fits(case: Case) -> str | None:
    return None


def build(case: Case) -> SwiGlu:
    return swiglu


def swiglu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # [T, K], [2 I, K], [2 I] -> [T, I]
    return silu_mul(linear(x, weight, bias))
