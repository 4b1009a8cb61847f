"""peer_sum in PyTorch; its definition. It waits by looking again."""

from __future__ import annotations

import torch
from torch import Tensor

from trireme_kernels.case import Case
from trireme_kernels.peer_sum.op import Boxes, PeerSum, bits_of, empty_key_of, empty_of, keys_of
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

    def best(self, values: Tensor, ids: Tensor, boxes: Boxes) -> tuple[Tensor, Tensor]:
        empty, size = empty_key_of(boxes.every[0].dtype), boxes.every[0][0, 0, 0].nbytes // 8
        chunks = keys_of(values, ids).split(size)
        keys = torch.cat([torch.stack(_parts(chunk, empty, cell, boxes)).amax(0) for cell, chunk in enumerate(chunks)])
        ordered = (keys >> 32).int()
        return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32), 0x7FFFFFFF - (keys & 0x7FFFFFFF)


def _sum(x: Tensor, cell: int, boxes: Boxes) -> Tensor:
    """One cell's: [n] -> float32 [n]."""
    bits = bits_of(x.dtype)
    empty, mine = empty_of(bits), x.contiguous().view(bits)
    total = torch.zeros(len(x), device=x.device)
    for part in _parts(mine.masked_fill(mine == empty, 0), empty, cell, boxes):
        total += part.view(x.dtype).float()
    return total


def _parts(mine: Tensor, empty: int, cell: int, boxes: Boxes) -> list[Tensor]:
    """What each rank brought to a cell, [n], by place."""
    turn, num = int(boxes.turns[cell]) % 2, len(mine)
    every = [box.view(mine.dtype)[turn, :, cell, :num] for box in boxes.every]
    for place, box in enumerate(every):
        if place != boxes.place:
            box[boxes.place] = mine
    found = []
    for place, came in enumerate(every[boxes.place]):
        if place == boxes.place:
            found.append(mine)
            continue
        while (came == empty).any() and not boxes.given_up.item():
            pass
        found.append(came.clone())
        came.fill_(empty)
    boxes.turns[cell] += 1
    return found
