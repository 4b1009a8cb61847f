"""sample in the Triton language: nothing is sorted, nothing is decided on the host. The noise is noise.py's, made where it is used.

Two launches. `_sample_draw` gives each row that no filter joins to several programs, each the best of its columns. `_sample_settle` gives
each row one program: it takes the best of those; or it finds what a filtered row's filters leave, and the best of that.

Filters drop a tail of the sorted row, so all that is needed is the number where the tail begins. It is found by narrowing:
floats are integers in the same order, and each walk over the row asks 15 numbers between the bounds at once how much of the
row lies above them, until bounds meet (8 walks at most). Weights are summed as integers, 1 = 2**40: exactly, so no order
of columns or blocks changes what survives.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trireme_kernels.blocks import cdiv, next_power_of_2
from trireme_kernels.case import Case
from trireme_kernels.jit import jit
from trireme_kernels.sample.op import Sample

_BLOCK = 1024  # columns at a time
_PROGRAMS = 1024  # that `_sample_draw` uses where the rows are few: several for each multiprocessor


def fits(case: Case) -> str | None:
    return None


def build(case: Case) -> Sample:
    return sample


def sample(
    logits: Tensor,  # [n, C]
    temperature: Tensor,  # [n]
    top_k: Tensor,  # [n]
    top_p: Tensor,  # [n]
    min_p: Tensor,  # [n]
    seeds: Tensor,  # [n]
    positions: Tensor,  # [n]
    ids: Tensor | None = None,  # [1 or n, C]
) -> tuple[Tensor, Tensor]:  # [n], [n]
    num_rows, width = logits.shape
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    scores = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    if not num_rows:
        return tokens, scores
    assert logits.stride(1) == 1 and (ids is None or ids.stride(1) == 1), "rows are contiguous"
    num_blocks = cdiv(width, _BLOCK)
    num_parts = cdiv(num_blocks, max(1, num_blocks * num_rows // _PROGRAMS))
    part = cdiv(num_blocks, num_parts) * _BLOCK
    best = torch.empty(num_rows, num_parts, dtype=torch.float32, device=logits.device)
    where = torch.empty(num_rows, num_parts, dtype=torch.int32, device=logits.device)
    row = logits, temperature, top_k, top_p, min_p, seeds, positions, logits if ids is None else ids, best, where
    sizes = width, num_parts, logits.stride(0), 0 if ids is None or len(ids) == 1 else ids.stride(0)
    _sample_draw[(num_rows, num_parts)](*row, *sizes, part, NAMED=ids is not None, BLOCK=_BLOCK)
    parts = next_power_of_2(num_blocks)  # the most there can be, so that all batches share one compiled kernel
    _sample_settle[(num_rows,)](*row, tokens, scores, *sizes, NAMED=ids is not None, BLOCK=_BLOCK, PARTS=parts, num_warps=8)
    return tokens, scores


@jit(do_not_specialize=["num_parts", "part"])
def _sample_draw(
    logits, temperature, top_k, top_p, min_p, seeds, positions, ids, best, where,
    width, num_parts, logits_row, ids_row, part, NAMED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, nth = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heat = tl.load(temperature + row).to(tl.float32)
    if (heat > 0) & _filtered(top_k, top_p, min_p, row):
        return
    key = _row_key(tl.load(seeds + row), tl.load(positions + row))
    line, names = logits + row * logits_row, ids + row * ids_row
    high, place = tl.full([BLOCK], float("-inf"), tl.float32), tl.zeros([BLOCK], tl.int32) + nth * part
    for start in range(nth * part, tl.minimum((nth + 1) * part, width), BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        score = tl.load(line + column, mask=inside, other=float("-inf"))
        if heat > 0:
            token = tl.load(names + column, mask=inside, other=0).to(tl.int32) if NAMED else column
            score = _scaled(score, heat) + _gumbel(key, token)
        better = inside & (score > high)
        high, place = tl.where(better, score, high), tl.where(better, column, place)
    top, column = _best(high, place)
    tl.store(best + row * num_parts + nth, top)
    tl.store(where + row * num_parts + nth, column)


@jit(do_not_specialize=["num_parts"])
def _sample_settle(
    logits, temperature, top_k, top_p, min_p, seeds, positions, ids, best, where, tokens, scores,
    width, num_parts, logits_row, ids_row, NAMED: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    heat = tl.load(temperature + row).to(tl.float32)
    names = ids + row * ids_row
    if (heat > 0) & _filtered(top_k, top_p, min_p, row):
        key = _row_key(tl.load(seeds + row), tl.load(positions + row))
        line = logits + row * logits_row
        top, column = _draw_filtered(
            line, names, heat, tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row), key, width, NAMED, BLOCK
        )
    else:
        nth = tl.arange(0, PARTS)
        high = tl.load(best + row * num_parts + nth, mask=nth < num_parts, other=float("-inf"))
        top, column = _best(high, tl.load(where + row * num_parts + nth, mask=nth < num_parts, other=0x7FFFFFFF))
    tl.store(scores + row, top)
    tl.store(tokens + row, tl.load(names + column) if NAMED else column.to(tl.int64))


@triton.jit
def _draw_filtered(line, names, heat, top_k, top_p, min_p, key, width, NAMED: tl.constexpr, BLOCK: tl.constexpr):
    """(score, column) of the best of a row's survivors."""
    lane = tl.arange(0, BLOCK)
    high = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, width, BLOCK):
        high = tl.maximum(high, tl.load(line + start + lane, mask=start + lane < width, other=float("-inf")))
    peak = tl.max(_scaled(high, heat), axis=0)
    top = _order(peak)
    least = _order(tl.full([], float("-inf"), tl.float32))
    if min_p > 0:
        least = tl.maximum(least, _order(peak + tl.log(min_p.to(tl.float32))))
    if top_k > 0:
        least = _first_within(line, heat, peak, least, top, top_k.to(tl.int64), width, False, BLOCK)
    spare = tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64)  # how many of the equals at the bound survive: the lower ones
    if top_p < 1:
        mass = _above(line, heat, peak, least - 1, width, BLOCK)
        target = tl.maximum(tl.ceil(top_p.to(tl.float64) * mass.to(tl.float64)).to(tl.int64), 1)
        least = _first_within(line, heat, peak, least, top, target, width, True, BLOCK)
        weight = _weight(_value(least), peak)
        if weight > 0:
            spare = tl.cdiv(target - _above(line, heat, peak, least, width, BLOCK), weight)

    high, place = tl.full([BLOCK], float("-inf"), tl.float32), tl.zeros([BLOCK], tl.int32)
    equals = tl.zeros([], tl.int64)
    for start in range(0, width, BLOCK):
        column = start + lane
        inside = column < width
        value = _scaled(tl.load(line + column, mask=inside, other=float("-inf")), heat)
        rank = _order(value)
        equal = inside & (rank == least)
        nth = equals + tl.cumsum(equal.to(tl.int64), axis=0)  # from 1
        equals += tl.sum(equal.to(tl.int64), axis=0)
        survives = inside & ((rank > least) | (equal & (nth <= spare)))
        token = tl.load(names + column, mask=inside, other=0).to(tl.int32) if NAMED else column
        score = value + _gumbel(key, token)
        better = survives & (score > high)
        high, place = tl.where(better, score, high), tl.where(better, column, place)
    return _best(high, place)


@triton.jit
def _first_within(line, heat, peak, low, high, target, width, WEIGHED: tl.constexpr, BLOCK: tl.constexpr):
    """The least number from low to high such that less than `target` lies above it: how many columns, or what weight."""
    low, high = low.to(tl.int64), high.to(tl.int64)
    while low < high:
        step = (high - low + 15) // 16
        bound = tl.minimum(low + tl.arange(0, 16) * step, high)
        above = tl.zeros([16, BLOCK // 4], tl.int64)  # each thread sums what it loads; they meet once a walk
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            value = _scaled(tl.load(line + column, mask=column < width, other=float("-inf")), heat)
            part = _weight(value, peak) if WEIGHED else (column < width).to(tl.int64)
            over = tl.reshape(_order(value), [1, BLOCK // 4, 4]) > bound.to(tl.int32)[:, None, None]
            above += tl.sum(tl.where(over, tl.reshape(part, [1, BLOCK // 4, 4]), 0), axis=2)
        within = tl.sum(above, axis=1) < target
        high = tl.min(tl.where(within, bound, high), axis=0)
        low = tl.maximum(low, tl.max(tl.where(within, low, bound + 1), axis=0))
    return high.to(tl.int32)


@triton.jit
def _above(line, heat, peak, bound, width, BLOCK: tl.constexpr):
    """The weight of all columns above a number."""
    total = tl.zeros([BLOCK], tl.int64)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = _scaled(tl.load(line + column, mask=column < width, other=float("-inf")), heat)
        total += tl.where(_order(value) > bound, _weight(value, peak), 0)
    return tl.sum(total, axis=0)


@triton.jit
def _filtered(top_k, top_p, min_p, row):
    return (tl.load(top_k + row) > 0) | (tl.load(top_p + row) < 1) | (tl.load(min_p + row) > 0)


@triton.jit
def _scaled(logit, heat):
    return tl.div_rn(logit, heat + tl.zeros_like(logit))


@triton.jit
def _weight(value, peak):
    """exp(value - peak) in units of 2**-40; 2**17 columns of the highest still fit."""
    return (tl.exp(value - peak) * 1099511627776.0).to(tl.int64)


@triton.jit
def _order(value):
    """Floats as integers of the same order (-0.0 as 0.0)."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, -2147483648 - bits, bits)


@triton.jit
def _value(order):
    return tl.where(order < 0, -2147483648 - order, order).to(tl.float32, bitcast=True)


@triton.jit
def _best(high, place):
    """The highest, and the lowest of the places that have it."""
    top = tl.max(high, axis=0)
    return top, tl.min(tl.where(high == top, place, 0x7FFFFFFF), axis=0)


@triton.jit
def _row_key(seed, position):
    return _mix(_mix(seed.to(tl.uint64, bitcast=True)) ^ position.to(tl.uint64, bitcast=True))


@triton.jit
def _mix(x):
    """As in noise.py."""
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _gumbel(key, token):
    """As in noise.py. log1p is made of log: the factor mends what 1 - uniform lost to rounding."""
    bits = (token.to(tl.uint32) * 0x9E3779B9) ^ key.to(tl.uint32)
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B + (key >> 32).to(tl.uint32)
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35
    bits = (bits ^ (bits >> 16)) >> 1
    uniform = tl.minimum((bits.to(tl.int32).to(tl.float32) + 0.5) * 4.656612873077393e-10, 0.9999999403953552)
    rest = 1.0 - uniform
    exponential = tl.where(rest == 1.0, uniform, tl.log(rest) * uniform / tl.minimum(rest - 1.0, -1e-30))
    return -tl.log(exponential)
