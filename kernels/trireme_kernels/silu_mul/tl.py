"""silu_mul in the Triton language: a grid of rows and column blocks."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trireme_kernels.blocks import cdiv, next_power_of_2
from trireme_kernels.case import Case
from trireme_kernels.jit import jit
from trireme_kernels.pdl import after_earlier, early
from trireme_kernels.silu_mul.op import SiluMul


def fits(case: Case) -> str | None:
    return None


def build(case: Case) -> SiluMul:
    return silu_mul


def silu_mul(gate_up: Tensor) -> Tensor:  # [T, 2 I] -> [T, I]
    num_rows, columns = gate_up.shape
    width = columns // 2
    out = torch.empty(num_rows, width, dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        block = min(1024, next_power_of_2(width))
        _silu_mul_blocks[(num_rows, cdiv(width, block))](gate_up, out, gate_up.stride(0), width, BLOCK=block, **early(gate_up))
    return out


@jit
def _silu_mul_blocks(gate_up, out, row_stride, width, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    after_earlier(PDL)
    gate = tl.load(gate_up + row * row_stride + column, mask=inside, other=0.0)
    up = tl.load(gate_up + row * row_stride + width + column, mask=inside, other=0.0)
    tl.store(out + row * width + column, gated(gate, up), mask=inside)


@triton.jit
def gated(gate, up):
    """silu(gate) * up, both of one dtype, to which silu is rounded before the product."""
    wide = gate.to(tl.float32)
    silu = (wide * tl.sigmoid(wide)).to(up.dtype).to(tl.float32)
    return (silu * up.to(tl.float32)).to(up.dtype)
