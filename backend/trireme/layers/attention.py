"""Attention over keys and values in pages, with rotary positions: grouped heads, optional biases, q/k norm, gate and window."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from trireme.core.batch import Batch
from trireme.core.step import Regime
from trireme.layers.block import Block, Build, PerToken
from trireme.layers.linear import LastLinear, Linear
from trireme.layers.param import by_heads, by_rows, norm_weight
from trireme.parallel.collectives import picked
from trireme.parallel.context import Context
from trireme.parallel.layout import SUM, lay
from trireme.parallel.seam import Addend
from trireme.parallel.strips import Strips


class Attention(Block):
    """Rows [N, H] -> [N, H]. A window of w shows a query its last w keys, itself included; 0 shows all. Where it is gated, each
    number of a head's result is weighed by the sigmoid of one that the row gives for it."""

    takes, gives = lay(), lay(tp=SUM)

    def __init__(
        self,
        build: Build,
        layer: int,
        *,
        qkv_bias: bool = False,
        o_bias: bool = False,
        qk_norm: bool = False,
        gated: bool = False,
        window: int = 0,
    ):
        super().__init__(f"layers.{layer}.attn")
        spec, dim = build.spec, build.spec.head_dim
        num_heads, num_kv_heads = build.share(spec.num_heads), build.share(spec.num_kv_heads)
        self.norm = norm_weight(build, spec.hidden)
        heads = by_heads("tp", spec.num_heads, spec.num_kv_heads, dim, gated=gated)
        num_queries = num_heads * (1 + gated) * dim
        parts = (slice(num_queries, None), slice(0, num_queries))
        self.qkv = Linear(build, sum(part.whole for part in heads.parts), spec.hidden, heads, bias=qkv_bias, parts=parts)
        self.out = LastLinear(build, spec.hidden, spec.num_heads * dim, by_rows("tp", spec.num_heads, dim), bias=o_bias)
        self.q_norm = norm_weight(build, dim) if qk_norm else None
        self.k_norm = norm_weight(build, dim) if qk_norm else None

        self.keeps = PerToken(num_kv_heads, dim, build.dtype)
        self.window = window
        sizes = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": dim}
        self.rope_write = build.choices("qk_rope_write", **sizes)
        self.attend = build.choices("paged_attention", **sizes, window=window)
        if gated:
            self.sigmoid_mul = build.choices("sigmoid_mul", num_heads=num_heads, head_dim=dim)
        self.context = Context(build.collectives)
        self._q_heads, self._kv_heads = [num_heads] * (1 + gated), [num_kv_heads] * 2
        self._dim, self._eps, self._cos_sin = dim, spec.eps, build.cos_sin

    def within(self, regime: Regime) -> tuple[str, ...]:
        return ("all_gather cp",) if regime.cp else ()

    def forward(self, x: Strips, batch: Batch) -> Iterator[torch.Tensor | Addend]:
        attend = None if x.all_go_on else batch.attend_heads  # of rows that do not go on no queries are needed either
        q, gates = self.write(x, batch, None if attend is None else x.onward)
        rows = (batch.attention if attend is None else attend())[self.window](q, *batch.caches[self.cache])
        for gate in gates:
            rows = self.sigmoid_mul(rows, gate)
        return map(self.out.for_seam, x.split(x.going(rows.flatten(1)) if attend is None else rows.flatten(1)))

    def write(self, x: Strips, batch: Batch, asking: torch.Tensor | slice | None = None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Keep the rows' keys and values; (queries, their gates where there are any), [n, Hq, D] each, of the rows `asking`; None: all."""
        pools, shared = batch.caches[self.cache], batch.shared
        if shared is None and asking is None:
            return self._place(self.qkv.joined(x), [*self._q_heads, *self._kv_heads], batch.positions, batch.pages, pools)
        every = batch if shared is None else shared
        asking = slice(None) if asking is None else asking
        products = self.qkv.parts(x.whole(), (slice(None), asking))
        mine = next(products)  # keys and values as they come: each rank turns and writes those of all
        with self.context.aside() as written:
            kept = mine if shared is None else self.context.all_gather(mine, shared)
            self._place(kept, [*[0] * len(self._q_heads), *self._kv_heads], every.positions, every.pages, pools)
        placed = self._place(next(products), [*self._q_heads, 0, 0], picked(batch.positions, asking), picked(batch.pages, asking), pools)
        written.wait()
        return placed

    def _place(
        self, product: torch.Tensor, heads: list[int], positions: torch.Tensor, pages: torch.Tensor, pools: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Of rows of `heads`: queries, their gates, keys, values, of each kind all or none. As write."""
        q, *gates, k, v = product.view(product.shape[0], sum(heads), self._dim).split_with_sizes(heads, 1)
        return self.rope_write(q, k, v, self._cos_sin, positions, self.q_norm, self.k_norm, self._eps, *pools, pages), gates
