"""sigmoid_mul in the Triton language: a grid of rows and column blocks."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from trireme_kernels.blocks import cdiv, next_power_of_2
from trireme_kernels.case import Case
from trireme_kernels.jit import jit
from trireme_kernels.pdl import after_earlier, early
from trireme_kernels.sigmoid_mul.op import SigmoidMul

_NUMBERS = 1024  # of a program


def fits(case: Case) -> str | None:
    return None


def build(case: Case) -> SigmoidMul:
    return sigmoid_mul


def sigmoid_mul(x: Tensor, gate: Tensor) -> Tensor:  # [T, H, D] twice -> [T, H, D]
    num_rows, num_heads, dim = x.shape
    assert x.stride()[1:] == gate.stride()[1:] == (dim, 1), "a row's heads lie side by side"
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if num_rows:
        width = num_heads * dim
        block = min(_NUMBERS, next_power_of_2(width))
        _sigmoid_mul_blocks[(num_rows, cdiv(width, block))](x, gate, out, x.stride(0), gate.stride(0), width, BLOCK=block, **early(x))
    return out


@jit
def _sigmoid_mul_blocks(x, gate, out, x_row, gate_row, width, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    after_earlier(PDL)
    value = tl.load(x + row * x_row + column, mask=inside, other=0.0)
    opening = tl.sigmoid(tl.load(gate + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)).to(value.dtype)
    tl.store(out + row * width + column, (value.to(tl.float32) * opening.to(tl.float32)).to(value.dtype), mask=inside)
