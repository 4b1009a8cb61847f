"""Gated delta layers: a state for each request in place of keys and values. The recurrence itself and the convolution before it
are ops; what ranks along cp tell one another of their states is parallel/affine's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from trireme.core.batch import Batch, Items
from trireme.core.step import Regime
from trireme.layers.block import Block, Build, PerRequest
from trireme.layers.linear import LastLinear, Linear
from trireme.layers.param import Param, by_groups, by_rows, norm_weight
from trireme.parallel.affine import Pieces, Scan, corrected, nothing_done, widened
from trireme.parallel.layout import SUM, lay
from trireme.parallel.seam import Addend
from trireme.parallel.strips import Strips
from trireme_kernels.causal_conv.op import CausalConv
from trireme_kernels.gated_delta.gates import gates
from trireme_kernels.gated_delta.op import GatedDelta
from trireme_kernels.gated_rms_norm.op import GatedRmsNorm
from trireme_kernels.upload import upload

# Items of more rows go chunk by chunk, others row by row.
_FEW_ROWS = 16

Advance = Callable[..., torch.Tensor]
"""delta_step's `run` of one step's numbers: all but its plan -> results [N, Hv, Dv]."""


class GatedDeltaNet(Block):
    """Rows [N, H] -> [N, H]: queries, keys and values pass a causal convolution, change the state of their request and read it;
    what is read is normed and gated (Yang et al. 2024). Heads are cut by key heads, with the value heads that each serves."""

    takes, gives = lay(), lay(tp=SUM)

    def __init__(self, build: Build, layer: int):
        super().__init__(f"layers.{layer}.delta")
        spec, delta = build.spec, build.spec.delta
        assert delta is not None, "a family with such layers has their sizes"
        key_heads, value_heads = delta.num_key_heads, delta.num_value_heads
        served = value_heads // key_heads
        keys, values = (delta.key_dim,) * 2, served * delta.value_dim
        self.norm = norm_weight(build, spec.hidden)
        projections = by_groups("tp", key_heads, *keys, values, values, served, served)  # q k v z b a
        self.proj = Linear(build, sum(part.whole for part in projections.parts), spec.hidden, projections)
        self.conv = Param(build, (delta.channels, 1, delta.kernel), by_groups("tp", key_heads, *keys, values))  # q k v
        self.log_decay = Param(build, (value_heads,), by_groups("tp", key_heads, served), dtype=torch.float32)
        self.dt_bias = Param(build, (value_heads,), by_groups("tp", key_heads, served), dtype=torch.float32)
        self.out_norm = Param(build, (delta.value_dim,))
        self.out = LastLinear(build, spec.hidden, value_heads * delta.value_dim, by_rows("tp", key_heads, values))

        channels, num_heads = self.conv.shape[0], len(self.log_decay)
        window = delta.kernel - 1
        self.keeps = PerRequest(window, channels, num_heads, delta.key_dim, delta.value_dim, channels + 2 * num_heads, build.dtype)
        sizes = {
            "num_key_heads": build.share(key_heads),
            "num_value_heads": num_heads,
            "key_dim": delta.key_dim,
            "value_dim": delta.value_dim,
        }
        self.step = build.choices("delta_step", **sizes, kernel=delta.kernel)
        conv, rule = build.choices("causal_conv", channels=channels), build.choices("gated_delta", **sizes)
        gated_norm = build.choices("gated_rms_norm", dim=delta.value_dim)
        self.chunks = Chunks(conv, rule, gated_norm, self.keeps, build.device)
        self.cut_chunks = None
        if build.plan.cp > 1:
            wide = build.choices("gated_delta", **sizes | {"value_dim": delta.value_dim + delta.key_dim})
            self.cut_chunks = CutChunks(conv, wide, gated_norm, Scan(build.collectives.along("cp")), self.keeps, build.device)
        self._split = [channels, num_heads * delta.value_dim, num_heads, num_heads]
        self._heads, self._eps, self._few_rows = (num_heads, delta.value_dim), spec.eps, max(_FEW_ROWS, window)

    def within(self, regime: Regime) -> tuple[str, ...]:
        return ("all_gather cp",) * 2 if regime.cp else ()  # what the convolution sees, then states

    def forward(self, x: Strips, batch: Batch) -> Iterator[torch.Tensor | Addend]:
        items = batch.items
        assert items is not None, "a step says which items its states are of"
        qkv, z, b, a = self.proj.joined(x).split(self._split, dim=1)
        weights = self.conv[:, 0], self.log_decay, self.dt_bias, self.out_norm, self._eps
        advance, gate = self.planned(items, cut=batch.shared is not None), z.unflatten(1, self._heads)
        rows = advance(qkv, a, b, gate, *weights, *batch.caches[self.cache], items.slots, items.fresh)
        return map(self.out.for_seam, x.split(x.going(rows.flatten(1))))

    def planned(self, items: Items, cut: bool = False) -> Advance:
        """How the step's items advance: planned by the first layer of a stage, for all of them."""
        if self.step not in items.plans:
            items.plans[self.step] = self._plan_cut(items) if cut else self._plan(items)
        return items.plans[self.step]

    def _plan_cut(self, items: Items) -> Advance:
        assert self.cut_chunks is not None and not items.replays.any() and not items.holds.any(), "a step of prompts alone is cut"
        return partial(self.cut_chunks.run, plan=self.cut_chunks.plan(items.counts))

    def _plan(self, items: Items) -> Advance:
        many = (items.counts > self._few_rows) & (items.replays == 0) & ~items.holds
        ends, edges = np.cumsum(items.counts), [0, *np.flatnonzero(np.diff(many)) + 1, len(many)]
        stretches = []
        for first, last in pairwise(edges):
            some = slice(first, last)
            if many[first]:
                advance = partial(self.chunks.run, plan=self.chunks.plan(items.counts[some]))
            else:
                advance = partial(self.step.run, plan=self.step.plan(items.counts[some], items.replays[some], items.holds[some]))
            stretches.append(_Stretch(some, slice(ends[first] - items.counts[first], ends[last - 1]), advance))
        return stretches[0].advance if len(stretches) == 1 else partial(_one_by_one, stretches)


class _Stretch(NamedTuple):
    """Items that follow one another and advance alike."""

    items: slice
    rows: slice
    advance: Advance


def _one_by_one(stretches: list[_Stretch], *arguments: Any) -> torch.Tensor:
    """delta_step's signature, stretch by stretch."""
    qkv, a, b, gate, *shared, slots, fresh = arguments
    given = [
        advance(qkv[rows], a[rows], b[rows], gate[rows], *shared, slots[items], fresh[items])
        for items, rows, advance in stretches
    ]  # fmt: skip
    return torch.cat(given)


class _ChunksPlan(NamedTuple):
    conv: Any
    delta: Any
    last: torch.Tensor  # int64 [I * (K - 1)]: the rows before each item's next one


class Chunks:
    """delta_step's signature for items of K - 1 rows or more, none of them held or replayed: matrix products over runs of rows."""

    def __init__(self, conv: CausalConv, delta: GatedDelta, gated_norm: GatedRmsNorm, keeps: PerRequest, device: torch.device):
        self._conv, self._delta, self._gated_norm, self._keeps, self._device = conv, delta, gated_norm, keeps, device

    def plan(self, counts: np.ndarray) -> _ChunksPlan:
        last = np.cumsum(counts, dtype=np.int64)[:, None] + np.arange(-self._keeps.window, 0)
        return _ChunksPlan(self._conv.plan(counts), self._delta.plan(counts), upload(last.reshape(-1), self._device))

    def run(
        self,
        qkv: torch.Tensor,  # [N, C]
        a: torch.Tensor,  # [N, Hv]
        b: torch.Tensor,  # [N, Hv]
        gate: torch.Tensor,  # [N, Hv, Dv]
        weight: torch.Tensor,  # [C, K]
        log_decay: torch.Tensor,  # [Hv]
        dt_bias: torch.Tensor,  # [Hv]
        norm: torch.Tensor,  # [Dv]
        eps: float,
        inputs: torch.Tensor,  # [S, K - 1, C]
        states: torch.Tensor,  # [S, Hv, Dk, Dv]
        held: torch.Tensor,
        slots: torch.Tensor,  # [I]
        fresh: torch.Tensor,  # [I]
        plan: _ChunksPlan,
    ) -> torch.Tensor:  # [N, Hv, Dv]
        left, initial = _begun(inputs, slots, fresh), _begun(states, slots, fresh)
        q, k, v = _heads(self._conv.run(qkv, left, weight, plan.conv), self._keeps)
        read, final = self._delta.run(q, k, v, *gates(a, b, log_decay, dt_bias), initial, plan.delta)
        inputs.index_copy_(0, slots, qkv.index_select(0, plan.last).view_as(left))
        states.index_copy_(0, slots, final)
        return self._gated_norm(read, gate, norm, eps)


class _CutPlan(NamedTuple):
    pieces: Pieces
    conv: Any
    delta: Any
    nothing: torch.Tensor  # float32 [2 I, Hv, Dk, Dv + Dk]: every chunk begins with it


class CutChunks:
    """delta_step's signature for items of any size whose rows are cut zig-zag along cp, none of them held or replayed: qkv, a and
    b are this rank's rows, while slots and pools are of whole items."""

    def __init__(self, conv: CausalConv, wide: GatedDelta, gated_norm: GatedRmsNorm, scan: Scan, keeps: PerRequest, device: torch.device):
        self._conv, self._wide, self._gated_norm, self._scan, self._keeps, self._device = conv, wide, gated_norm, scan, keeps, device

    def plan(self, counts: np.ndarray) -> _CutPlan:
        keeps, pieces = self._keeps, self._scan.plan(counts, self._keeps.window, partial(upload, device=self._device))
        nothing = nothing_done(len(pieces.counts), keeps.num_heads, keeps.key_dim, keeps.value_dim, self._device)
        return _CutPlan(pieces, self._conv.plan(pieces.counts), self._wide.plan(pieces.counts), nothing)

    def run(
        self,
        qkv: torch.Tensor,  # [N, C]
        a: torch.Tensor,  # [N, Hv]
        b: torch.Tensor,  # [N, Hv]
        gate: torch.Tensor,  # [N, Hv, Dv]
        weight: torch.Tensor,  # [C, K]
        log_decay: torch.Tensor,  # [Hv]
        dt_bias: torch.Tensor,  # [Hv]
        norm: torch.Tensor,  # [Dv]
        eps: float,
        inputs: torch.Tensor,  # [S, K - 1, C]
        states: torch.Tensor,  # [S, Hv, Dk, Dv]
        held: torch.Tensor,
        slots: torch.Tensor,  # [I]
        fresh: torch.Tensor,  # [I]
        plan: _CutPlan,
    ) -> torch.Tensor:  # [N, Hv, Dv]
        left, initial = _begun(inputs, slots, fresh), _begun(states, slots, fresh)
        lefts, last = self._scan.halo(qkv, left, plan.pieces)
        q, k, v = _heads(self._conv.run(qkv, lefts, weight, plan.conv), self._keeps)
        v = widened(v, self._keeps.key_dim)
        read, done = self._wide.run(q, k, v, *gates(a, b, log_decay, dt_bias), plan.nothing, plan.delta)
        before, final = self._scan.states(done, initial)
        inputs.index_copy_(0, slots, last)
        states.index_copy_(0, slots, final)
        return self._gated_norm(corrected(read, before, plan.pieces.counts), gate, norm, eps)


def _begun(pool: torch.Tensor, slots: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
    """[S, ...] -> [I, ...], what items begin with."""
    return pool.index_select(0, slots).masked_fill_(fresh.view(-1, *[1] * (pool.dim() - 1)), 0)


def _heads(mixed: torch.Tensor, keeps: PerRequest) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[N, C] -> queries, keys [N, Hk, Dk] and values [N, Hv, Dv]."""
    values = keeps.num_heads * keeps.value_dim
    keys = (keeps.channels - values) // 2
    q, k, v = mixed.split([keys, keys, values], dim=1)
    return q.unflatten(1, (-1, keeps.key_dim)), k.unflatten(1, (-1, keeps.key_dim)), v.unflatten(1, (-1, keeps.value_dim))
