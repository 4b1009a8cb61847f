"""swiglu in the Triton language: of thousands of rows both products and the gate are one kernel, since what lies between them would
cross the memory twice. Of fewer torch's product is faster, and silu_mul follows it.

A program has ROWS rows and COLUMNS columns of both halves. Programs go down GROUP tiles of rows before they go on to the next
columns, so that those under way together share what the cache holds.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from trireme_kernels.case import Case
from trireme_kernels.linear.tl import fits as fits_linear
from trireme_kernels.linear.tl import linear, product
from trireme_kernels.pdl import after_earlier, early
from trireme_kernels.silu_mul.tl import gated, silu_mul
from trireme_kernels.swiglu.op import SwiGlu

# A step of 8,100 rows of Qwen3-8B, on an H100 held at 700 W, takes 188.3 ms so, and 190.9 by cuBLAS and silu_mul. Fewer than half as
# many rows were not measured.
_MANY = 4096
_ROWS, _COLUMNS, _INNER, _GROUP = 128, 128, 64, 8


def fits(case: Case) -> str | None:
    return fits_linear(case)


def build(case: Case) -> SwiGlu:
    return swiglu


def swiglu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # [T, K], [2 I, K], [2 I] -> [T, I]
    num_rows, width = len(x), len(weight) // 2
    if num_rows < _MANY or width % 8 or bias is not None:  # copies to memory begin at whole 16 bytes
        return silu_mul(linear(x, weight, bias))
    out = torch.empty(num_rows, width, dtype=x.dtype, device=x.device)
    _swiglu_tiles[(triton.cdiv(num_rows, _ROWS) * triton.cdiv(width, _COLUMNS),)](
        TensorDescriptor.from_tensor(x, [_ROWS, _INNER]),
        TensorDescriptor.from_tensor(weight, [_COLUMNS, _INNER]),
        TensorDescriptor.from_tensor(out, [_ROWS, _COLUMNS]),
        num_rows,
        width,
        x.shape[1],
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        INNER=_INNER,
        GROUP=_GROUP,
        WIDEN=not x.is_cuda,
        STAGES=4,
        num_warps=8,
        **early(x),
    )
    return out


@triton.jit(do_not_specialize=["num_rows"])
def _swiglu_tiles(
    x, weight, out, num_rows, width, num_in,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr, WIDEN: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One tile; x, weight and out are descriptors, which give zeros past the ends and leave there what is stored."""
    in_group = GROUP * tl.cdiv(width, COLUMNS)
    group, nth = tl.program_id(0) // in_group, tl.program_id(0) % in_group
    high = tl.minimum(tl.cdiv(num_rows, ROWS) - group * GROUP, GROUP)
    row, column = (group * GROUP + nth % high) * ROWS, nth // high * COLUMNS
    after_earlier(PDL)
    tl.assume(num_in > 0)  # else the way around the loop makes ptxas wait for each matrix instruction
    gate = tl.zeros([ROWS, COLUMNS], tl.float32)
    up = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, num_in, INNER, num_stages=STAGES):
        left = x.load([row, start])
        gate = product(left, weight.load([column, start]).T, gate, WIDEN)
        up = product(left, weight.load([width + column, start]).T, up, WIDEN)
    out.store([row, column], gated(gate.to(out.dtype), up.to(out.dtype)))
