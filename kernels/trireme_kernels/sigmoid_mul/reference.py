"""sigmoid_mul in PyTorch; its definition."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from trireme_kernels.case import Case
from trireme_kernels.sigmoid_mul.op import SigmoidMul


def fits(case: Case) -> str | None:
    return None


def build(case: Case) -> SigmoidMul:
    return sigmoid_mul


def sigmoid_mul(x: Tensor, gate: Tensor) -> Tensor:  # [T, H, D] twice -> [T, H, D]
    return x * F.sigmoid(gate)
