"""gated_delta in the Triton language: two launches, whatever the items are. Notation and algebra are chunked's.

The first has a program for each chunk and value head, and makes of its rows what does not depend on the state before them. The
second has one for each item, value head and block of value dims, which keeps its part of the state in registers from chunk to
chunk:

    learnt = U - W S;   o = (q S) scaled + scores learnt;   S = decay S + k^T (learnt scaled)

Rows of queries and keys are normed by scaling what is made of them, so that they are multiplied as they came.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from trireme_kernels.blocks import cdiv, next_power_of_2
from trireme_kernels.case import Case
from trireme_kernels.gated_delta.op import GatedDelta
from trireme_kernels.jit import jit
from trireme_kernels.upload import upload

_ROWS, _BLOCK = 64, 16  # of a chunk; of its triangle, what is solved row by row
_VALUES = 64  # of a program that carries states
_MOST_DIM, _MOST_WIDE_DIM = 256, 64


def fits(case: Case) -> str | None:
    most = _MOST_WIDE_DIM if case.dtype == torch.float32 else _MOST_DIM
    for name in ("key_dim", "value_dim"):
        if case.sizes[name] > most:
            return f"{name}={case.sizes[name]} is over {most}, more than fits in shared memory"
    return None


def build(case: Case) -> GatedDelta:
    return Tiled(case)


class _Plan(NamedTuple):
    chunks: Tensor  # int32 [2, C]: each one's first row, and its rows
    items: Tensor  # int32 [2, I]: each one's first chunk, and its chunks


class Tiled:
    def __init__(self, case: Case):
        self.device = case.device

    def plan(self, counts: np.ndarray) -> _Plan:
        counts = np.asarray(counts, np.int64)
        num_chunks = -(-counts // _ROWS)
        first = np.cumsum(num_chunks) - num_chunks
        item = np.repeat(np.arange(len(counts)), num_chunks)
        begin = (np.arange(len(item)) - first[item]) * _ROWS
        chunks = np.stack(((np.cumsum(counts) - counts)[item] + begin, np.minimum(_ROWS, counts[item] - begin)))
        return _Plan(upload(chunks.astype(np.int32), self.device), upload(np.stack((first, num_chunks)).astype(np.int32), self.device))

    def run(
        self,
        q: Tensor,  # [N, Hk, Dk]
        k: Tensor,  # [N, Hk, Dk]
        v: Tensor,  # [N, Hv, Dv]
        g: Tensor,  # [N, Hv]
        beta: Tensor,  # [N, Hv]
        initial: Tensor,  # [I, Hv, Dk, Dv]
        plan: _Plan,
    ) -> tuple[Tensor, Tensor]:  # [N, Hv, Dv], [I, Hv, Dk, Dv]
        assert q.stride() == k.stride() and q.stride(2) == v.stride(2) == g.stride(1) == beta.stride(1) == 1, "heads are contiguous"
        (_, num_chunks), (num_items, num_heads, key_dim, value_dim) = plan.chunks.shape, initial.shape
        initial = initial.contiguous()
        out = torch.empty(v.shape, dtype=q.dtype, device=q.device)
        final = torch.empty_like(initial)
        if not num_items:
            return out, final
        rows = num_chunks, num_heads, _ROWS
        u, w, scores = (torch.empty(*rows, columns, dtype=q.dtype, device=q.device) for columns in (value_dim, key_dim, _ROWS))
        scales = torch.empty(3, *rows, device=q.device)  # of queries, of keys until the chunk's end, of the state since its begin
        sizes = {
            "SHARED": num_heads // q.shape[1],
            "HEADS": num_heads,
            "DK": key_dim,
            "DV": value_dim,
            "KEYS": max(16, next_power_of_2(key_dim)),
            "ROWS": _ROWS,
            "PRECISION": "ieee" if q.dtype == torch.float32 or not q.is_cuda else "tf32",
        }
        values = max(16, next_power_of_2(value_dim))
        if num_chunks:
            _gated_delta_chunk[(num_chunks, num_heads)](
                q,
                k,
                v,
                g,
                beta,
                u,
                w,
                scores,
                scales,
                plan.chunks,
                num_chunks,
                *q.stride()[:2],
                *v.stride()[:2],
                g.stride(0),
                beta.stride(0),
                **sizes,
                VALUES=min(_VALUES, values),
                BLOCK=_BLOCK,
                num_warps=4,
            )
        _gated_delta_carry[(cdiv(value_dim, _VALUES), num_heads, num_items)](
            q,
            k,
            u,
            w,
            scores,
            scales,
            initial,
            final,
            out,
            plan.chunks,
            plan.items,
            num_chunks,
            num_items,
            *q.stride()[:2],
            **sizes,
            VALUES=min(_VALUES, values),
            num_warps=4,
            num_stages=2,
        )
        return out, final


@jit(do_not_specialize=["num_chunks"])
def _gated_delta_chunk(
    q, k, v, g, beta, u, w, scores, scales, chunks, num_chunks, key_row, key_head, value_row, value_head, g_row, beta_row,
    SHARED: tl.constexpr, HEADS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr,
    PRECISION: tl.constexpr, VALUES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk, head = tl.program_id(0), tl.program_id(1)
    begin, count = tl.load(chunks + chunk).to(tl.int64), tl.load(chunks + num_chunks + chunk)
    row, key = tl.arange(0, ROWS), tl.arange(0, KEYS)
    line, here = begin + row, row < count
    kind = u.dtype.element_ty
    total = tl.cumsum(tl.load(g + line * g_row + head, mask=here, other=0.0).to(tl.float32), axis=0)
    learning = tl.load(beta + line * beta_row + head, mask=here, other=0.0).to(tl.float32)
    end = tl.sum(tl.where(row == ROWS - 1, total, 0.0))
    place = (line * key_row)[:, None] + head // SHARED * key_head + key[None, :]
    real = here[:, None] & (key < DK)[None, :]
    keys, queries = tl.load(k + place, mask=real, other=0.0), tl.load(q + place, mask=real, other=0.0)
    wide_keys, wide_queries = keys.to(tl.float32), queries.to(tl.float32)
    key_scale = tl.rsqrt(tl.sum(wide_keys * wide_keys, axis=1) + 1e-6)
    query_scale = tl.rsqrt(tl.sum(wide_queries * wide_queries, axis=1) + 1e-6) * DK**-0.5

    at = (chunk.to(tl.int64) * HEADS + head) * ROWS + row
    every = num_chunks.to(tl.int64) * HEADS * ROWS
    tl.store(scales + at, query_scale * tl.exp(total))
    tl.store(scales + every + at, key_scale * tl.exp(end - total))
    tl.store(scales + 2 * every + at, tl.exp(total))

    earlier, same = row[:, None] > row[None, :], row[:, None] == row[None, :]
    decay = tl.exp(tl.where(earlier | same, total[:, None] - total[None, :], float("-inf")))
    alike = _product(queries, tl.trans(keys), PRECISION) * query_scale[:, None] * key_scale[None, :] * decay
    tl.store(scores + at[:, None] * ROWS + row[None, :], alike.to(kind))
    system = _product(keys, tl.trans(keys), PRECISION) * (key_scale * learning)[:, None] * key_scale[None, :]
    solved = _inverse(tl.where(earlier, system * decay, 0.0), ROWS, BLOCK, PRECISION).to(kind)

    known = (wide_keys * (key_scale * learning * tl.exp(total))[:, None]).to(kind)
    target = w + at[:, None] * DK + key[None, :]
    tl.store(target, _product(solved, known, PRECISION).to(kind), mask=(key < DK)[None, :])
    for start in range(0, DV, VALUES):
        value = start + tl.arange(0, VALUES)
        inside = (value < DV)[None, :]
        source = v + (line * value_row)[:, None] + head * value_head + value[None, :]
        learnt = tl.load(source, mask=here[:, None] & inside, other=0.0).to(tl.float32) * learning[:, None]
        tl.store(u + at[:, None] * DV + value[None, :], _product(solved, learnt.to(kind), PRECISION).to(kind), mask=inside)


@triton.jit
def _product(left, right, PRECISION: tl.constexpr):
    if PRECISION == "ieee":  # the interpreter multiplies bfloat16 matrices wrongly: it holds them as integers
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision=PRECISION)


@triton.jit
def _inverse(system, ROWS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """Of ones on the diagonal and `system` below it. Blocks on the diagonal are solved side by side, row by row; then two
    neighbours, and two such pairs, make one: of (a 0; c b) the inverse is (a' 0; -b'ca' b')."""
    NUM: tl.constexpr = ROWS // BLOCK
    block, place = tl.arange(0, NUM), tl.arange(0, BLOCK)
    diagonal = (block[:, None] == block[None, :])[:, None, :, None]
    small = tl.sum(tl.where(diagonal, tl.reshape(system, [NUM, BLOCK, NUM, BLOCK]), 0.0), axis=2)
    solved = -small
    for row in range(2, BLOCK):
        now = (place == row)[None, :, None]
        line = -tl.sum(tl.where(now, small, 0.0), axis=1)
        line += tl.sum(line[:, :, None] * solved, axis=1)
        solved = tl.where(now, line[:, None, :], solved)
    solved = tl.where((place[:, None] == place[None, :])[None, :, :], 1.0, solved)
    whole = tl.reshape(tl.where(diagonal, solved[:, :, None, :], 0.0), [ROWS, ROWS])
    row = tl.arange(0, ROWS)
    whole = _joined(whole, system, row, BLOCK, PRECISION)
    return _joined(whole, system, row, 2 * BLOCK, PRECISION)


@triton.jit
def _joined(whole, system, row, SPAN: tl.constexpr, PRECISION: tl.constexpr):
    """Inverses of blocks of SPAN rows to inverses of pairs of them."""
    between = (row[:, None] // SPAN == row[None, :] // SPAN + 1) & (row[:, None] // (2 * SPAN) == row[None, :] // (2 * SPAN))
    right = _product(tl.where(between, system, 0.0), whole, PRECISION)
    return whole - _product(whole, right, PRECISION)


@jit(do_not_specialize=["num_chunks", "num_items"])
def _gated_delta_carry(
    q, k, u, w, scores, scales, initial, final, out, chunks, items, num_chunks, num_items, key_row, key_head,
    SHARED: tl.constexpr, HEADS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr,
    PRECISION: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    head, item = tl.program_id(1), tl.program_id(2)
    row, key, value = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    real_key, real_value = key < DK, value < DV
    kind = out.dtype.element_ty
    place = (item.to(tl.int64) * HEADS + head) * (DK * DV) + key[:, None] * DV + value[None, :]
    real = real_key[:, None] & real_value[None, :]
    state = tl.load(initial + place, mask=real, other=0.0)
    first, number = tl.load(items + item), tl.load(items + num_items + item)
    every = num_chunks.to(tl.int64) * HEADS * ROWS
    for chunk in range(first, first + number):
        begin, count = tl.load(chunks + chunk).to(tl.int64), tl.load(chunks + num_chunks + chunk)
        at = (tl.zeros([ROWS], tl.int64) + chunk) * (HEADS * ROWS) + head * ROWS + row
        here = row < count
        source = ((begin + row) * key_row)[:, None] + head // SHARED * key_head + key[None, :]
        mask = here[:, None] & real_key[None, :]
        narrow = state.to(kind)
        before = tl.load(w + at[:, None] * DK + key[None, :], mask=real_key[None, :], other=0.0)
        learnt = tl.load(u + at[:, None] * DV + value[None, :], mask=real_value[None, :], other=0.0).to(tl.float32)
        learnt -= _product(before, narrow, PRECISION)
        result = _product(tl.load(q + source, mask=mask, other=0.0), narrow, PRECISION) * tl.load(scales + at)[:, None]
        result += _product(tl.load(scores + at[:, None] * ROWS + row[None, :]), learnt.to(kind), PRECISION)
        target = out + ((begin + row) * HEADS + head)[:, None] * DV + value[None, :]
        tl.store(target, result.to(kind), mask=here[:, None] & real_value[None, :])
        kept = tl.load(scales + 2 * every + (tl.zeros([1], tl.int64) + chunk) * (HEADS * ROWS) + head * ROWS + ROWS - 1)
        scaled = (learnt * tl.load(scales + every + at)[:, None]).to(kind)
        keys = tl.load(k + source, mask=mask, other=0.0)
        state = state * kept[None, :] + _product(tl.trans(keys), scaled, PRECISION)
    tl.store(final + place, state, mask=real)
