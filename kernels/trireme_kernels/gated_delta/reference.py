"""gated_delta in PyTorch, row by row; its definition."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from trireme_kernels.case import Case
from trireme_kernels.gated_delta.op import GatedDelta
from trireme_kernels.gated_delta.rectangle import Rectangle


def fits(case: Case) -> str | None:
    return None


def build(case: Case) -> GatedDelta:
    return Reference(case)


class Reference:
    def __init__(self, case: Case):
        self.device = case.device

    def plan(self, counts: np.ndarray) -> Rectangle:
        return Rectangle(counts, self.device)

    def run(
        self,
        q: Tensor,  # [N, Hk, Dk]
        k: Tensor,  # [N, Hk, Dk]
        v: Tensor,  # [N, Hv, Dv]
        g: Tensor,  # [N, Hv]
        beta: Tensor,  # [N, Hv]
        initial: Tensor,  # [I, Hv, Dk, Dv]
        plan: Rectangle,
    ) -> tuple[Tensor, Tensor]:  # [N, Hv, Dv], [I, Hv, Dk, Dv]
        final = initial.clone()
        return plan.flat(recur(*(plan.fill(x) for x in (q, k, v, g, beta)), state=final)), final


def recur(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> Tensor:
    """q, k [I, T, Hk, Dk], v [I, T, Hv, Dv], g, beta [I, T, Hv], state [I, Hv, Dk, Dv], updated in place -> [I, T, Hv, Dv].
    A row of g = beta = 0 leaves its state alone."""
    num_value_heads, dtype = v.shape[2], q.dtype
    q, k = unit(q, num_value_heads) * q.shape[-1] ** -0.5, unit(k, num_value_heads)
    decay, v = g.exp(), v.float()
    out = torch.empty(v.shape, dtype=dtype, device=v.device)
    for row in range(v.shape[1]):
        state.mul_(decay[:, row, :, None, None])
        known = torch.matmul(k[:, row, :, None], state).squeeze(2)  # [I, Hv, Dv]: what the state has for this key
        learnt = (v[:, row] - known) * beta[:, row, :, None]
        state.addcmul_(k[:, row, :, :, None], learnt[:, :, None])
        out[:, row] = torch.matmul(q[:, row, :, None], state).squeeze(2)
    return out


def unit(x: Tensor, num_heads: int) -> Tensor:  # [.., Hk, Dk] -> float32 [.., num_heads, Dk]
    """Heads of length one, each repeated for the value heads that share it."""
    wide = x.float()
    wide = wide * (wide.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
    shared = num_heads // x.shape[-2]
    return wide if shared == 1 else wide.unsqueeze(-2).expand(*x.shape[:-1], shared, -1).flatten(-3, -2)
