"""grouped_linear in the Triton language: one program a tile of the result, all rows of it of one slot.

Counts stay on the device. The grid holds as many tiles as any counts could need, and a small table, written by `plan`,
says which rows each tile has:

    counts 3 0 5, 10 rows, tiles of 4      slot 0      slot 2        slot 2   no slot    unused
                                           rows 0 1 2  rows 3 4 5 6  row 7    rows 8 9
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


class _Tile(NamedTuple):
    rows: int  # a product needs 16 at least
    columns: int
    inner: int  # of K, at a time
    warps: int
    stages: int


# By rows of a slot; the best of a sweep on an H100, or within 3 % of it. What that gives, against torch's grouped_mm, for
# Qwen3-30B-A3B's gate and up in bfloat16 (S=128, K=2048, N=1536), slots unevenly full: 8 rows 30 us (39), 512 rows 210 us
# (228; reading the weights takes 194), 8192 rows 336 us (350), 32768 rows 520 us (502).
_SHORT = (_Tile(16, 64, 128, 4, 3), _Tile(32, 64, 128, 4, 3), _Tile(64, 128, 64, 4, 3), _Tile(128, 256, 64, 8, 3))
_FLOAT32 = tuple(_Tile(rows, 64, 32, 4, 3) for rows in (16, 32, 64, 128))
_SHARED_BYTES = max((tile.rows + tile.columns) * tile.inner * 2 * tile.stages for tile in _SHORT)


def fits(case: Case) -> str | None:
    if case.device == "cuda" and torch.cuda.is_available():
        shared = torch.cuda.get_device_properties(torch.cuda.current_device()).shared_memory_per_block_optin
        if shared < _SHARED_BYTES:
            return f"a block of this GPU has {shared} bytes of shared memory, tiles need {_SHARED_BYTES}"
    return None


def build(case: Case) -> GroupedLinear:
    return Tiled(case)


class _Plan(NamedTuple):
    table: Tensor  # int32 [3, tiles]: slot (S: none), first row, row after the last; no rows where a tile is unused
    tile: _Tile


class Tiled:
    def __init__(self, case: Case):
        self.device = case.device
        self.tiles = _FLOAT32 if case.dtype == torch.float32 else _SHORT

    def plan(self, counts: Tensor, num_rows: int) -> _Plan:
        num_slots = len(counts)
        tile = next((tile for tile in self.tiles if tile.rows * num_slots >= num_rows), self.tiles[-1])
        groups = min(num_slots + 1, num_rows)  # of rows of one slot or none; each may leave its last tile with one row
        num_tiles = (num_rows + groups * (tile.rows - 1)) // tile.rows
        table = torch.empty(3, num_tiles, dtype=torch.int32, device=self.device)
        if num_tiles:
            slots = triton.next_power_of_2(num_slots)
            _lay[(num_slots + 1,)](counts.to(self.device), table, num_slots, num_rows, num_tiles, ROWS=tile.rows, SLOTS=slots)
        return _Plan(table, tile)

    def run(self, x: Tensor, weight: Tensor, plan: _Plan) -> Tensor:  # [M, K], [S, N, K] -> [M, N]
        assert x.stride(1) == weight.stride(2) == 1, "rows are contiguous"
        num_slots, num_out, num_in = weight.shape
        out = torch.empty(x.shape[0], num_out, dtype=x.dtype, device=x.device)
        table, tile = plan
        num_tiles = table.shape[1]
        if num_tiles:
            _multiply[(triton.cdiv(num_out, tile.columns), num_tiles)](
                x,
                weight,
                out,
                table,
                num_tiles,
                num_slots,
                num_out,
                num_in,
                x.stride(0),
                *weight.stride()[:2],
                ROWS=tile.rows,
                COLUMNS=tile.columns,
                INNER=tile.inner,
                WIDEN=not x.is_cuda,  # the interpreter multiplies bfloat16 matrices wrongly: it holds them as integers
                num_warps=tile.warps,
                num_stages=tile.stages,
            )
        return out


@triton.jit
def _lay(counts, table, num_slots, num_rows, num_tiles, ROWS: tl.constexpr, SLOTS: tl.constexpr):
    """One program a slot, and a last one for the rows of no slot and for unused tiles."""
    slot = tl.program_id(0)
    other = tl.arange(0, SLOTS)
    count = tl.load(counts + other, mask=other < num_slots, other=0).to(tl.int32)
    before = other < slot
    begin = tl.sum(tl.where(before, count, 0))
    own = tl.sum(tl.where(other == slot, count, 0))
    first = tl.sum(tl.where(before, tl.cdiv(count, ROWS), 0))
    end, last = begin + own, first + tl.cdiv(own, ROWS)
    if slot == num_slots:
        end, last = num_rows, num_tiles
    for start in range(first, last, 128):
        tile = start + tl.arange(0, 128)
        row = begin + (tile - first) * ROWS
        tl.store(table + tile, slot, mask=tile < last)
        tl.store(table + num_tiles + tile, row, mask=tile < last)
        tl.store(table + 2 * num_tiles + tile, tl.minimum(row + ROWS, end), mask=tile < last)


@triton.jit
def _multiply(
    x, weight, out, table, num_tiles, num_slots, num_out, num_in, x_row, weight_slot, weight_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    # Programs of one tile's columns are neighbours: its rows of x, and soon the slot's weight, are then in the cache.
    tile = tl.program_id(1)
    slot = tl.load(table + tile).to(tl.int64)
    begin = tl.load(table + num_tiles + tile)
    end = tl.load(table + 2 * num_tiles + tile)
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
