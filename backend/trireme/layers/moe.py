"""The mixture of experts: a router, experts in slots, and where the checkpoint has one an expert that every row passes. How
rows reach their slots is parallel/experts'."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from trireme.core.batch import Batch
from trireme.core.step import Regime
from trireme.layers.block import Block, Build
from trireme.layers.linear import Linear
from trireme.layers.param import Param, by_columns, by_rows, by_slots, norm_weight
from trireme.parallel.experts import make_strategy
from trireme.parallel.placement import Placement


class Moe(Block):
    """Rows [T, H] -> [T, H]: the sum of each row's experts, weighted by the router, and of the shared expert."""

    def __init__(self, build: Build, layer: int):
        super().__init__(f"layers.{layer}.mlp")
        spec = build.spec
        hidden, num_experts, width = spec.hidden, spec.num_experts, spec.moe_intermediate
        self.norm = norm_weight(build, hidden)
        self.router = Linear(build, num_experts, hidden)
        slots = by_slots("ep", num_experts)
        self.gate_up = Param(build, (num_experts, 2 * width, hidden), slots, by_columns("moe_tp", width, width, dim=1))
        self.down = Param(build, (num_experts, hidden, width), slots, by_rows("moe_tp", width, dim=2))

        placement = Placement(num_experts, build.place("ep")[1])
        self.strategy = make_strategy(build.plan.experts, placement, build.collectives)
        self.takes, self.gives = self.strategy.takes, self.strategy.gives
        self.shared = SharedExpert(build, self.strategy.owes) if spec.shared_intermediate else None

        self.route = build.choices("route", num_experts=num_experts)
        self.grouped_linear = build.choices("grouped_linear", num_slots=placement.slots_per_rank)
        self.silu_mul = build.choices("silu_mul", intermediate=width)
        self._top_k, self._renormalise = spec.num_experts_per_tok, spec.norm_topk_prob

    def within(self, regime: Regime) -> tuple[str, ...]:
        return self.strategy.within

    def forward(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        weights, experts = self.route(self.router(x), self._top_k, self._renormalise)
        mixed = self.strategy(x, experts, weights, self._compute)
        return mixed if self.shared is None else self.shared(x, mixed)

    def _compute(self, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Rows [M, H] sorted by slot -> [M, H], or this rank's share of a sum over moe_tp."""
        plan = self.grouped_linear.plan(counts, len(rows))
        gate_up = self.grouped_linear.run(rows, self.gate_up, plan)
        return self.grouped_linear.run(self.silu_mul(gate_up), self.down, plan)


class SharedExpert(nn.Module):
    """A gated MLP whose result a row's own gate weighs. Its columns are cut over the axis whose sum is owed; a width that does
    not divide stays whole, and one rank adds it."""

    def __init__(self, build: Build, axis: str):
        super().__init__()
        hidden, width = build.spec.hidden, build.spec.shared_intermediate
        place, size = build.place(axis)
        cut = axis if width % size == 0 else None
        self.gate_up = Linear(build, 2 * width, hidden, by_columns(cut, width, width))
        self.down = Linear(build, hidden, width, by_rows(cut, width))
        self.gate = Linear(build, 1, hidden)
        self.silu_mul = build.choices("silu_mul", intermediate=width)
        self._adds = cut is not None or place == 0

    def forward(self, x: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """x, mixed [T, H] -> mixed and the expert's result, or what this rank owes of them."""
        return mixed + F.sigmoid(self.gate(x)) * self.down(self.silu_mul(self.gate_up(x))) if self._adds else mixed
