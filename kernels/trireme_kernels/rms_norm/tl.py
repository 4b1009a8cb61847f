"""rms_norm in the Triton language: one program a row."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trireme_kernels.blocks import next_power_of_2
from trireme_kernels.case import Case
from trireme_kernels.jit import jit
from trireme_kernels.pdl import after_earlier, early
from trireme_kernels.rms_norm.op import RmsNorm


def fits(case: Case) -> str | None:
    return None


def build(case: Case) -> RmsNorm:
    return rms_norm


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # [T, H], [H] -> [T, H]
    num_rows, hidden = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if num_rows:
        _rms_norm_rows[(num_rows,)](x, weight, out, x.stride(0), hidden, eps, BLOCK=next_power_of_2(hidden), **early(x))
    return out


@jit
def _rms_norm_rows(x, weight, out, row_stride, hidden, eps, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    scale = tl.load(weight + column, mask=inside, other=0.0)
    after_earlier(PDL)
    value = tl.load(x + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * hidden + column, normed_row(value, scale, hidden, eps, out.dtype.element_ty), mask=inside)


@triton.jit
def normed_row(value, scale, hidden, eps, kind: tl.constexpr):
    """value float32 [BLOCK], numbers past the row's own zero, scale [BLOCK] -> [BLOCK] of `kind`."""
    return scaled(value * tl.rsqrt(tl.sum(value * value, axis=0) / hidden + eps), scale, kind)


@triton.jit
def scaled(unscaled, scale, kind: tl.constexpr):
    """unscaled float32 [.., BLOCK], scale of a shape that fits -> [.., BLOCK] of `kind`. All norms round alike."""
    return (unscaled.to(scale.dtype).to(tl.float32) * scale.to(tl.float32)).to(kind)
