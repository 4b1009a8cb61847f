"""grouped_linear in PyTorch; its definition."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trireme_kernels.case import Case
from trireme_kernels.grouped_linear.op import GroupedLinear


def fits(case: Case) -> str | None:
    return None


def build(case: Case) -> GroupedLinear:
    return Reference()


class _Group(NamedTuple):
    slot: int
    begin: int
    end: int


class Reference:
    """One product for each slot that has rows, written in place.

    Reading the weights is most of the time, so nothing that copies them pays. One core, bfloat16, S=128, K=2048, N=1536,
    64 rows in 49 slots: 27 ms; torch.bmm over gathered weights 314 ms, grouped_mm 28 ms, torch.mv where a slot has one
    row 50 ms. In float32 (S=64, K=256, N=384, 8 rows in 8 slots) 0.14 ms; bmm 1.4 ms, grouped_mm 0.19 ms, mv 0.13 ms.
    """

    def plan(self, counts: Tensor, num_rows: int) -> list[_Group]:
        groups, end = [], 0
        for slot, count in enumerate(counts.tolist()):
            begin, end = end, end + count
            if count:
                groups.append(_Group(slot, begin, end))
        assert end <= num_rows, "counts are of these rows"
        return groups

    def run(self, x: Tensor, weight: Tensor, plan: list[_Group]) -> Tensor:  # [M, K], [S, N, K] -> [M, N]
        out = x.new_empty(x.shape[0], weight.shape[1])
        for slot, begin, end in plan:
            torch.mm(x[begin:end], weight[slot].t(), out=out[begin:end])
        out[plan[-1].end if plan else 0 :] = 0
        return out
