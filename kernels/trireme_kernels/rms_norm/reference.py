"""rms_norm in PyTorch; its definition."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from trireme_kernels.case import Case
from trireme_kernels.rms_norm.op import RmsNorm


def fits(case: Case) -> str | None:
    return None


def build(case: Case) -> RmsNorm:
    return rms_norm


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # [T, H], [H] -> [T, H]
    return (F.rms_norm(x.float(), weight.shape, eps=eps).to(weight.dtype) * weight).to(x.dtype)
