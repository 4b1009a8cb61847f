"""causal_conv in the Triton language: one program a tile of rows and channels, whatever items the rows are of."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from trireme_kernels.blocks import cdiv
from trireme_kernels.case import Case
from trireme_kernels.causal_conv.op import CausalConv
from trireme_kernels.jit import jit
from trireme_kernels.upload import upload

_ROWS, _COLUMNS = 16, 128  # of a tile


def fits(case: Case) -> str | None:
    return None


def build(case: Case) -> CausalConv:
    return Tiled(case)


class Tiled:
    def __init__(self, case: Case):
        self.device = case.device

    def plan(self, counts: np.ndarray) -> Tensor:  # int32 [2, N]: each row's item, and its number there
        counts = np.asarray(counts)
        item = np.repeat(np.arange(len(counts)), counts)
        place = np.arange(len(item)) - (np.cumsum(counts) - counts)[item]
        return upload(np.stack((item, place)).astype(np.int32), self.device)

    def run(self, x: Tensor, left: Tensor, weight: Tensor, plan: Tensor) -> Tensor:  # [N, C], [I, K - 1, C], [C, K] -> [N, C]
        assert x.stride(1) == left.stride(2) == weight.stride(1) == 1, "rows are contiguous"
        num_rows, num_channels = x.shape
        out = torch.empty(num_rows, num_channels, dtype=x.dtype, device=x.device)
        if num_rows:
            _causal_conv_tile[(cdiv(num_rows, _ROWS), cdiv(num_channels, _COLUMNS))](
                x,
                left,
                weight,
                plan,
                out,
                num_rows,
                num_channels,
                x.stride(0),
                *left.stride()[:2],
                weight.stride(0),
                TAPS=weight.shape[1],
                ROWS=_ROWS,
                COLUMNS=_COLUMNS,
            )
        return out


@jit(do_not_specialize=["num_rows"])
def _causal_conv_tile(
    x, left, weight, plan, out, num_rows, num_channels, x_row, left_item, left_row, weight_row,
    TAPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    real, known = row < num_rows, column < num_channels
    item = tl.load(plan + row, mask=real, other=0).to(tl.int64)
    place = tl.load(plan + num_rows + row, mask=real, other=0)
    line, inside = row.to(tl.int64), real[:, None] & known[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tap in tl.static_range(TAPS):
        since = TAPS - 1 - tap  # rows before this one
        own = (place >= since)[:, None]
        ours = x + ((line - since) * x_row)[:, None] + column[None, :]
        before = left + (item * left_item + (place + tap) * left_row)[:, None] + column[None, :]
        value = tl.load(ours, mask=inside & own, other=0.0) + tl.load(before, mask=inside & ~own, other=0.0)
        scale = tl.load(weight + column * weight_row + tap, mask=known, other=0.0)
        total += value.to(tl.float32) * scale.to(tl.float32)[None, :]
    tl.store(out + line[:, None] * num_channels + column[None, :], (total * tl.sigmoid(total)).to(out.dtype.element_ty), mask=inside)
