"""Experts: how rows reach the slots of their experts and come back. What an expert computes is layers/moe's.

Gathered     every rank that shares a copy of the experts sees all rows, computes those of its slots, and owes a sum
Dispatched   a rank sees its own rows; each goes to the ranks that have its slots, and its results come home
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from trireme.parallel.collectives import Along, Collectives
from trireme.parallel.layout import ROWS, SUM, Layout, lay_experts

Compute = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(rows [M, H] sorted by slot, rows of each of this rank's slots int64 [S]) -> [M, H]; rows past the counts' sum give zeros."""


class Strategy(Protocol):
    takes: Layout
    gives: Layout
    owes: str  # the axis over which what it gives is a sum still owed
    within: tuple[str, ...]  # the collectives of a call

    def __call__(self, x: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, compute: Compute) -> torch.Tensor:
        """x [T, H], the slots of its experts int64 [T, k] and their weights float32 [T, k] -> the weighted sums [T, H]. Ranks along
        `owes` see the same rows, and must have the same slots for them."""
        ...


def make_strategy(kind: str, num_slots: int, collectives: Collectives) -> Strategy:
    """The settings' `experts`, on one rank, which has so many slots."""
    if kind == "gathered":
        return Gathered(num_slots, collectives.mesh.spans["ep"].place(collectives.rank))
    return Dispatched(num_slots, collectives.along("ep"))


class Gathered:
    takes, gives, owes = lay_experts(), lay_experts(ep=SUM, moe_tp=SUM), "experts"
    within: tuple[str, ...] = ()

    def __init__(self, num_slots: int, place: int):
        self._num_slots, self._first = num_slots, place * num_slots

    def __call__(self, x: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, compute: Compute) -> torch.Tensor:
        top_k, slots = slots.shape[1], slots.flatten() - self._first
        elsewhere = (slots < 0) | (slots >= self._num_slots)
        order, counts = _by_slot(slots.masked_fill(elsewhere, self._num_slots), self._num_slots + 1)
        counts = counts[:-1]
        if x.device.type == "cpu":  # a GPU would have to wait to know how many are here; the op skips the rest
            order = order[: int(counts.sum())]
        rows = compute(x.index_select(0, order // top_k), counts)
        return _weigh(rows, order, weights)


class Dispatched:
    takes, gives, owes = lay_experts(ep=ROWS), lay_experts(ep=ROWS, moe_tp=SUM), "moe_tp"

    def __init__(self, num_slots: int, along: Along):
        self._num_slots, self._along = num_slots, along
        self.within: tuple[str, ...] = ("all_to_all ep",) * 3 if along.size > 1 else ()  # counts, rows, results

    def __call__(self, x: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, compute: Compute) -> torch.Tensor:
        """
        home      rows by slot                          rank 0's slots │ rank 1's slots
                     │ all_to_all                             ▼                ▼
        abroad    rows by home, by slot in each         from 0 │ from 1     from 0 │ from 1
                     │ sorted by slot, computed, put back in this order
                     │ all_to_all
        home      rows by slot, weighed and summed
        """
        num_ranks, num_slots, top_k = self._along.size, self._num_slots, slots.shape[1]
        order, counts = _by_slot(slots.flatten(), num_ranks * num_slots)
        going = counts.view(num_ranks, num_slots)
        coming = self._along.all_to_all(going, [1] * num_ranks, [1] * num_ranks)  # [home, slot]: rows that each home sends
        sent, received = going.sum(1).tolist(), coming.sum(1).tolist()

        rows = self._along.all_to_all(x.index_select(0, order // top_k), sent, received)
        here = torch.arange(num_slots, device=x.device).repeat(num_ranks).repeat_interleave(coming.flatten())
        abroad, counts = _by_slot(here, num_slots)
        computed = compute(rows.index_select(0, abroad), counts)
        rows = torch.empty_like(rows).index_copy_(0, abroad, computed)
        return _weigh(self._along.all_to_all(rows, received, sent), order, weights)


def _by_slot(slots: torch.Tensor, num_slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [M] -> (an order that sorts them, equal ones as they were; how many there are of each slot, int64 [num_slots])."""
    counts = slots.new_zeros(num_slots).scatter_add_(0, slots, torch.ones_like(slots))
    return slots.argsort(stable=True), counts


def _weigh(rows: torch.Tensor, order: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Rows [M, H] of pairs (row, expert) numbered `order` [M] among all T * k -> weighted sums [T, H], in float32 and always in
    the order of a row's experts, whichever rank computed them. Pairs that are not in `order` add nothing."""
    num_rows, top_k = weights.shape
    pairs = rows.new_zeros(num_rows * top_k, rows.shape[1]).index_copy_(0, order, rows)
    return (pairs.unflatten(0, (num_rows, top_k)).float() * weights[:, :, None]).sum(1).to(rows.dtype)
