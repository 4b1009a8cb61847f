"""Seam: what stands between two blocks: move + residual + norm. Collectives and their fusions live here, unseen by models."""

from __future__ import annotations

from collections.abc import Callable

import torch

from trireme.parallel.layout import AXES, ROWS, Layout, Move, lay, moves
from trireme.parallel.mesh import Mesh
from trireme.parallel.plan import Plan

Collective = Callable[[Move, torch.Tensor], torch.Tensor]


def home_of(plan: Plan) -> Layout:
    """Where the residual lives. This line is sequence parallelism."""
    return lay(tp=ROWS) if plan.sp else lay()


class Route:
    """The moves from one layout to another, found and checked at build; with one rank there are none to make."""

    def __init__(self, have: Layout, want: Layout, plan: Plan, collective: Collective | None):
        mesh = Mesh(plan)
        self.moves = moves(have, want, {axis: mesh.size(axis) for axis in AXES})
        assert collective is not None or not self.moves, f"{have} -> {want} on {plan} needs communicators"
        self._collective = collective

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        for move in self.moves:
            assert self._collective is not None, "checked at build"
            x = self._collective(move, x)
        return x


class Seam:
    """x as the block before gives it -> normed rows as the block after takes them, and the residual at home.

        have --settle--> home: residual + x, norm --spread--> want

    The norm reads the rounded sum, so that a stage that receives the sum norms the same numbers.
    """

    def __init__(
        self,
        have: Layout,
        want: Layout,
        plan: Plan,
        *,
        weight: torch.Tensor,  # [H]
        eps: float,
        rms_norm: Callable[..., torch.Tensor],
        add_rms_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]],
        collective: Collective | None = None,
    ):
        self.settle = Route(have, home_of(plan), plan, collective)
        self.spread = Route(home_of(plan), want, plan, collective)
        self._weight, self._eps = weight, eps
        self._rms_norm, self._add_rms_norm = rms_norm, add_rms_norm

    def __call__(self, x: torch.Tensor | None, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(normed, residual) of x [T, H]; None where the residual has it already, at a stage's first seam."""
        if x is None:
            normed = self._rms_norm(residual, self._weight, self._eps)
        else:
            normed, residual = self._add_rms_norm(self.settle(x), residual, self._weight, self._eps)
        return self.spread(normed), residual
