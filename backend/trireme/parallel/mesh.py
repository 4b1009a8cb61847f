"""Mesh: a plan's ranks, seen dense (cp, tp) and by experts (moe_dp, ep, moe_tp). Numbers only; comm makes groups of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from trireme.parallel.plan import Plan


class Span(NamedTuple):
    """One digit of a rank's number: rank // low % (high // low). Ranks that differ in no other digit are a group.

    Of 8 ranks with tp=4, cp=2:  tp is Span(1, 4), cp is Span(4, 8), both together Span(1, 8).
    """

    low: int
    high: int
    use: str = ""  # of a communicator of its own, beside the one by which steps are computed

    @property
    def size(self) -> int:
        return self.high // self.low

    def place(self, rank: int) -> int:
        """A rank's digit."""
        return rank // self.low % self.size

    def members(self, rank: int) -> tuple[int, ...]:
        """The group that a rank is in, by their digit."""
        first = rank - self.place(rank) * self.low
        return tuple(range(first, first + self.high, self.low))


class RankGroup(NamedTuple):
    """Ranks that speak together. The name is the same on all of them, and no other group's."""

    name: str
    ranks: tuple[int, ...]  # of the world, in the order of their digit


@dataclass(frozen=True)
class Mesh:
    """World rank = stage * ranks + rank, and inside a stage

        rank = cp_rank * tp + tp_rank = (moe_dp_rank * ep + ep_rank) * moe_tp + moe_tp_rank

    Both views are the same ranks counted in another base, so an axis of either is a span.
    """

    plan: Plan

    @cached_property
    def spans(self) -> dict[str, Span]:
        """By axis. `stage` is all ranks of one, `pp` a rank and its twins in the other stages, `experts` the ranks that have
        one copy of all experts between them (ep and moe_tp together)."""
        plan = self.plan
        copy = plan.ep * plan.moe_tp
        return {
            "stage": Span(1, plan.ranks),
            "pp": Span(plan.ranks, plan.world),
            "cp": Span(plan.tp, plan.ranks),
            "tp": Span(1, plan.tp),
            "moe_dp": Span(copy, plan.ranks),
            "ep": Span(plan.moe_tp, copy),
            "moe_tp": Span(1, plan.moe_tp),
            "experts": Span(1, copy),
        }

    @property
    def axes(self) -> tuple[str, ...]:
        return tuple(self.spans)

    def size(self, axis: str) -> int:
        return self.spans[axis].size

    def place(self, axis: str, rank: int) -> int:
        """A world rank's number along an axis."""
        return self.spans[axis].place(rank)

    def group(self, axis: str, rank: int) -> RankGroup:
        """The group of an axis that a world rank is in."""
        return self.group_of(self.spans[axis], rank)

    def group_of(self, span: Span, rank: int) -> RankGroup:
        ranks = span.members(rank)
        return RankGroup(f"{self.name_of(span)}.{ranks[0]}", ranks)

    def groups(self, axis: str) -> list[RankGroup]:
        """All groups of an axis; together they are the world."""
        firsts = (rank for rank in range(self.plan.world) if self.place(axis, rank) == 0)
        return [self.group(axis, rank) for rank in firsts]

    def every_group(self) -> list[RankGroup]:
        """All groups of all axes, one that is of several axes once."""
        return list(dict.fromkeys(group for axis in self.axes for group in self.groups(axis)))

    def name_of(self, span: Span) -> str:
        """The axis that it is, a dense one where it is one of either view; else its bounds, as for the part of ep inside tp."""
        if span.use:
            return f"{self.name_of(span._replace(use=''))}.{span.use}"
        for axis in ("tp", "cp", "stage", "ep", "moe_tp", "moe_dp", "pp"):
            if self.spans[axis] == span:
                return axis
        return f"{span.low}-{span.high}"
