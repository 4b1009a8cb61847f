"""Signature of combine_experts, and what it takes of a shared expert."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

IMPLEMENTATIONS = ("tl", "reference")


class Shared(NamedTuple):
    """The expert that every row passes: its results [T, H], and what decides how much a row takes of its own: sigmoid(x @ gate)."""

    results: Tensor  # [T, H]
    x: Tensor  # [T, H]
    gate: Tensor  # [1, H]


class CombineExperts(Protocol):
    """Sizes a case may name: hidden."""

    def __call__(self, results: Tensor, weights: Tensor, shared: Shared | None) -> Tensor:
        """results [T * k, H] of pairs (row, expert) numbered row * k + expert, weights float32 [T, k] -> weighted sums [T, H].

        Summed in float32, in the order of a row's experts, the shared one last, and rounded once. Results of weight 0 are not
        looked at: of pairs that another rank computes there are none.
        """
        ...
