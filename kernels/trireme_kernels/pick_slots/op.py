"""Signature of pick_slots."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

IMPLEMENTATIONS = ("tl", "reference")


class PickSlots(Protocol):
    """Sizes a case may name: num_experts."""

    def __call__(self, experts: Tensor, copies: Tensor, num_rows: Tensor | None, loads: Tensor | None) -> Tensor:
        """experts int64 [T, k], copies int64 [E, most + 1], the slots of each expert and in the last column how many they are -> slots
        int64 [T, k]: of n copies row r takes copy r % n.

        loads int32 [E], where given, grows by how often each expert is in the first `num_rows` rows, an int64 [1] on their
        device, since a CUDA graph's padding follows; None: in all of them.
        """
        ...
