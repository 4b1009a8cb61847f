"""Seam: what stands between two blocks: move + residual + norm. Collectives and their fusions live here, unseen by models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from typing import NamedTuple

import torch

from trireme.parallel.collectives import Collectives, carry_out
from trireme.parallel.deal import Deal
from trireme.parallel.layout import Layout, moves
from trireme.parallel.peer import Peers
from trireme.parallel.strips import Coming, Strips


class Addend(NamedTuple):
    """A product of many rows that waits for its seam. Where nothing is exchanged it adds to the residual as it is computed, and is never
    written by itself."""

    rows: torch.Tensor  # [N, K]
    columns: torch.Tensor  # [K, H]

    def alone(self) -> torch.Tensor:
        return self.rows @ self.columns

    def added_to(self, residual: torch.Tensor) -> torch.Tensor:
        """In place."""
        return residual.addmm_(self.rows, self.columns)


class Route:
    """The moves from one layout to another, found and checked at build; with one rank there are none to make."""

    def __init__(self, have: Layout, want: Layout, collectives: Collectives):
        path = moves(have, want, collectives.mesh)
        self._path = [(move, None if move.collective == "slice" else collectives.along(move.span)) for move in path]
        self._names = [f"{move.collective} {collectives.mesh.name_of(move.span)}" for move in path]

    def __call__(self, x: torch.Tensor, deal: Deal) -> torch.Tensor:
        for move, along in self._path:
            x = carry_out(move, along, x, deal)
        return x

    def land(self, x: torch.Tensor | Addend | None, residual: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """(what passes this route, the residual that it is then added to); None where the residual has it, in its own memory."""
        if not isinstance(x, Addend):
            return x, residual
        return (x.alone(), residual) if self._path else (None, x.added_to(residual))

    def peers(self, x: torch.Tensor) -> Peers | None:
        """Who can do all of it and what follows in one kernel: it is one sum, of few rows."""
        if len(self._path) != 1:
            return None
        [(move, along)] = self._path
        return along.peers(x) if along is not None and move.collective == "all_reduce" else None

    def __str__(self) -> str:
        return ", ".join(self._names)


class Seam:
    """x as the block before gives it -> normed rows as the block after takes them, and the residual at home.

        have --settle--> home: residual + x, norm --spread--> want

    The norm reads the rounded sum, so that a stage that receives the sum norms the same numbers. Of several strips each passes beside
    what blocks compute of the next (see strips.py).
    """

    def __init__(
        self,
        have: Layout,
        home: Layout,
        want: Layout,
        collectives: Collectives,
        *,
        weight: torch.Tensor,  # [H]
        eps: float,
        rms_norm: Callable[..., torch.Tensor],
        add_rms_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    ):
        self.settle = Route(have, home, collectives)
        self.spread = Route(home, want, collectives)
        self._weight, self._eps = weight, eps
        self._rms_norm, self._add_rms_norm, self._aside = rms_norm, add_rms_norm, collectives.aside

    def __call__(
        self, x: Iterable[torch.Tensor | Addend] | None, residual: Sequence[torch.Tensor], deal: Deal
    ) -> tuple[Strips, list[torch.Tensor]]:
        """(normed, residual) of x [N, H], strip by strip; None where the residual has it already, at a stage's first seam. Strips of x
        are computed here, where they are asked for."""
        given = repeat(None) if x is None else x
        if len(deal.strips) == 1:
            normed, summed = self._cross(*self.settle.land(next(iter(given)), residual[0]), deal)
            return Strips.of(normed), [summed]
        coming, summed = [], []
        for strip, each, before in zip(deal.strips, given, residual, strict=False):
            landed = self.settle.land(each, before)  # a product is not aside: it is what others are beside
            with self._aside() as done:
                normed, after = self._cross(*landed, strip)
            coming.append(Coming(normed, done, kept=landed))
            summed.append(after)
        return Strips(coming), summed

    def _cross(self, x: torch.Tensor | None, residual: torch.Tensor, deal: Deal) -> tuple[torch.Tensor, torch.Tensor]:
        """Of one strip."""
        if x is None:
            normed = self._rms_norm(residual, self._weight, self._eps)
        elif (peers := self.settle.peers(x)) is not None:
            normed, residual = peers.sum_norm(x, residual, self._weight, self._eps)
        else:
            normed, residual = self._add_rms_norm(self.settle(x, deal), residual, self._weight, self._eps)
        return self.spread(normed, deal), residual
