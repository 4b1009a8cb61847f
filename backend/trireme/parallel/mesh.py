"""Mesh: a plan's ranks, seen dense (cp, tp) and by experts (moe_dp, ep, moe_tp). Numbers only; comm makes groups of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from trireme.parallel.plan import Plan


class Group(NamedTuple):
    """Ranks that speak together. The name is the same on all of them, and no other group's."""

    name: str
    ranks: tuple[int, ...]  # of the world, in the axis's order


@dataclass(frozen=True)
class Mesh:
    """World rank = stage * ranks + rank, and inside a stage

        rank = cp_rank * tp + tp_rank = (moe_dp_rank * ep + ep_rank) * moe_tp + moe_tp_rank

    Both views are the same ranks counted in another base, fastest axis last.
    """

    plan: Plan

    @cached_property
    def _views(self) -> dict[str, np.ndarray]:
        """Every axis's view: world ranks with the axis last, [groups, size of the axis]."""
        plan = self.plan
        world = np.arange(plan.world)
        shapes = {
            ("pp", "cp", "tp"): (plan.pp, plan.cp, plan.tp),
            ("pp", "moe_dp", "ep", "moe_tp"): (plan.pp, plan.moe_dp, plan.ep, plan.moe_tp),
        }
        views = {"stage": world.reshape(plan.pp, plan.ranks)}
        for axes, shape in shapes.items():
            for dim, axis in enumerate(axes):
                views[axis] = np.moveaxis(world.reshape(shape), dim, -1).reshape(-1, shape[dim])
        return views

    @property
    def axes(self) -> tuple[str, ...]:
        """`stage` is all ranks of one; `pp` is a rank and its twins in the other stages."""
        return tuple(self._views)

    def size(self, axis: str) -> int:
        return self._views[axis].shape[1]

    def groups(self, axis: str) -> list[Group]:
        """All groups of an axis; together they are the world."""
        return [Group(f"{axis}.{ranks[0]}", tuple(ranks)) for ranks in self._views[axis].tolist()]

    def group(self, axis: str, rank: int) -> Group:
        """The group of an axis that a world rank is in."""
        return next(group for group in self.groups(axis) if rank in group.ranks)

    def place(self, axis: str, rank: int) -> int:
        """A world rank's number along an axis."""
        return self.group(axis, rank).ranks.index(rank)

    def every_group(self) -> list[Group]:
        """All groups of all axes: what graph capture must enter, and what an epoch founds."""
        return [group for axis in self.axes for group in self.groups(axis)]
