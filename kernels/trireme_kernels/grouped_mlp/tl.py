"""grouped_mlp in the Triton language: two products, in each a program for a tile of the result, all rows of it of one slot.

Where slots begin stays on the device. The grid holds as many tiles as any counts could need, and each program finds the rows of
its own from where slots begin:

    counts 3 0 5, tiles of 4      slot 0      slot 2        slot 2   unused
                                  rows 0 1 2  rows 3 4 5 6  row 7

The first product reads rows where they are and writes silu(gate) * up, slot after slot; the second writes each in its pair's place.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from trireme_kernels.blocks import cdiv, next_power_of_2
from trireme_kernels.case import Case
from trireme_kernels.grouped_mlp.op import GroupedMlp
from trireme_kernels.jit import jit
from trireme_kernels.pdl import after_earlier, early
from trireme_kernels.sort_by_slot.op import Pairs


class Tile(NamedTuple):
    """Columns are rows of the weight: in the first product half of them gates, half of them ups."""

    rows: int  # a product needs 16 at least
    columns: int
    inner: int  # of what is summed, at a time
    warps: int
    stages: int


# By rows that a slot has on average, up to so many; the best of a sweep on an H100, or within 3 % of it, of the product alone.
_SHORT = (
    (16, Tile(16, 64, 128, 4, 3)),
    (32, Tile(32, 64, 128, 4, 3)),
    (64, Tile(64, 128, 64, 4, 3)),
    (None, Tile(128, 256, 64, 8, 3)),
)
_FLOAT32 = tuple((rows if rows < 128 else None, Tile(rows, 64, 32, 4, 3)) for rows in (16, 32, 64, 128))
# The same for products of known shape, by (columns of x, rows of a slot's weight), of a sweep on an H100 with rows dealt at random.
_BY_SHAPE: Mapping[tuple[int, int], tuple[tuple[float | None, Tile], ...]] = MappingProxyType(
    {
        (2048, 1536): (
            (8.0, Tile(16, 64, 256, 4, 3)),
            (32.0, Tile(32, 128, 128, 4, 3)),
            (181.02, Tile(128, 256, 64, 8, 3)),
            (None, Tile(128, 256, 64, 8, 4)),
        ),
        (768, 2048): (
            (8.0, Tile(16, 64, 256, 4, 3)),
            (32.0, Tile(32, 128, 128, 4, 3)),
            (181.02, Tile(64, 128, 64, 4, 4)),
            (None, Tile(128, 256, 64, 8, 4)),
        ),
        (2048, 1024): (
            (0.09, Tile(16, 64, 256, 4, 3)),
            (4.0, Tile(16, 32, 256, 4, 4)),
            (16.0, Tile(16, 64, 128, 4, 4)),
            (90.51, Tile(64, 128, 128, 4, 3)),
            (None, Tile(128, 256, 64, 8, 4)),
        ),
        (512, 2048): (
            (4.0, Tile(16, 64, 128, 4, 3)),
            (16.0, Tile(32, 128, 128, 4, 3)),
            (90.51, Tile(64, 128, 64, 4, 4)),
            (None, Tile(128, 256, 64, 8, 4)),
        ),
    }
)
_SHARED_BYTES = max(
    (tile.rows + tile.columns) * tile.inner * 2 * tile.stages for tiles in (_SHORT, *_BY_SHAPE.values()) for _, tile in tiles
)


def fits(case: Case) -> str | None:
    if case.device == "cuda" and torch.cuda.is_available():
        shared = torch.cuda.get_device_properties(torch.cuda.current_device()).shared_memory_per_block_optin
        if shared < _SHARED_BYTES:
            return f"a block of this GPU has {shared} bytes of shared memory, tiles need {_SHARED_BYTES}"
    return None


def build(case: Case) -> GroupedMlp:
    return Tiled(case)


class Tiled:
    def __init__(self, case: Case):
        self._tiles, self._of_slots = _FLOAT32 if case.dtype == torch.float32 else _SHORT, case.sizes.get("of_slots")

    def __call__(self, x: Tensor, gate_up: Tensor, down: Tensor, pairs: Pairs) -> Tensor:  # [T, H] -> [T * k, H]
        each = len(pairs.order) / (self._of_slots or len(gate_up))
        inner = product(x, gate_up, pairs, self._tile(gate_up, each), gated=True)
        return product(inner, down, pairs, self._tile(down, each), gated=False)

    def _tile(self, weight: Tensor, each: float) -> Tile:
        """For slots that have `each` rows on average."""
        _, num_columns, num_in = weight.shape
        tiles = self._tiles if weight.dtype == torch.float32 else _BY_SHAPE.get((num_in, num_columns), self._tiles)
        return next(tile for most, tile in tiles if most is None or each <= most)


def product(x: Tensor, weight: Tensor, pairs: Pairs, tile: Tile, *, gated: bool) -> Tensor:
    """gated: rows x [T, K], weight [S, 2 N, K] -> silu(gate) * up [T * k, N], sorted as pairs are; else x so sorted [T * k, K], weight
    [S, N, K] -> [T * k, N] in the pairs' places."""
    order, begins, _ = pairs
    assert x.stride(1) == weight.stride(2) == 1, "rows are contiguous"
    num_pairs, (num_slots, num_columns, num_in) = len(order), weight.shape
    num_out = num_columns // 2 if gated else num_columns
    out = torch.empty(num_pairs, num_out, dtype=x.dtype, device=x.device)
    if not num_pairs:
        return out
    groups = min(num_slots, num_pairs)  # each may leave its last tile with one row
    num_tiles = (num_pairs + groups * (tile.rows - 1)) // tile.rows
    _grouped_mlp_product[(cdiv(num_columns, tile.columns), num_tiles)](
        x,
        weight,
        out,
        order,
        begins,
        num_slots,
        num_out,
        num_in,
        x.stride(0),
        *weight.stride()[:2],
        TOP_K=num_pairs // len(x) if gated else 1,
        GATED=gated,
        SLOTS=next_power_of_2(num_slots),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        INNER=tile.inner,
        WHOLE=num_in % tile.inner == 0,
        WIDEN=not x.is_cuda,  # the interpreter multiplies bfloat16 matrices wrongly: it holds them as integers
        **early(x),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


@jit
def _grouped_mlp_product(
    x, weight, out, order, begins, num_slots, num_out, num_in, x_row, weight_slot, weight_row,
    TOP_K: tl.constexpr, GATED: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
    WHOLE: tl.constexpr, WIDEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # Programs of one tile's columns are neighbours: its rows of x, and soon the slot's weight, are then in the cache.
    tile = tl.program_id(1)
    each = tl.arange(0, SLOTS)
    known = each < num_slots
    after_earlier(PDL)
    count = tl.load(begins + 1 + each, mask=known, other=0) - tl.load(begins + each, mask=known, other=0)
    tiles = tl.cdiv(count, ROWS)
    slot = tl.sum((tl.cumsum(tiles) <= tile).to(tl.int32))
    if slot >= num_slots:
        return
    begin = tl.load(begins + slot) + (tile - tl.sum(tl.where(each < slot, tiles, 0))) * ROWS
    end = tl.load(begins + slot + 1)
    # Lines and columns past the last are read as the last: what comes of them is not stored.
    line = begin + tl.arange(0, ROWS)
    read = tl.minimum(line, end - 1)
    pair = tl.load(order + read)
    row = pair // TOP_K if GATED else read
    x_line = x + row.to(tl.int64)[:, None] * x_row
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    half = 2 if GATED else 1  # a gate and its up are neighbours
    column = tl.minimum(column // half, num_out - 1) + column % half * num_out
    weight_line = weight + slot.to(tl.int64) * weight_slot + column.to(tl.int64)[None, :] * weight_row
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, num_in, INNER):
        inner = start + tl.arange(0, INNER)
        if WHOLE:
            left = tl.load(x_line + inner[None, :])
            right = tl.load(weight_line + inner[:, None])
        else:
            left = tl.load(x_line + inner[None, :], mask=(inner < num_in)[None, :], other=0.0)
            right = tl.load(weight_line + inner[:, None], mask=(inner < num_in)[:, None], other=0.0)
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision="ieee")
    if GATED:
        gate, up = tl.split(tl.reshape(total, [ROWS, COLUMNS // 2, 2]))
        value = gate * tl.sigmoid(gate) * up
        target = tl.program_id(0) * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
        place = line
    else:
        value = total
        target = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        place = pair
    real = (line < end)[:, None] & (target < num_out)[None, :]
    tl.store(out + place.to(tl.int64)[:, None] * num_out + target[None, :], value.to(out.dtype.element_ty), mask=real)
