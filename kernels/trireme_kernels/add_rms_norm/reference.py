"""add_rms_norm in PyTorch; its definition."""

from __future__ import annotations

from torch import Tensor

from trireme_kernels.add_rms_norm.op import AddRmsNorm
from trireme_kernels.case import Case
from trireme_kernels.rms_norm.reference import rms_norm


def fits(case: Case) -> str | None:
    return None


def build(case: Case) -> AddRmsNorm:
    return add_rms_norm


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:  # [T, H] x 2, [H] -> [T, H] x 2
    total = x + residual
    return rms_norm(total, weight, eps), total
