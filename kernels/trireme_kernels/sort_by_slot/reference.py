"""sort_by_slot in PyTorch; its definition."""

from __future__ import annotations

import torch
from torch import Tensor

from trireme_kernels.case import Case
from trireme_kernels.sort_by_slot.op import Pairs, SortBySlot


def fits(case: Case) -> str | None:
    return None


def build(case: Case) -> SortBySlot:
    return sort_by_slot


def sort_by_slot(slots: Tensor, weights: Tensor, first: int, num_slots: int, num_rows: Tensor | None) -> Pairs:  # [T, k] x 2
    here = (slots >= first) & (slots < first + num_slots)
    if num_rows is not None:
        here &= torch.arange(len(slots), device=slots.device)[:, None] < num_rows
    local = (slots - first).masked_fill(~here, num_slots).flatten()
    counts = slots.new_zeros(num_slots + 2).scatter_add_(0, local + 1, torch.ones_like(local))
    order = local.argsort(stable=True)
    return Pairs(order.to(torch.int32), counts.cumsum(0)[: num_slots + 1].to(torch.int32), weights.masked_fill(~here, 0))
