"""paged_attention in PyTorch; its definition. Cutting a step into groups of like lengths is in groups.py.

Each group is dense: its pages are gathered to [Hk, n, S, D] and the query heads that share a kv head are folded into its
rows [Hk, n, G * L, D], so keys are read once for all of them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trireme_kernels.case import Case
from trireme_kernels.paged_attention.groups import Cost, Group, group
from trireme_kernels.paged_attention.op import PagedAttention


def fits(case: Case) -> str | None:
    return None


def build(case: Case) -> PagedAttention:
    return Reference(case)


class _Dense(NamedTuple):
    """A group's tensors: n items of L queries over S keys."""

    num_items: int  # n
    num_keys: int  # S
    pages: Tensor | slice  # int64 [n * pages of an item], or where a lone item's pages are neighbours, the run of them
    bias: Tensor | None  # [n, G * L, S], [n, 1, S] where L is 1; 0 or -inf; None where every query sees every key


class _Plan(NamedTuple):
    order: Tensor  # int64 [padded rows]: rows of q, group after group
    sizes: list[int]  # padded rows of each group
    groups: list[_Dense]
    back: Tensor  # int64 [T]: where each row of q went


class Reference:
    def __init__(self, case: Case):
        sizes = case.sizes
        self.dtype, self.device = case.dtype, case.device
        self.num_kv_heads, self.head_dim, self.window = sizes["num_kv_heads"], sizes["head_dim"], sizes.get("window", 0)
        self.shared, rest = divmod(sizes["num_heads"], self.num_kv_heads)  # G: query heads of one kv head
        assert rest == 0, "query heads are shared out evenly"
        self.cost = Cost(
            key_bytes=2 * self.num_kv_heads * self.head_dim * case.dtype.itemsize,
            score_bytes=sizes["num_heads"] * 4,
        )

    def plan(self, query_lens: np.ndarray, kv_lens: np.ndarray, page_table: np.ndarray | Tensor) -> _Plan:
        groups = group(np.asarray(query_lens), np.asarray(kv_lens), np.asarray(page_table), self.window, self.cost)
        order = np.concatenate([group.rows.ravel() for group in groups]) if groups else np.empty(0, np.int64)
        back = np.empty(int(np.sum(query_lens)), np.int64)
        back[order] = np.arange(len(order))  # a padded row repeats a row of its item, so any of its copies will do
        return _Plan(
            self._tensor(order), [group.rows.size for group in groups], [self._dense(group) for group in groups], self._tensor(back)
        )

    def _dense(self, group: Group) -> _Dense:
        num_items, num_queries = group.rows.shape
        pages = group.pages.ravel()
        run = num_items == 1 and bool((np.diff(pages) == 1).all())
        key = np.arange(group.num_keys)
        seen = key <= group.places[:, :, None]  # [n, L, S]
        if self.window:
            seen &= key > group.places[:, :, None] - self.window
        bias = None
        if not seen.all():
            bias = torch.zeros(seen.shape, dtype=self.dtype).masked_fill_(torch.from_numpy(~seen), -torch.inf)
            bias = bias.repeat(1, self.shared if num_queries > 1 else 1, 1).to(self.device)
        return _Dense(num_items, group.num_keys, slice(int(pages[0]), int(pages[-1]) + 1) if run else self._tensor(pages), bias)

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)).to(self.device)

    def run(self, q: Tensor, k_pool: Tensor, v_pool: Tensor, plan: _Plan, out: Tensor | None = None) -> Tensor:
        if not plan.groups:
            return torch.empty_like(q) if out is None else out
        rows = q.index_select(0, plan.order).split(plan.sizes)
        outs = [self._attend(part, k_pool, v_pool, dense) for part, dense in zip(rows, plan.groups, strict=True)]
        return torch.index_select(torch.cat(outs), 0, plan.back, out=out)

    def captured(self, batch_size: int, max_pages: int) -> None:
        """None: groups of like lengths are other launches at every step."""

    def _attend(self, q: Tensor, k_pool: Tensor, v_pool: Tensor, dense: _Dense) -> Tensor:  # [n * L, Hq, D] -> [n * L, Hq, D]
        n, heads, shared = dense.num_items, self.num_kv_heads, self.shared
        q = q.view(n, -1, heads, shared, self.head_dim).permute(2, 0, 3, 1, 4)  # [Hk, n, G, L, D]
        num_queries = q.shape[3]
        q = q.reshape(heads, n, shared * num_queries, self.head_dim)
        k, v = self._gather(k_pool, dense), self._gather(v_pool, dense)
        attend = _one_query if num_queries == 1 and q.dtype == torch.float32 else F.scaled_dot_product_attention
        out = attend(q, k, v, dense.bias)
        out = out.view(heads, n, shared, num_queries, self.head_dim).permute(1, 3, 0, 2, 4)
        return out.reshape(n * num_queries, heads * shared, self.head_dim)

    def _gather(self, pool: Tensor, dense: _Dense) -> Tensor:  # [pages, Hk, PAGE, D] -> [Hk, n, S, D]
        pool = pool.transpose(0, 1)
        pool = pool[:, dense.pages] if isinstance(dense.pages, slice) else pool.index_select(1, dense.pages)
        return pool.reshape(self.num_kv_heads, dense.num_items, -1, self.head_dim)[:, :, : dense.num_keys]


def _one_query(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:  # [Hk, n, G, D], [Hk, n, S, D] twice, [n, 1, S]
    """scaled_dot_product_attention for items of one query. Two batched products are faster on a CPU: by a tenth on one
    thread, by up to half on two (in float32; they would round scores in shorter types)."""
    scores = torch.bmm((q * q.shape[-1] ** -0.5).flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).unflatten(0, q.shape[:2])
    if bias is not None:
        scores += bias
    return torch.bmm(scores.softmax(dim=-1).flatten(0, 1), v.flatten(0, 1))
