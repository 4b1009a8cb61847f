"""sort_by_slot in the Triton language: one program a slot, which reads all pairs and finds its own, so that a decode step's are
sorted in one short launch, in an order that no race decides. A last program has no slot: it weighs."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from trireme_kernels.blocks import next_power_of_2
from trireme_kernels.case import Case
from trireme_kernels.jit import jit
from trireme_kernels.pdl import after_earlier, early
from trireme_kernels.sort_by_slot.op import Pairs, SortBySlot

_MOST = 4096  # pairs at a time


def fits(case: Case) -> str | None:
    return None


def build(case: Case) -> SortBySlot:
    return sort_by_slot


def sort_by_slot(slots: Tensor, weights: Tensor, first: int, num_slots: int, num_rows: Tensor | None) -> Pairs:  # [T, k] x 2
    assert slots.is_contiguous() and weights.is_contiguous()
    num_pairs, top_k = slots.numel(), slots.shape[1]
    order = torch.empty(num_pairs, dtype=torch.int32, device=slots.device)
    begins = torch.empty(num_slots + 1, dtype=torch.int32, device=slots.device)
    here = torch.empty_like(weights)
    block = max(16, min(_MOST, next_power_of_2(num_pairs)))
    real = slots if num_rows is None else num_rows  # not read where all rows are real
    _sort_by_slot_pairs[(num_slots + 1,)](
        slots,
        weights,
        real,
        order,
        begins,
        here,
        num_pairs,
        top_k,
        first,
        num_slots,
        ALL=num_rows is None,
        BLOCK=block,
        **early(slots),
        num_warps=4 if block <= 1024 else 8,
    )
    return Pairs(order, begins, here)


@jit(do_not_specialize=["num_pairs"])
def _sort_by_slot_pairs(
    slots, weights, num_rows, order, begins, here, num_pairs, top_k, first, num_slots,
    ALL: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    own = tl.program_id(0)
    after_earlier(PDL)
    real = num_pairs
    if not ALL:
        real = tl.minimum(tl.load(num_rows) * top_k, num_pairs).to(tl.int32)
    lower = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_pairs, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        slot = tl.load(slots + pair, mask=pair < real, other=-1).to(tl.int32) - first
        lower += ((slot >= 0) & (slot < own) & (pair < real)).to(tl.int32)
    place = tl.sum(lower)
    tl.store(begins + own, place)
    if own < num_slots:
        for start in range(0, num_pairs, BLOCK):
            pair = start + tl.arange(0, BLOCK)
            slot = tl.load(slots + pair, mask=pair < real, other=-1).to(tl.int32) - first
            mine = ((slot == own) & (pair < real)).to(tl.int32)
            tl.store(order + place + tl.cumsum(mine) - 1, pair, mask=mine == 1)
            place += tl.sum(mine)
    else:
        for start in range(0, num_pairs, BLOCK):
            pair = start + tl.arange(0, BLOCK)
            slot = tl.load(slots + pair, mask=pair < real, other=-1).to(tl.int32) - first
            held = (slot >= 0) & (slot < num_slots) & (pair < real)
            tl.store(here + pair, tl.load(weights + pair, mask=held, other=0.0), mask=pair < num_pairs)
