"""grouped_linear in the Triton language: one program a tile of the result, all rows of it of one slot.

Counts stay on the device. The grid holds as many tiles as any counts could need, and a small table, written by `plan`,
says which rows each tile has:

    counts 3 0 5, 10 rows, tiles of 4      slot 0    slot 2    slot 2    none      unused
                                           rows 0-3  rows 3-7  rows 7-8  rows 8-10
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from trireme_kernels.case import Case
from trireme_kernels.grouped_linear.op import GroupedLinear

_LEAST_ROWS, _MOST_ROWS = 16, 128  # of a tile; a product needs 16 at least


def fits(case: Case) -> str | None:
    return None


def build(case: Case) -> GroupedLinear:
    return Tiled(case)


class _Plan(NamedTuple):
    tiles: Tensor  # int32 [3, tiles]: slot (S: none), first row, row after the last; no rows where a tile is unused
    tile_rows: int


class Tiled:
    def __init__(self, case: Case):
        self.device = case.device

    def plan(self, counts: Tensor, num_rows: int) -> _Plan:
        num_slots = len(counts)
        rows = min(max(triton.next_power_of_2(triton.cdiv(num_rows, num_slots)), _LEAST_ROWS), _MOST_ROWS)
        groups = min(num_slots + 1, num_rows)  # of rows of one slot or none; each may leave its last tile with one row
        num_tiles = (num_rows + groups * (rows - 1)) // rows
        tiles = torch.empty(3, num_tiles, dtype=torch.int32, device=self.device)
        if num_tiles:
            _lay[(num_slots + 1,)](
                counts.to(self.device), tiles, num_slots, num_rows, num_tiles, ROWS=rows, SLOTS=triton.next_power_of_2(num_slots)
            )
        return _Plan(tiles, rows)

    def run(self, x: Tensor, weight: Tensor, plan: _Plan) -> Tensor:  # [M, K], [S, N, K] -> [M, N]
        assert x.stride(1) == weight.stride(2) == 1, "rows are contiguous"
        num_slots, num_out, num_in = weight.shape
        out = torch.empty(x.shape[0], num_out, dtype=x.dtype, device=x.device)
        num_tiles = plan.tiles.shape[1]
        columns = 128 if plan.tile_rows == _MOST_ROWS and x.dtype != torch.float32 else 64
        if num_tiles:
            _multiply[(triton.cdiv(num_out, columns), num_tiles)](
                x,
                weight,
                out,
                plan.tiles,
                num_tiles,
                num_slots,
                num_out,
                num_in,
                x.stride(0),
                *weight.stride()[:2],
                ROWS=plan.tile_rows,
                COLUMNS=columns,
                INNER=(128 if plan.tile_rows <= 32 else 64) * 2 // x.dtype.itemsize,
                WIDEN=not x.is_cuda,  # the interpreter multiplies bfloat16 matrices wrongly: it holds them as integers
                num_warps=8 if columns == 128 else 4,
                num_stages=3,
            )
        return out


@triton.jit
def _lay(counts, tiles, num_slots, num_rows, num_tiles, ROWS: tl.constexpr, SLOTS: tl.constexpr):
    """One program a slot, and a last one for the rows of no slot and for unused tiles."""
    slot = tl.program_id(0)
    other = tl.arange(0, SLOTS)
    count = tl.load(counts + other, mask=other < num_slots, other=0).to(tl.int32)
    before = other < slot
    begin = tl.sum(tl.where(before, count, 0))
    own = tl.sum(tl.where(other == slot, count, 0))
    first = tl.sum(tl.where(before, (count + ROWS - 1) // ROWS, 0))
    end, last = begin + own, first + (own + ROWS - 1) // ROWS
    if slot == num_slots:
        end, last = num_rows, num_tiles
    for start in range(first, last, 128):
        tile = start + tl.arange(0, 128)
        row = begin + (tile - first) * ROWS
        tl.store(tiles + tile, slot, mask=tile < last)
        tl.store(tiles + num_tiles + tile, row, mask=tile < last)
        tl.store(tiles + 2 * num_tiles + tile, tl.minimum(row + ROWS, end), mask=tile < last)


@triton.jit
def _multiply(
    x, weight, out, tiles, num_tiles, num_slots, num_out, num_in, x_row, weight_slot, weight_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    # Programs of one tile's columns are neighbours: its rows of x, and soon the slot's weight, are then in the cache.
    tile = tl.program_id(1)
    slot = tl.load(tiles + tile).to(tl.int64)
    begin = tl.load(tiles + num_tiles + tile)
    end = tl.load(tiles + 2 * num_tiles + tile)
    if begin >= end:
        return
    line = begin + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    # Lines and columns past the last are read as the last: what comes of them is not stored.
    x_line = x + tl.minimum(line, end - 1).to(tl.int64)[:, None] * x_row
    weight_line = weight + slot * weight_slot + tl.minimum(column, num_out - 1).to(tl.int64)[None, :] * weight_row
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    if slot < num_slots:
        for start in range(0, num_in, INNER):
            inner = start + tl.arange(0, INNER)
            left = tl.load(x_line + inner[None, :], mask=(inner < num_in)[None, :], other=0.0)
            right = tl.load(weight_line + inner[:, None], mask=(inner < num_in)[:, None], other=0.0)
            if WIDEN:
                left, right = left.to(tl.float32), right.to(tl.float32)
            total = tl.dot(left, right, total, input_precision="ieee")
    real = (line < end)[:, None] & (column < num_out)[None, :]
    target = out + line.to(tl.int64)[:, None] * num_out + column[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=real)
