"""Signature of sort_by_slot, and what it gives."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

IMPLEMENTATIONS = ("tl", "reference")


class Pairs(NamedTuple):
    """Pairs (row, expert) of T rows of k experts, numbered row * k + expert, as the S slots of this rank see them. Which pairs are
    here stays on the device."""

    order: Tensor  # int32 [T * k]: the pairs that are here, slot after slot, in each as they were numbered; the rest is undefined
    begins: Tensor  # int32 [S + 1]: where in `order` each slot's pairs begin, and last how many are here
    weights: Tensor  # float32 [T, k]: each pair's weight, 0 where the pair is not here


class SortBySlot(Protocol):
    """Sizes a case may name: num_slots."""

    def __call__(self, slots: Tensor, weights: Tensor, first: int, num_slots: int, num_rows: Tensor | None) -> Pairs:
        """slots int64 [T, k], weights float32 [T, k] -> the pairs that slots first, first + 1, ... first + num_slots - 1 hold, of the
        first `num_rows` rows, an int64 [1] on their device, since a CUDA graph's padding follows; None: of all of them.
        """
        ...
