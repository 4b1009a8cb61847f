"""linear in PyTorch; its definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trireme_kernels.case import Case
from trireme_kernels.linear.op import Linear


def fits(case: Case) -> str | None:
    return None


def build(case: Case) -> Linear:
    return linear


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:  # [T, K], [N, K], [N] -> [T, N]
    return F.linear(x, weight, bias).to(dtype or x.dtype)
