"""add_rms_norm in PyTorch; its definition."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from trireme_kernels.add_rms_norm.op import AddRmsNorm
from trireme_kernels.case import Case


def fits(case: Case) -> str | None:
    return None


def build(case: Case) -> AddRmsNorm:
    return add_rms_norm


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:  # [T, H] x 2, [H] -> [T, H] x 2
    total = x + residual
    return F.rms_norm(total, weight.shape, weight, eps), total
