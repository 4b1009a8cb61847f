"""The mixture of experts: a router, experts in slots, and where the checkpoint has one an expert that every row passes. How
rows reach their slots is parallel/experts'."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from trireme.core.batch import Batch
from trireme.core.step import Regime
from trireme.layers.block import Block, Build
from trireme.layers.linear import GatedLinear, Linear
from trireme.layers.param import Param, by_columns, by_rows, by_slots, norm_weight
from trireme.parallel.experts import Dispatched, Ops, make_strategy
from trireme.parallel.placement import Placement
from trireme.parallel.strips import Strips
from trireme_kernels.combine_experts.op import Shared
from trireme_kernels.sort_by_slot.op import Pairs


class Moe(Block):
    """Rows [T, H] -> [T, H]: the sum of each row's experts, weighted by the router, and of the shared expert.

    Where loads are balanced, `loads` int32 [E] grows by the rows that each expert was given, on one of the ranks that see them;
    whoever reads it zeroes it. `picks` int64 [T, k] are the slots of the last rows, on ranks along strategy.owes, which must have
    chosen alike: placement.fingerprint of them is one number to compare.
    """

    def __init__(self, build: Build, layer: int):
        super().__init__(f"layers.{layer}.mlp")
        spec = build.spec
        hidden, num_experts, width = spec.hidden, spec.num_experts, spec.moe_intermediate
        self.norm = norm_weight(build, hidden)
        self.router = Linear(build, num_experts, hidden)
        self.placement = placement = _placement(build)
        slots = by_slots("ep", placement)
        self.gate_up = Param(build, (num_experts, 2 * width, hidden), slots, by_columns("moe_tp", width, width, dim=1))
        self.down = Param(build, (num_experts, hidden, width), slots, by_rows("moe_tp", width, dim=2))

        num_slots = placement.slots_per_rank
        ops = Ops(build.choices("sort_by_slot", num_slots=num_slots), build.choices("combine_experts", hidden=hidden))
        self.strategy = make_strategy(build.plan.experts, num_slots, build.collectives, ops)
        self.takes, self.gives = self.strategy.takes, self.strategy.gives
        self.shared = SharedExpert(build, self.strategy.owes) if spec.shared_intermediate else None

        self.route = route_evenly if build.plan.dispatch == "fake" else build.choices("route", num_experts=num_experts)
        if build.plan.dispatch == "skewed":
            self.route = SkewedRoute(self.route, num_experts, build)
        self.pick = build.choices("pick_slots", num_experts=num_experts)
        place, num_alike = build.place(self.strategy.owes)  # ranks that see the same rows
        counts = build.plan.eplb and place == 0
        self.loads = torch.zeros(num_experts, dtype=torch.int32, device=build.device) if counts else None
        self.picks: torch.Tensor | None = None
        self._keeps_picks = build.plan.eplb and num_alike > 1
        self._first_copy = build.place("moe_dp")[0] == 0
        self.grouped_mlp = build.choices(
            "grouped_mlp",
            num_slots=num_slots,
            of_slots=placement.num_slots if build.plan.experts == "gathered" else num_slots,
            hidden=hidden,
            intermediate=self.down.shape[2],
        )
        self._top_k, self._renormalise = spec.num_experts_per_tok, spec.norm_topk_prob

    def within(self, regime: Regime) -> tuple[str, ...]:
        return self.strategy.within

    def forward(self, x: Strips, batch: Batch) -> Sequence[torch.Tensor]:
        return self._mix(x.whole(), batch).split(x.sizes)

    def _mix(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        weights, experts = self.route(self.router(x), self._top_k, self._renormalise)
        if batch.routed is not None:
            batch.routed.append(experts.to(torch.int16))
        slots = experts
        if self.placement.copies is not None:
            counts = self._first_copy or batch.shared is not None  # without context shards copies see the same rows
            slots = self.pick(experts, self.placement.copies, batch.num_rows, self.loads if counts else None)
        if self._keeps_picks:
            self.picks = slots
        shared = None if self.shared is None else self.shared(x)
        return self.strategy(x, slots, weights, self._mlp, shared, batch.num_rows)

    def compute_any(self, num_rows: int) -> None:
        """Rows that mean nothing, as if so many had been dispatched here."""
        if isinstance(self.strategy, Dispatched):
            rows = torch.zeros(num_rows, self.gate_up.shape[2], dtype=self.gate_up.dtype, device=self.gate_up.device)
            self.strategy.compute(rows, torch.zeros(num_rows, dtype=torch.int64, device=rows.device), self._mlp)

    def _mlp(self, rows: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        """Rows [T, H] -> [T * k, H], each pair's result, or this rank's share of a sum over moe_tp."""
        return self.grouped_mlp(rows, self.gate_up, self.down, pairs)


def _placement(build: Build) -> Placement:
    plan, (place, num_ranks) = build.plan, build.place("ep")
    return Placement(
        build.spec.num_experts,
        num_ranks,
        place,
        num_redundant=plan.num_redundant_experts,
        choice="static" if plan.dispatch == "static" else "dynamic",
        changes=plan.eplb,
        device=build.device,
    )


def route_evenly(logits: torch.Tensor, top_k: int, renormalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The op `route` for benchmarks of a perfect balance: logits [T, E] -> equal weights float32 [T, top_k] and experts int64
    [T, top_k], which rows take in turns, so that no expert has more than one row more than another."""
    num_rows, num_experts = logits.shape
    turns = torch.arange(num_rows * top_k, device=logits.device).view(num_rows, top_k)
    return logits.new_full((num_rows, top_k), 1 / top_k, dtype=torch.float32), turns % num_experts


class SkewedRoute:
    """The op `route` for benchmarks of balancing with dummy weights, whose own loads are even: a row's logits, of one spread for all
    rows, stand on top of log(1 / n) for expert n = 1, 2, ..., so that a row draws its experts about as from Zipf's law of exponent
    1, one after another without putting back. Rows still choose by what they are; the busiest experts lie side by side."""

    _SPREAD = 2.0  # of normal noise: nearest to that law for 64 and 128 experts (a seventh of the rows go elsewhere)

    def __init__(self, route: Callable[..., tuple[torch.Tensor, torch.Tensor]], num_experts: int, build: Build):
        self._route = route
        spread = torch.full((num_experts,), self._SPREAD, device=build.device, dtype=build.dtype)
        self._of_noise, self._of_zipf = spread, -torch.arange(1, num_experts + 1, device=build.device).log().to(build.dtype)

    def __call__(self, logits: torch.Tensor, top_k: int, renormalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return self._route(F.layer_norm(logits, logits.shape[-1:], self._of_noise, self._of_zipf), top_k, renormalise)


class SharedExpert(nn.Module):
    """A gated MLP whose result a row's own gate weighs. Its columns are cut over the axis whose sum is owed; a width that does
    not divide stays whole, and one rank adds it."""

    def __init__(self, build: Build, axis: str):
        super().__init__()
        hidden, width = build.spec.hidden, build.spec.shared_intermediate
        place, size = build.place(axis)
        cut = axis if width % size == 0 else None
        self.gate_up = GatedLinear(build, width, hidden, cut)
        self.down = Linear(build, hidden, width, by_rows(cut, width))
        self.gate = Param(build, (1, hidden))
        self._adds = cut is not None or place == 0

    def forward(self, x: torch.Tensor) -> Shared | None:
        """x [T, H] -> what combine_experts adds, or what this rank owes of it."""
        return Shared(self.down(self.gate_up(x)), x, self.gate) if self._adds else None
