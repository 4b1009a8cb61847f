"""pick_slots in PyTorch; its definition."""

from __future__ import annotations

import torch
from torch import Tensor

from trireme_kernels.case import Case
from trireme_kernels.pick_slots.op import PickSlots


def fits(case: Case) -> str | None:
    return None


def build(case: Case) -> PickSlots:
    return pick_slots


def pick_slots(experts: Tensor, copies: Tensor, num_rows: Tensor | None, loads: Tensor | None) -> Tensor:  # [T, k] -> [T, k]
    rows = torch.arange(len(experts), device=experts.device)[:, None]
    if loads is not None:
        real = torch.ones_like(experts) if num_rows is None else (rows < num_rows).expand_as(experts)
        loads.scatter_add_(0, experts.flatten(), real.to(loads.dtype).flatten())
    return copies[experts, rows % copies[:, -1][experts]]
