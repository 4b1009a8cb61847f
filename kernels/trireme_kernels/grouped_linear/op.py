"""Signature of grouped_linear."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

IMPLEMENTATIONS = ("tl", "reference")


class GroupedLinear(Protocol):
    """Sizes a case may name: num_slots (S), num_in (K), num_out (N).

    Rows lie slot after slot: counts[0] rows of slot 0, counts[1] of slot 1, and so on; many slots have none.
    """

    def plan(self, counts: Tensor, num_rows: int) -> Any:
        """counts int64 [S] on any device, num_rows M >= sum of counts -> what depends on counts alone: made once a layer,
        used by `run` for every weight of its slots.

        M is a bound because on a GPU nobody knows the sum without waiting for it. Rows past the sum belong to no slot.
        """
        ...

    def run(self, x: Tensor, weight: Tensor, plan: Any) -> Tensor:
        """x [M, K], weight [S, N, K] -> [M, N] of x's dtype: x[row] @ weight[slot of row].T, and 0 in rows of no slot,
        whatever x holds there."""
        ...
