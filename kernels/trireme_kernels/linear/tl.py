"""linear in the Triton language for few rows: one program some columns, all of K. Reading the weight is all that takes time.

The first tile of the weight is on its way before the kernels before this one are done; the others pass through shared
memory, some tiles ahead. Sums are float32, in an order that depends on shapes alone. More rows are torch's.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from trireme_kernels.blocks import cdiv
from trireme_kernels.case import Case
from trireme_kernels.jit import jit
from trireme_kernels.linear.op import Linear
from trireme_kernels.pdl import after_earlier, early


class _Tile(NamedTuple):
    columns: int  # of the result
    inner: int  # of K, at a time
    warps: int
    stages: int


# Up to so many rows, which are made so many: a power of two, from 16 on by matrix instructions. The best of a sweep over the products
# of Qwen3-8B on an H100: a step's are 5.10 ms at one row (torch's 6.05), 5.59 at 16 (6.20), 5.74 at 32 (5.98). Two rows, a token and a
# draft, of products of Qwen3.5-35B-A3B, us, against tiles for 16: [12352, 2048] 20.6 (21.2), [9216, 2048] 16.0 (18.1), [2048, 4096] 7.4
# (9.6); of Qwen3-8B [4096, 12288] 36.4 (39.4), others within 4 %.
_TILES = ((1, _Tile(2, 2048, 4, 3)), (2, _Tile(4, 1024, 4, 3)), (16, _Tile(64, 128, 4, 6)), (32, _Tile(64, 128, 4, 6)))
_MOST_ROWS = _TILES[-1][0]


def fits(case: Case) -> str | None:
    if case.dtype not in (torch.bfloat16, torch.float16):
        return f"multiplies bfloat16 and float16, not {str(case.dtype).removeprefix('torch.')}"
    if case.sizes["num_in"] % 16:
        return f"rows of {case.sizes['num_in']} numbers do not all begin at whole 32 bytes"
    return None


def build(case: Case) -> Linear:
    return linear


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:  # [T, K], [N, K], [N] -> [T, N]
    num_rows, num_in = x.shape
    if num_rows > _MOST_ROWS:
        return _many(x, weight, bias, dtype)
    rows, tile = next((rows, tile) for rows, tile in _TILES if num_rows <= rows)
    num_out, dtype = weight.shape[0], dtype or x.dtype
    assert x.stride(1) == 1 and weight.is_contiguous(), "rows are contiguous"
    out = torch.empty(num_rows, num_out, dtype=dtype, device=x.device)
    if out.numel():
        _linear_columns[(cdiv(num_out, tile.columns),)](
            x,
            weight,
            weight if bias is None else bias,  # an unused pointer must still be one
            out,
            num_rows,
            num_out,
            num_in,
            x.stride(0),
            ROWS=rows,
            COLUMNS=tile.columns,
            INNER=tile.inner,
            BIAS=bias is not None,
            WIDEN=not x.is_cuda,  # the interpreter multiplies bfloat16 matrices wrongly: it holds them as integers
            STAGES=tile.stages,
            num_warps=tile.warps,
            **early(x),
        )
    return out


def _many(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or dtype == x.dtype:
        return F.linear(x, weight, bias)
    if not x.is_cuda:
        return F.linear(x, weight, bias).to(dtype)
    out = torch.mm(x, weight.t(), out_dtype=dtype)
    return out if bias is None else out.add_(bias)


@jit(do_not_specialize=["num_rows"])
def _linear_columns(
    x, weight, bias, out, num_rows, num_out, num_in, x_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, BIAS: tl.constexpr, WIDEN: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    real = column < num_out
    inner = tl.arange(0, INNER)
    # Rows and columns past the last are read as the last: what comes of them is not stored.
    line = weight + tl.minimum(column, num_out - 1).to(tl.int64)[:, None] * num_in + inner[None, :]
    first = tl.load(line, mask=(inner < num_in)[None, :], other=0.0)
    after_earlier(PDL)
    if ROWS == 1:
        sums = tl.zeros([COLUMNS, INNER], tl.float32)
        for start in tl.range(INNER, num_in, INNER, num_stages=STAGES):
            inside = inner < num_in - start
            left = tl.load(line + start, mask=inside[None, :], other=0.0)
            sums += left.to(tl.float32) * tl.load(x + start + inner, mask=inside, other=0.0).to(tl.float32)[None, :]
        sums += first.to(tl.float32) * tl.load(x + inner, mask=inner < num_in, other=0.0).to(tl.float32)[None, :]
        total = tl.sum(sums, axis=1)
        if BIAS:
            total += tl.load(bias + column, mask=real, other=0.0).to(tl.float32)
        tl.store(out + column, total.to(out.dtype.element_ty), mask=real)
    elif ROWS < 16:
        row = tl.arange(0, ROWS)
        rows = x + tl.minimum(row, num_rows - 1).to(tl.int64)[:, None] * x_row + inner[None, :]
        sums = tl.zeros([ROWS, COLUMNS, INNER], tl.float32)
        for start in tl.range(INNER, num_in, INNER, num_stages=STAGES):
            inside = (inner < num_in - start)[None, :]
            left = tl.load(line + start, mask=inside, other=0.0).to(tl.float32)
            sums += left[None, :, :] * tl.load(rows + start, mask=inside, other=0.0).to(tl.float32)[:, None, :]
        right = tl.load(rows, mask=(inner < num_in)[None, :], other=0.0).to(tl.float32)
        sums += first.to(tl.float32)[None, :, :] * right[:, None, :]
        total = tl.sum(sums, axis=2)
        if BIAS:
            total += tl.load(bias + column, mask=real, other=0.0).to(tl.float32)[None, :]
        target = out + row.to(tl.int64)[:, None] * num_out + column[None, :]
        tl.store(target, total.to(out.dtype.element_ty), mask=(row < num_rows)[:, None] & real[None, :])
    else:
        row = tl.arange(0, ROWS)
        rows = x + tl.minimum(row, num_rows - 1).to(tl.int64)[None, :] * x_row + inner[:, None]
        total = tl.zeros([COLUMNS, ROWS], tl.float32)
        for start in tl.range(INNER, num_in, INNER, num_stages=STAGES):
            inside = inner < num_in - start
            left = tl.load(line + start, mask=inside[None, :], other=0.0)
            total = product(left, tl.load(rows + start, mask=inside[:, None], other=0.0), total, WIDEN)
        total = product(first, tl.load(rows, mask=(inner < num_in)[:, None], other=0.0), total, WIDEN)
        if BIAS:
            total += tl.load(bias + column, mask=real, other=0.0).to(tl.float32)[:, None]
        target = out + row.to(tl.int64)[None, :] * num_out + column[:, None]
        tl.store(target, total.to(out.dtype.element_ty), mask=(row < num_rows)[None, :] & real[:, None])


@triton.jit
def product(left, right, total, WIDEN: tl.constexpr):
    if WIDEN:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")
