"""route in PyTorch; its definition."""

from __future__ import annotations

import torch
from torch import Tensor

from trireme_kernels.case import Case
from trireme_kernels.route.op import Route

_ID_BITS = 32


def fits(case: Case) -> str | None:
    return None


def build(case: Case) -> Route:
    return route


def route(logits: Tensor, top_k: int, renormalise: bool) -> tuple[Tensor, Tensor]:  # [T, E] -> [T, top_k] x 2
    last = logits.shape[1] - 1
    weights = logits.softmax(dim=-1, dtype=torch.float32)
    # topk promises no order among equals, and a stable sort takes four times as long (measured on a CPU). Bits of positive
    # floats are ordered as they are, so a weight and its id from the end make one integer, and no two of those are equal.
    keys = weights.view(torch.int32).long() << _ID_BITS | torch.arange(last, -1, -1, device=logits.device)
    ids = last - (keys.topk(top_k, dim=-1).values & (1 << _ID_BITS) - 1)
    chosen = weights.gather(1, ids)
    if renormalise:
        chosen /= chosen.sum(dim=-1, keepdim=True)
    return chosen, ids
