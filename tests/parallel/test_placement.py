"""Placements: every expert has a slot, and every rank equally many."""

from __future__ import annotations

import torch

from trireme.parallel.placement import Placement


def test_eight_experts_on_two_ranks():
    placement = Placement(num_experts=8, num_ranks=2)
    experts = torch.tensor([[7, 0, 3], [4, 5, 6]])
    assert placement.slots_per_rank == 4
    assert (placement.slots(experts) // placement.slots_per_rank).tolist() == [[1, 0, 0], [1, 1, 1]]
