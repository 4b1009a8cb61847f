"""Experts: how rows reach the slots of their experts and come back. What an expert computes is layers/moe's.

Gathered     every rank that shares a copy of the experts sees all rows, computes those of its slots, and owes a sum
Dispatched   a rank sees its own rows; each goes to the ranks that have its slots, and its results come home
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from trireme.parallel.collectives import Along, Collectives
from trireme.parallel.layout import ROWS, SUM, Layout, lay_experts


class Ops(NamedTuple):
    """Of trireme_kernels, where they are defined."""

    sort: Callable[..., Any]  # sort_by_slot
    combine: Callable[..., torch.Tensor]  # combine_experts


Mlp = Callable[[torch.Tensor, Any], torch.Tensor]
"""(rows [T, H], pairs of them and this rank's slots, as sort_by_slot gives them) -> [T * k, H], each pair's result in its place;
where a pair is not here, anything."""


class Strategy(Protocol):
    takes: Layout
    gives: Layout
    owes: str  # the axis over which what it gives is a sum still owed
    within: tuple[str, ...]  # the collectives of a call

    def __call__(
        self,
        x: torch.Tensor,
        slots: torch.Tensor,
        weights: torch.Tensor,
        mlp: Mlp,
        shared: Any = None,
        num_rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [T, H], the slots of its experts int64 [T, k] and their weights float32 [T, k] -> the weighted sums [T, H], with the
        `shared` expert's as combine_experts takes it. Ranks along `owes` see the same rows, and must have the same slots for them.
        Rows from number `num_rows` on are nobody's, and so is what they give."""
        ...


def make_strategy(kind: str, num_slots: int, collectives: Collectives, ops: Ops) -> Strategy:
    """The settings' `experts`, on one rank, which has so many slots."""
    if kind == "gathered":
        return Gathered(num_slots, collectives.mesh.spans["ep"].place(collectives.rank), ops)
    return Dispatched(num_slots, collectives.along("ep"), ops)


class Gathered:
    takes, gives, owes = lay_experts(), lay_experts(ep=SUM, moe_tp=SUM), "experts"
    within: tuple[str, ...] = ()

    def __init__(self, num_slots: int, place: int, ops: Ops):
        self._num_slots, self._first, self._ops = num_slots, place * num_slots, ops

    def __call__(
        self,
        x: torch.Tensor,
        slots: torch.Tensor,
        weights: torch.Tensor,
        mlp: Mlp,
        shared: Any = None,
        num_rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        pairs = self._ops.sort(slots, weights, self._first, self._num_slots, num_rows)
        return self._ops.combine(mlp(x, pairs), pairs.weights, shared)


class Dispatched:
    takes, gives, owes = lay_experts(ep=ROWS), lay_experts(ep=ROWS, moe_tp=SUM), "moe_tp"

    def __init__(self, num_slots: int, along: Along, ops: Ops):
        self._num_slots, self._along, self._ops = num_slots, along, ops
        self.within: tuple[str, ...] = ("all_to_all ep",) * 3 if along.size > 1 else ()  # counts, rows, results

    def __call__(
        self,
        x: torch.Tensor,
        slots: torch.Tensor,
        weights: torch.Tensor,
        mlp: Mlp,
        shared: Any = None,
        num_rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        home      rows by slot                          rank 0's slots │ rank 1's slots
                     │ all_to_all                             ▼                ▼
        abroad    rows by home, by slot in each         from 0 │ from 1     from 0 │ from 1
                     │ each through the expert of its slot, in this order
                     │ all_to_all
        home      rows by slot, weighed and summed
        """
        num_ranks, num_slots, top_k = self._along.size, self._num_slots, slots.shape[1]
        pairs = self._ops.sort(slots, weights, 0, num_ranks * num_slots, num_rows)
        going = pairs.begins.diff().long().view(num_ranks, num_slots)
        coming = self._along.all_to_all(going, [1] * num_ranks, [1] * num_ranks)  # [home, slot]: rows that each home sends
        sent, received = going.sum(1).tolist(), coming.sum(1).tolist()

        order = pairs.order[: sum(sent)].long()
        rows = self._along.all_to_all(x.index_select(0, order // top_k), sent, received)
        here = torch.arange(num_slots, device=x.device).repeat(num_ranks).repeat_interleave(coming.flatten(), output_size=len(rows))
        rows = self._along.all_to_all(self.compute(rows, here, mlp), received, sent)
        results = rows.new_empty(slots.numel(), rows.shape[1]).index_copy_(0, order, rows)
        return self._ops.combine(results, pairs.weights, shared)

    def compute(self, rows: torch.Tensor, slots: torch.Tensor, mlp: Mlp) -> torch.Tensor:
        """Rows [R, H] that came here, each to one of this rank's slots int64 [R]. How many come is for the router to say."""
        weights = torch.ones(len(rows), 1, device=rows.device)
        return mlp(rows, self._ops.sort(slots[:, None], weights, 0, self._num_slots, None))
