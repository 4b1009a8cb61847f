"""Attention over keys and values in pages, with rotary positions: grouped heads, optional biases, q/k norm, gate and window."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from trireme.core.batch import Batch
from trireme.core.step import Regime
from trireme.layers.block import Block, Build, PerToken
from trireme.layers.linear import Linear
from trireme.layers.param import by_heads, by_rows, norm_weight
from trireme.parallel.context import Context
from trireme.parallel.layout import SUM, lay


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
        self.qkv = Linear(build, sum(part.whole for part in heads.parts), spec.hidden, heads, bias=qkv_bias)
        self.out = Linear(build, spec.hidden, spec.num_heads * dim, by_rows("tp", spec.num_heads, dim), bias=o_bias)
        self.q_norm = norm_weight(build, dim) if qk_norm else None
        self.k_norm = norm_weight(build, dim) if qk_norm else None

        self.keeps = PerToken(num_kv_heads, dim, build.dtype)
        self.window = window
        sizes = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": dim}
        self.rope_write = build.choices("qk_rope_write", **sizes)
        self.attend = build.choices("paged_attention", **sizes, window=window)
        self.share = Context(build.collectives.along("cp"))
        self._split, self._dim, self._eps = [*[num_heads] * (1 + gated), num_kv_heads, num_kv_heads], dim, spec.eps
        self._cos_sin = build.cos_sin

    def within(self, regime: Regime) -> tuple[str, ...]:
        return ("all_gather cp",) if regime.cp else ()

    def forward(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        q, gates = self.write(x, batch)
        rows = batch.attention[self.window](q, *batch.caches[self.cache])
        for gate in gates:
            rows = rows * F.sigmoid(gate)
        return self.out(rows.view(x.shape[0], -1))

    def write(self, x: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Keep the rows' keys and values; (queries, their gates where there are any), [N, Hq, D] each."""
        keys, values = batch.caches[self.cache]
        q, *gates, k, v = self.qkv(x).view(x.shape[0], -1, self._dim).split(self._split, dim=1)
        q = self.rope_write(
            q, k, v, self._cos_sin, batch.positions, self.q_norm, self.k_norm, self._eps, keys, values, batch.pages
        )  # fmt: skip
        self.share((keys, values), batch.pages, batch.shared)
        return q, gates
