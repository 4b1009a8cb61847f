"""paged_attention in the Triton language, prefill and decode in one kernel: what a GPU uses where FlashInfer is not there.

One program holds a block of an item's queries, for all query heads of one kv head, and walks over the item's pages with
a running softmax. Long decodes are not split over programs.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from trireme_kernels.blocks import next_power_of_2
from trireme_kernels.case import Case
from trireme_kernels.jit import jit
from trireme_kernels.paged_attention.groups import cut_queries
from trireme_kernels.paged_attention.op import PAGE, CapturedDecode, PagedAttention
from trireme_kernels.upload import upload

_DECODE_ROWS, _PREFILL_ROWS, _KEYS = 16, 64, 64  # of one tile: (query, head) rows, and keys; a product needs 16 at least


def fits(case: Case) -> str | None:
    if case.sizes["head_dim"] > 256:
        return f"head_dim={case.sizes['head_dim']} is over 256"
    if case.sizes["num_heads"] // case.sizes["num_kv_heads"] > _PREFILL_ROWS:
        return f"more than {_PREFILL_ROWS} query heads share a key/value head"
    return None


def build(case: Case) -> PagedAttention:
    return Tiled(case)


class _Plan(NamedTuple):
    page_table: Tensor  # int32 [B, P]
    blocks: Tensor  # int32 [4, blocks]: item, first row in q, queries, kv length up to the last query
    tile_rows: int


class Tiled:
    def __init__(self, case: Case):
        self.device, self.window = case.device, case.sizes.get("window", 0)
        self.shared = case.sizes["num_heads"] // case.sizes["num_kv_heads"]

    def plan(self, query_lens: np.ndarray, kv_lens: np.ndarray, page_table: np.ndarray | Tensor) -> _Plan:
        rows = _DECODE_ROWS if np.max(query_lens, initial=0) <= 1 else _PREFILL_ROWS
        rows = max(rows, next_power_of_2(self.shared))
        blocks = np.stack(cut_queries(np.asarray(query_lens), np.asarray(kv_lens), rows // self.shared)).astype(np.int32)
        return _Plan(upload(np.asarray(page_table, np.int32), self.device), upload(blocks, self.device), rows)

    def run(self, q: Tensor, k_pool: Tensor, v_pool: Tensor, plan: _Plan, out: Tensor | None = None) -> Tensor:
        head_dim, num_kv_heads = q.shape[2], k_pool.shape[1]
        assert q.stride(2) == k_pool.stride(3) == v_pool.stride(3) == 1, "heads are contiguous"
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
        num_blocks = plan.blocks.shape[1]
        if num_blocks:
            _paged_attention_blocks[(num_blocks, num_kv_heads)](
                q,
                k_pool,
                v_pool,
                out,
                plan.page_table,
                plan.blocks,
                num_blocks,
                plan.page_table.shape[1],
                head_dim**-0.5,
                *q.stride()[:2],
                *k_pool.stride()[:3],
                *v_pool.stride()[:3],
                *out.stride()[:2],
                PAGE=PAGE,
                SHARED=self.shared,
                WINDOW=self.window,
                D=head_dim,
                BLOCK_D=max(16, next_power_of_2(head_dim)),
                ROWS=plan.tile_rows,
                KEYS=_KEYS,
                WIDEN=not q.is_cuda,  # the interpreter multiplies bfloat16 matrices wrongly: it holds them as integers
            )
        return out

    def captured(self, batch_size: int, max_pages: int) -> CapturedDecode:
        return _Captured(self, batch_size, max_pages)


class _Captured:
    def __init__(self, op: Tiled, batch_size: int, max_pages: int):
        self._op = op
        one = np.ones(batch_size, np.int32)
        self._plan = op.plan(one, one, np.zeros((batch_size, max_pages), np.int32))

    def plan(self, kv_lens: np.ndarray, page_table: np.ndarray | Tensor) -> None:
        num_items, width = page_table.shape
        lens = np.ones(len(self._plan.page_table), np.int32)
        lens[:num_items] = kv_lens
        fresh = self._op.plan(np.ones_like(lens), lens, page_table)
        self._plan.blocks.copy_(fresh.blocks)
        self._plan.page_table[:num_items, :width].copy_(fresh.page_table)

    def run(self, q: Tensor, k_pool: Tensor, v_pool: Tensor) -> Tensor:
        return self._op.run(q, k_pool, v_pool, self._plan)


@jit(do_not_specialize=["num_blocks", "table_width"])
def _paged_attention_blocks(
    q, k_pool, v_pool, out, page_table, blocks, num_blocks, table_width, scale,
    q_row, q_head, k_page, k_head, k_offset, v_page, v_head, v_offset, out_row, out_head,
    PAGE: tl.constexpr, SHARED: tl.constexpr, WINDOW: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    block, kv_head = tl.program_id(0), tl.program_id(1)
    item = tl.load(blocks + block)
    first_row = tl.load(blocks + num_blocks + block).to(tl.int64)
    count = tl.load(blocks + 2 * num_blocks + block)
    end = tl.load(blocks + 3 * num_blocks + block)

    line = tl.arange(0, ROWS)  # query by query, its heads side by side
    query, head = line // SHARED, kv_head * SHARED + line % SHARED
    place = end - count + query
    column = tl.arange(0, BLOCK_D)
    real = (query < count)[:, None] & (column < D)[None, :]
    tile = tl.load(q + (first_row + query)[:, None] * q_row + head[:, None] * q_head + column[None, :], mask=real, other=0.0)
    if WIDEN:
        tile = tile.to(tl.float32)

    most = tl.full([ROWS], -1.0e30, tl.float32)  # not -inf: a row may see nothing of its first keys
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, BLOCK_D], tl.float32)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(end - count + 1 - WINDOW, 0) // KEYS * KEYS
    for start in range(begin, end, KEYS):
        key = start + tl.arange(0, KEYS)
        known = key < end
        page = tl.load(page_table + item.to(tl.int64) * table_width + key // PAGE, mask=known, other=0).to(tl.int64)
        held = known[:, None] & (column < D)[None, :]
        offset = key % PAGE
        k = tl.load(k_pool + (page * k_page + kv_head * k_head + offset * k_offset)[:, None] + column[None, :], mask=held, other=0.0)
        v = tl.load(v_pool + (page * v_page + kv_head * v_head + offset * v_offset)[:, None] + column[None, :], mask=held, other=0.0)
        if WIDEN:
            k, v = k.to(tl.float32), v.to(tl.float32)
        scores = tl.dot(tile, tl.trans(k), input_precision="ieee") * scale
        seen = key[None, :] <= place[:, None]
        if WINDOW > 0:
            seen = seen & (key[None, :] > place[:, None] - WINDOW)
        scores = tl.where(seen, scores, -1.0e30)
        peak = tl.maximum(most, tl.max(scores, axis=1))
        weight = tl.where(seen, tl.exp(scores - peak[:, None]), 0.0)
        fade = tl.exp(most - peak)
        total = total * fade + tl.sum(weight, axis=1)
        mixed = mixed * fade[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        most = peak
    result = (mixed / tl.maximum(total, 1.0e-30)[:, None]).to(out.dtype.element_ty)
    tl.store(out + (first_row + query)[:, None] * out_row + head[:, None] * out_head + column[None, :], result, mask=real)
