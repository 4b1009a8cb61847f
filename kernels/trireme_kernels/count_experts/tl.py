"""count_experts in the Triton language: a program for each block of choices, which are added one by one where memory is."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from trireme_kernels.case import Case
from trireme_kernels.count_experts.op import CountExperts

_BLOCK = 1024


def fits(case: Case) -> str | None:
    return None


def build(case: Case) -> CountExperts:
    return count_experts


def count_experts(experts: Tensor, num_rows: Tensor | None, counts: Tensor) -> None:  # [T, top_k], [1], [E]
    assert experts.is_contiguous() and counts.is_contiguous()
    num_choices, top_k = experts.numel(), experts.shape[1]
    if num_choices:
        real = counts if num_rows is None else num_rows  # not read where all rows are real
        _choices[(triton.cdiv(num_choices, _BLOCK),)](experts, real, counts, num_choices, top_k, ALL=num_rows is None, BLOCK=_BLOCK)


@triton.jit
def _choices(experts, num_rows, counts, num_choices, top_k, ALL: tl.constexpr, BLOCK: tl.constexpr):
    choice = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = choice < num_choices
    if not ALL:
        real = real & (choice < tl.load(num_rows) * top_k)
    expert = tl.load(experts + choice, mask=real, other=0)
    tl.atomic_add(counts + expert, 1, mask=real, sem="relaxed")
