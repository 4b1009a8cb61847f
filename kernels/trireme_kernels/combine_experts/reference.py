"""combine_experts in PyTorch; its definition."""

from __future__ import annotations

from torch import Tensor

from trireme_kernels.case import Case
from trireme_kernels.combine_experts.op import CombineExperts, Shared


def fits(case: Case) -> str | None:
    return None


def build(case: Case) -> CombineExperts:
    return combine_experts


def combine_experts(results: Tensor, weights: Tensor, shared: Shared | None) -> Tensor:  # [T * k, H], [T, k] -> [T, H]
    parts = weights[:, :, None]
    total = (results.unflatten(0, weights.shape).float() * parts).masked_fill_(parts == 0, 0).sum(1)
    if shared is not None:
        total += (shared.x.float() * shared.gate.float()).sum(1, keepdim=True).sigmoid() * shared.results.float()
    return total.to(results.dtype)
