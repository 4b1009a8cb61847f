"""gated_rms_norm in PyTorch; its definition."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from trireme_kernels.case import Case
from trireme_kernels.gated_rms_norm.op import GatedRmsNorm
from trireme_kernels.rms_norm.reference import rms_norm


def fits(case: Case) -> str | None:
    return None


def build(case: Case) -> GatedRmsNorm:
    return gated_rms_norm


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:  # [.., D] twice, [D] -> [.., D]
    return (rms_norm(x, weight, eps).float() * F.silu(gate.float())).to(x.dtype)
