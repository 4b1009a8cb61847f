"""add_rms_norm in the Triton language: one program a row, one read and one write of each row."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from trireme_kernels.add_rms_norm.op import AddRmsNorm
from trireme_kernels.blocks import next_power_of_2
from trireme_kernels.case import Case
from trireme_kernels.jit import jit
from trireme_kernels.pdl import after_earlier, early
from trireme_kernels.rms_norm.tl import normed_row


def fits(case: Case) -> str | None:
    return None


def build(case: Case) -> AddRmsNorm:
    return add_rms_norm


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:  # [T, H] x 2, [H] -> [T, H] x 2
    num_rows, hidden = x.shape
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = torch.empty_like(normed)
    if num_rows:
        strides, block = (x.stride(0), residual.stride(0)), next_power_of_2(hidden)
        _add_rms_norm_rows[(num_rows,)](x, residual, weight, normed, total, *strides, hidden, eps, BLOCK=block, **early(x))
    return normed, total


@jit
def _add_rms_norm_rows(
    x, residual, weight, normed, total, x_stride, residual_stride, hidden, eps,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    scale = tl.load(weight + column, mask=inside, other=0.0)
    after_earlier(PDL)
    left = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
    kind = total.dtype.element_ty
    rounded = (left + right).to(kind)
    tl.store(total + row * hidden + column, rounded, mask=inside)
    tl.store(normed + row * hidden + column, normed_row(rounded.to(tl.float32), scale, hidden, eps, kind), mask=inside)
