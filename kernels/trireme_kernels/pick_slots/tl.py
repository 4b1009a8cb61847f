"""pick_slots in the Triton language: a program for each block of choices, which are counted one by one where memory is."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from trireme_kernels.blocks import cdiv
from trireme_kernels.case import Case
from trireme_kernels.jit import jit
from trireme_kernels.pdl import after_earlier, early
from trireme_kernels.pick_slots.op import PickSlots

_BLOCK = 256


def fits(case: Case) -> str | None:
    return None


def build(case: Case) -> PickSlots:
    return pick_slots


def pick_slots(experts: Tensor, copies: Tensor, num_rows: Tensor | None, loads: Tensor | None) -> Tensor:  # [T, k] -> [T, k]
    assert experts.is_contiguous() and copies.is_contiguous() and (loads is None or loads.is_contiguous())
    slots = torch.empty_like(experts)
    if num_choices := experts.numel():
        _pick_slots_choices[(cdiv(num_choices, _BLOCK),)](
            experts,
            copies,
            experts if num_rows is None else num_rows,  # not read where all rows are real
            experts if loads is None else loads,  # nor where nothing is counted
            slots,
            num_choices,
            experts.shape[1],
            copies.shape[1] - 1,
            ALL=num_rows is None,
            COUNTS=loads is not None,
            BLOCK=_BLOCK,
            **early(experts),
        )
    return slots


@jit(do_not_specialize=["num_choices"])
def _pick_slots_choices(
    experts, copies, num_rows, loads, slots, num_choices, top_k, most,
    ALL: tl.constexpr, COUNTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    choice = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = choice < num_choices
    after_earlier(PDL)
    expert = tl.load(experts + choice, mask=inside, other=0)
    every = copies + expert * (most + 1)
    how_many = tl.load(every + most)
    tl.store(slots + choice, tl.load(every + (choice // top_k).to(tl.int64) % how_many), mask=inside)
    if COUNTS:
        real = inside
        if not ALL:
            real = real & (choice < tl.load(num_rows) * top_k)
        tl.atomic_add(loads + expert, 1, mask=real, sem="relaxed")
