"""silu_mul in PyTorch; its definition."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from trireme_kernels.case import Case
from trireme_kernels.silu_mul.op import SiluMul


def fits(case: Case) -> str | None:
    return None


def build(case: Case) -> SiluMul:
    return silu_mul


def silu_mul(gate_up: Tensor) -> Tensor:  # [T, 2 I] -> [T, I]
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
