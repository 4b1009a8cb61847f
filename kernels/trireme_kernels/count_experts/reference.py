"""count_experts in PyTorch; its definition."""

from __future__ import annotations

import torch
from torch import Tensor

from trireme_kernels.case import Case
from trireme_kernels.count_experts.op import CountExperts


def fits(case: Case) -> str | None:
    return None


def build(case: Case) -> CountExperts:
    return count_experts


def count_experts(experts: Tensor, num_rows: Tensor | None, counts: Tensor) -> None:  # [T, top_k], [1], [E]
    real = torch.ones(experts.shape, dtype=counts.dtype, device=experts.device)
    if num_rows is not None:
        real *= torch.arange(len(experts), device=experts.device)[:, None] < num_rows
    counts.scatter_add_(0, experts.flatten(), real.flatten())
