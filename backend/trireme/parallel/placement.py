"""Placement: which slot holds which expert, and which rank along ep has which slots. Numbers only; weights are cut by layers/param."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Placement:
    """Each expert is in the slot of its number, and each rank along ep has an equal run of slots:

    8 experts, 2 ranks:   rank 0 has slots 0-3, rank 1 slots 4-7
    """

    num_experts: int
    num_ranks: int  # along ep; divides the experts

    @property
    def slots_per_rank(self) -> int:
        return self.num_experts // self.num_ranks

    def slots(self, experts: torch.Tensor) -> torch.Tensor:
        """Where a row goes for each of its experts: int64 [T, k] -> slots, int64 [T, k]."""
        return experts
