"""peer_sum in PyTorch; its definition. It waits by looking again."""

from __future__ import annotations

import torch
from torch import Tensor

from trireme_kernels.case import Case
from trireme_kernels.peer_sum.op import Boxes, PeerSum, bits_of, empty_of
from trireme_kernels.rms_norm.reference import rms_norm


def fits(case: Case) -> str | None:
    return None


def build(case: Case) -> PeerSum:
    return Reference()


class Reference:
    def sum(self, x: Tensor, boxes: Boxes) -> Tensor:
        chunks = x.flatten().split(boxes.every[0].shape[-1])
        return torch.cat([_sum(chunk, cell, boxes) for cell, chunk in enumerate(chunks)]).to(x.dtype).view(x.shape)

    def sum_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, boxes: Boxes) -> tuple[Tensor, Tensor]:
        summed = torch.stack([_sum(row, cell, boxes) for cell, row in enumerate(x)])
        total = (summed + residual).to(x.dtype)
        return rms_norm(total, weight, eps), total


def _sum(x: Tensor, cell: int, boxes: Boxes) -> Tensor:
    """One cell's: [n] -> float32 [n]."""
    bits, turn, num = bits_of(x.dtype), int(boxes.turns[cell]) % 2, len(x)
    empty = empty_of(bits)
    mine = x.contiguous().view(bits)
    mine = mine.masked_fill(mine == empty, 0)
    for place, box in enumerate(boxes.every):
        if place != boxes.place:
            box[turn, boxes.place, cell, :num] = mine
    total = torch.zeros(num, device=x.device)
    for place, came in enumerate(boxes.every[boxes.place][turn, :, cell, :num]):
        if place == boxes.place:
            part = mine
        else:
            while (came == empty).any() and not boxes.given_up.item():
                pass
            part = came.clone()
            came.fill_(empty)
        total += part.view(x.dtype).float()
    boxes.turns[cell] += 1
    return total
