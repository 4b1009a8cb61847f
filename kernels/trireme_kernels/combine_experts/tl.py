"""combine_experts in the Triton language: a grid of rows and column blocks."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from trireme_kernels.blocks import cdiv, next_power_of_2
from trireme_kernels.case import Case
from trireme_kernels.combine_experts.op import CombineExperts, Shared
from trireme_kernels.jit import jit
from trireme_kernels.pdl import after_earlier, early


def fits(case: Case) -> str | None:
    return None


def build(case: Case) -> CombineExperts:
    return combine_experts


def combine_experts(results: Tensor, weights: Tensor, shared: Shared | None) -> Tensor:  # [T * k, H], [T, k] -> [T, H]
    num_rows, top_k = weights.shape
    hidden = results.shape[1]
    out = torch.empty(num_rows, hidden, dtype=results.dtype, device=results.device)
    others = Shared(out, out, out) if shared is None else shared  # not read where there is none
    assert results.is_contiguous() and weights.is_contiguous() and all(each.stride(1) == 1 for each in others)
    if num_rows:
        block = min(1024, next_power_of_2(hidden))
        _combine_experts_rows[(num_rows, cdiv(hidden, block))](
            results,
            weights,
            *others,
            out,
            hidden,
            others.results.stride(0),
            others.x.stride(0),
            TOP_K=top_k,
            SHARED=shared is not None,
            BLOCK=block,
            **early(results),
        )
    return out


@jit
def _combine_experts_rows(
    results, weights, shared, x, gate, out, hidden, shared_row, x_row,
    TOP_K: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < hidden
    after_earlier(PDL)
    total = tl.zeros([BLOCK], tl.float32)
    for nth in tl.static_range(TOP_K):  # pyright: ignore[reportGeneralTypeIssues]
        weight = tl.load(weights + row * TOP_K + nth)
        end = tl.where(weight != 0, hidden, 0)
        result = tl.load(results + (row * TOP_K + nth) * hidden + column, mask=column < end, other=0.0)
        total += weight * result.to(tl.float32)
    if SHARED:
        opened = tl.zeros([BLOCK], tl.float32)
        for start in range(0, hidden, BLOCK):
            inner = start + tl.arange(0, BLOCK)
            value = tl.load(x + row * x_row + inner, mask=inner < hidden, other=0.0).to(tl.float32)
            opened += value * tl.load(gate + inner, mask=inner < hidden, other=0.0).to(tl.float32)
        result = tl.load(shared + row * shared_row + column, mask=inside, other=0.0).to(tl.float32)
        total += tl.sigmoid(tl.sum(opened)) * result
    tl.store(out + row * hidden + column, total.to(out.dtype.element_ty), mask=inside)
