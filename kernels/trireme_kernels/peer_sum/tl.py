"""peer_sum in the Triton language: one program a cell, which writes its numbers into every other rank's box before it waits for theirs."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trireme_kernels.blocks import cdiv, next_power_of_2
from trireme_kernels.case import Case
from trireme_kernels.jit import jit
from trireme_kernels.pdl import after_earlier, early
from trireme_kernels.peer_sum.op import Boxes, PeerSum, empty_key_of, empty_of
from trireme_kernels.rms_norm.tl import normed_row

_GLANCE = 256  # looks into the box between looks at `given_up`
_ROWS = 64  # of a program that finds the best of each: however many there are, one compiled kernel does


def fits(case: Case) -> str | None:
    return None


def build(case: Case) -> PeerSum:
    return InOneKernel()


class InOneKernel:
    def sum(self, x: Tensor, boxes: Boxes) -> Tensor:
        x = x.contiguous()
        cell = boxes.every[0].shape[-1]
        num = x.numel()
        block = min(cell, next_power_of_2(num))
        if num:
            box = boxes.every[boxes.place]
            _peer_sum_cells[(cdiv(num, block),)](
                x.view(box.dtype), x, num, *_of(boxes, box), EMPTY=empty_of(box.dtype), **_fixed(boxes, block, box)
            )
        return x

    def sum_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, boxes: Boxes) -> tuple[Tensor, Tensor]:
        num_rows, hidden = x.shape
        normed = torch.empty_like(x, memory_format=torch.contiguous_format)
        total = torch.empty_like(normed)
        if num_rows:
            box = boxes.every[boxes.place]
            _peer_sum_rows[(num_rows,)](
                x.view(box.dtype),
                residual,
                weight,
                normed,
                total,
                x.stride(0),
                residual.stride(0),
                hidden,
                eps,
                *_of(boxes, box),
                EMPTY=empty_of(box.dtype),
                **_fixed(boxes, next_power_of_2(hidden), box),
            )
        return normed, total

    def best(self, values: Tensor, ids: Tensor, boxes: Boxes) -> tuple[Tensor, Tensor]:
        [num] = values.shape
        highest, where = torch.empty_like(values), torch.empty_like(ids)
        if num:
            bits = boxes.every[boxes.place]
            box = bits.view(torch.int64)
            block = min(box.shape[-1], _ROWS)
            assert num <= block * box.shape[2], f"{num} rows, and {box.shape[2]} cells of {block}"
            _peer_sum_bests[(cdiv(num, block),)](
                values,
                ids,
                highest,
                where,
                values.stride(0),
                ids.stride(0),
                num,
                *_of(boxes, box),
                EMPTY=empty_key_of(bits.dtype),
                **_fixed(boxes, block, box),
            )
        return highest, where


def _of(boxes: Boxes, box: Tensor) -> tuple[Any, ...]:
    return box, boxes.addresses, boxes.turns, box.stride(0), box.stride(1), box.stride(2)


def _fixed(boxes: Boxes, block: int, box: Tensor) -> dict[str, int]:
    return {
        "PLACE": boxes.place,
        "WORLD": len(boxes.every),
        "GLANCE": _GLANCE,
        "BLOCK": block,
        "num_warps": max(1, min(16, block * box.itemsize // 512)),  # 16 bytes a thread
        **early(box),
    }


@jit  # `num` may be known as a multiple of 16: then rows are written in pieces of 16 bytes, else in numbers of two
def _peer_sum_cells(
    bits,
    x,
    num,
    box,
    addresses,
    turns,
    turn_stride,
    place_stride,
    cell_stride,
    EMPTY: tl.constexpr,
    PLACE: tl.constexpr,
    WORLD: tl.constexpr,
    GLANCE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    cell = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    at = cell * BLOCK + column
    inside = at < num
    after_earlier(PDL)
    mine = tl.load(bits + at, mask=inside, other=0)
    kind = x.dtype.element_ty
    summed = _exchanged(
        mine, column, inside, cell, box, addresses, turns, turn_stride, place_stride, cell_stride, kind, EMPTY, PLACE, WORLD, GLANCE
    )
    tl.store(x + at, summed.to(kind), mask=inside)


@jit
def _peer_sum_rows(
    bits,
    residual,
    weight,
    normed,
    total,
    x_stride,
    residual_stride,
    hidden,
    eps,
    box,
    addresses,
    turns,
    turn_stride,
    place_stride,
    cell_stride,
    EMPTY: tl.constexpr,
    PLACE: tl.constexpr,
    WORLD: tl.constexpr,
    GLANCE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    scale = tl.load(weight + column, mask=inside, other=0.0)
    after_earlier(PDL)
    mine = tl.load(bits + row * x_stride + column, mask=inside, other=0)
    before = tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
    kind = total.dtype.element_ty
    summed = _exchanged(
        mine, column, inside, row, box, addresses, turns, turn_stride, place_stride, cell_stride, kind, EMPTY, PLACE, WORLD, GLANCE
    )
    rounded = (summed + before).to(kind)
    tl.store(total + row * hidden + column, rounded, mask=inside)
    tl.store(normed + row * hidden + column, normed_row(rounded.to(tl.float32), scale, hidden, eps, kind), mask=inside)


@jit(do_not_specialize=["num"])
def _peer_sum_bests(
    values,
    ids,
    highest,
    where,
    value_stride,
    id_stride,
    num,
    box,
    addresses,
    turns,
    turn_stride,
    place_stride,
    cell_stride,
    EMPTY: tl.constexpr,
    PLACE: tl.constexpr,
    WORLD: tl.constexpr,
    GLANCE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    cell = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    at = cell * BLOCK + column
    inside = at < num
    after_earlier(PDL)
    value = tl.load(values + at * value_stride, mask=inside, other=0.0)
    bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    mine = (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - tl.load(ids + at * id_stride, mask=inside, other=0))
    best = _exchanged(
        mine, column, inside, cell, box, addresses, turns, turn_stride, place_stride, cell_stride, None, EMPTY, PLACE, WORLD, GLANCE
    )
    ordered = (best >> 32).to(tl.int32)
    tl.store(highest + at, (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True), mask=inside)
    tl.store(where + at, 0x7FFFFFFF - (best & 0x7FFFFFFF), mask=inside)


@triton.jit
def _exchanged(
    mine,  # bits [BLOCK]
    column,
    inside,
    cell,
    box,
    addresses,
    turns,
    turn_stride,
    place_stride,
    cell_stride,
    kind: tl.constexpr,
    EMPTY: tl.constexpr,
    PLACE: tl.constexpr,
    WORLD: tl.constexpr,
    GLANCE: tl.constexpr,
):
    """Of what all ranks bring to this cell: the sums, float32 [BLOCK], of bits of `kind`; without a kind the highest."""
    num_calls = tl.load(turns + cell)
    at = (num_calls & 1) * turn_stride + cell * cell_stride
    mine = tl.where(mine == EMPTY, tl.zeros_like(mine), mine)
    for place in tl.static_range(WORLD):
        if place != PLACE:
            there = tl.load(addresses + place).to(tl.pointer_type(mine.dtype))
            there = tl.multiple_of(there, 16)
            tl.store(there + at + PLACE * place_stride + column, mine, mask=inside)
    given_up = tl.load(addresses + WORLD).to(tl.pointer_type(tl.int32))
    found = mine if kind is None else tl.zeros(mine.shape, tl.float32)
    for place in tl.static_range(WORLD):
        part = mine
        if place != PLACE:
            here = box + at + place * place_stride + column
            part = tl.load(here, mask=inside, other=0, volatile=True)
            missing = tl.max((part == EMPTY).to(tl.int32), axis=0)
            looks = 0
            while missing > 0:
                part = tl.load(here, mask=inside, other=0, volatile=True)
                missing = tl.max((part == EMPTY).to(tl.int32), axis=0)
                looks += 1
                if looks % GLANCE == 0:
                    missing = tl.where(tl.load(given_up, volatile=True) != 0, 0, missing)
            # every thread has what it read: the maximum was made of all of it
            tl.store(here, tl.full(mine.shape, EMPTY, mine.dtype), mask=inside)
        if kind is None:
            found = tl.maximum(found, part)
        else:
            found += part.to(kind, bitcast=True).to(tl.float32)
    tl.store(turns + cell, num_calls + 1)  # likewise: all threads know num_calls
    return found
